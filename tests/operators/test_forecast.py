"""The forecast operator: rows a key, waves, calendars, ages, and state that can be saved at any moment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import SECOND, RecordingContext, frame

from stepstream.connectors.records import Forecast, Record
from stepstream.models.registry import load_model
from stepstream.models.sttn import STTN, STTNConfig
from stepstream.models.weights import Card, save_weights
from stepstream.operators.forecast import Forecaster, ForecastOptions

SENSORS = ("a", "b", "c")
STEP_S = 3600
CONFIG = STTNConfig(3, horizons=4, blocks=2, width=8, heads=2, memory=4, input_frames=3, slots_per_day=24)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small STTN with random weights for sensors a, b, c."""
    torch.manual_seed(0)
    model = STTN(CONFIG, torch.randn(2, 3, 3) * 0.3, mean=50, std=10)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("weights")
    card = Card(model="sttn", task="traffic", config=vars(CONFIG).copy(), sensors=SENSORS, step_s=STEP_S, mean=50.0)
    save_weights(model, folder, card)
    return folder


def forecaster(weights: Path, **options: object) -> Forecaster:
    return Forecaster(ForecastOptions.model_validate({"model": "sttn", "weights": weights, **options}))


def frames(count: int, key: str = "net", seed: int = 0, first: int = 0) -> list[Record]:
    random = np.random.default_rng(seed)
    records = []
    for i in range(first, first + count):
        values = [float(v) if random.random() > 0.2 else None for v in random.normal(50, 10, 3)]
        records.append(frame(i, i * STEP_S * SECOND, SENSORS, values, key, restart=i == first))
    return records


def values(records: Sequence[Record]) -> np.ndarray:
    return np.stack([record.value.values for record in records])


def test_it_gives_what_the_model_gives_over_the_window(weights: Path) -> None:
    stream = frames(40)
    outputs = forecaster(weights).process(stream, RecordingContext())
    window = {
        "value": torch.from_numpy(np.stack([r.value.values for r in stream]))[None],
        "observed": torch.from_numpy(np.stack([r.value.observed for r in stream]))[None],
        "slot_of_day": (torch.arange(40) % 24)[None],
        "day_of_week": ((torch.arange(40) // 24 + 3) % 7)[None],
    }
    expected = load_model("sttn", weights).model(window)[0].numpy()
    np.testing.assert_allclose(values(outputs), expected, rtol=1e-5, atol=1e-3)
    assert outputs[0].value.horizons_s == (3600, 7200, 10800, 14400)
    assert [r.path for r in outputs] == [(0,)] * 40
    assert [r.time_ns for r in outputs] == [r.time_ns for r in stream]


def test_one_key_is_bit_for_bit_the_same_however_it_is_cut(weights: Path) -> None:
    stream, context = frames(30), RecordingContext()
    whole = values(forecaster(weights).process(stream, context))
    operator = forecaster(weights)
    parts = [values(operator.process(stream[i : i + n], context)) for i, n in [(0, 1), (1, 12), (13, 2), (15, 15)]]
    assert np.array_equal(whole, np.concatenate(parts))


def test_many_keys_share_a_step_and_each_gets_what_it_gets_alone(weights: Path) -> None:
    keys = [f"net-{i}" for i in range(9)]
    streams = {key: frames(5 + 3 * i, key, seed=i, first=i) for i, key in enumerate(keys)}
    mixed = [streams[key][t] for t in range(40) for key in keys if t < len(streams[key])]
    together = forecaster(weights, max_batch=4).process(mixed, RecordingContext())
    for key in keys:
        alone = values(forecaster(weights).process(streams[key], RecordingContext()))
        np.testing.assert_allclose(values([r for r in together if r.key == key]), alone, rtol=1e-5, atol=1e-3)


def test_snapshot_and_restore_at_any_moment_go_on_bit_for_bit(weights: Path) -> None:
    stream, context = frames(25), RecordingContext()
    expected = forecaster(weights).process(stream, context)
    for cut in (0, 1, 7, 24):
        first, second = forecaster(weights), forecaster(weights)
        first.process(stream[:cut], context)
        second.process(frames(3, "somebody-else"), context)
        for key in first.keys():
            second.restore(key, first.snapshot(key))
        rest = second.process(stream[cut:], context)
        assert np.array_equal(values(rest), values(expected[cut:]))
        ages = [record.value.age_s for record in rest]
        assert all(np.array_equal(a, r.value.age_s) for a, r in zip(ages, expected[cut:], strict=True))


def test_a_snapshot_of_other_sizes_is_refused(weights: Path) -> None:
    operator, context = forecaster(weights), RecordingContext()
    operator.process(frames(2), context)
    state = operator.snapshot("net")
    state["model"]["block0"]["key"] = state["model"]["block0"]["key"][:, :2]
    with pytest.raises(ValueError, match="state/block0/key is"):
        operator.restore("net", state)


def test_restart_forgets_what_was_before(weights: Path) -> None:
    first, second = frames(10), frames(10, seed=5, first=100)
    both = forecaster(weights).process([*first, *second], RecordingContext())
    fresh = forecaster(weights).process(second, RecordingContext())
    assert np.array_equal(values(both[10:]), values(fresh))


def test_a_dropped_key_starts_afresh_and_its_row_is_used_again(weights: Path) -> None:
    operator, context = forecaster(weights), RecordingContext()
    operator.process([*frames(6), *frames(6, "other")], context)
    operator.drop("net")
    operator.drop("net")
    assert list(operator.keys()) == ["other"]
    again = operator.process(frames(6), context)
    assert np.array_equal(values(again), values(forecaster(weights).process(frames(6), context)))


def test_it_says_how_old_its_knowledge_is_and_when_it_knows_nothing(weights: Path) -> None:
    field = 2 * 3 + 3
    stream = [frame(0, 0, SENSORS, [50, 50, None], restart=True)]
    stream += [frame(i, i * STEP_S * SECOND, SENSORS, [None, None, None]) for i in range(1, field + 3)]
    stream.append(frame(field + 3, (field + 3) * STEP_S * SECOND, SENSORS, [None, 40, None]))
    outputs: list[Forecast] = [r.value for r in forecaster(weights).process(stream, RecordingContext())]
    assert [o.blind for o in outputs] == [False] * field + [True] * 3 + [False]
    assert outputs[2].age_s.tolist() == [2 * STEP_S, 2 * STEP_S, np.inf]
    assert outputs[-1].age_s.tolist() == [(field + 3) * STEP_S, 0, np.inf]


def test_ages_end_where_nothing_is_looked_back_on(weights: Path) -> None:
    stream = [frame(0, 0, SENSORS, [50, 50, None], restart=True)]
    stream += [frame(i, i * STEP_S * SECOND, SENSORS, [None, 40, None]) for i in range(1, 50)]
    outputs: list[Forecast] = [r.value for r in forecaster(weights).process(stream, RecordingContext())]
    assert outputs[47].age_s.tolist() == [47 * STEP_S, 0, np.inf]
    assert outputs[48].age_s.tolist() == [np.inf, 0, np.inf]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 60), st.integers(0, 9), st.sets(st.integers(1, 69), max_size=4), st.floats(0, 1))
def test_what_it_says_is_decided_by_as_many_frames_as_it_reaches(
    weights: Path, cut: int, seed: int, restarts: set[int], seen: float
) -> None:
    stream, random = [], np.random.default_rng(seed)
    with mock.patch("stepstream.operators.forecast.REMEMBERED", 5):
        made = [forecaster(weights) for _ in range(2)]
    for i in range(70):
        names = [*SENSORS, "stranger", "another"]
        found = [float(v) if random.random() < seen else None for v in random.normal(50, 10, 3)]
        found += [1.0 if random.random() < 0.08 else None for _ in range(2)]
        stream.append(frame(i, i * STEP_S * SECOND, names, found, restart=i == 0 or i in restarts))
    outcomes = []
    reach = made[0].reach
    assert reach == 2 * 3 + 3
    for operator, first in zip(made, (0, max(0, cut - reach)), strict=True):
        context = RecordingContext()
        operator.process(stream[first:cut], RecordingContext())
        outputs = operator.process(stream[cut:], context)
        told = [(r.value.age_s.tolist(), r.value.blind, r.origin.offset) for r in outputs]
        outcomes.append((values(outputs), told, context.reasons, context.counts))
    whole, seeked = outcomes
    np.testing.assert_allclose(seeked[0], whole[0], rtol=1e-5, atol=1e-3)
    assert seeked[1:] == whole[1:]


def test_sensors_are_matched_by_name(weights: Path) -> None:
    stream, context = frames(6), RecordingContext()
    shuffled = []
    for r in stream:
        order = [2, 0, 1]
        seen = [float(r.value.values[i]) if r.value.observed[i] else None for i in order]
        names = [*(SENSORS[i] for i in order), "stranger"]
        shuffled.append(frame(r.origin.offset, r.time_ns, names, [*seen, 10.0], restart=r.value.restart))
    outputs = forecaster(weights).process(shuffled, context)
    assert np.array_equal(values(outputs), values(forecaster(weights).process(stream, RecordingContext())))
    assert context.counts["unknown_sensor"] == 6
    assert len(context.dead) == 1
    assert "stranger" in context.reasons[0]


def test_frames_at_another_step_are_refused(weights: Path) -> None:
    stream = [frame(i, i * 300 * SECOND, SENSORS, [50, 50, 50], restart=i == 0) for i in range(3)]
    with pytest.raises(ValueError, match="300 s apart: the weights expect 3600 s"):
        forecaster(weights).process(stream, RecordingContext())


def test_local_time_follows_the_zone_through_daylight_saving(weights: Path) -> None:
    utc, la = forecaster(weights), forecaster(weights, timezone="America/Los_Angeles")
    noon_utc = 1330560000 + 12 * 3600  # 2012-03-01, winter: UTC-8
    x = la.encode([_opened(la, frame(0, noon_utc * SECOND, SENSORS, [1, 1, 1]))], RecordingContext())
    assert (int(x["slot_of_day"]), int(x["day_of_week"])) == (4, 3)
    summer = noon_utc + 30 * 86400  # 2012-03-31: UTC-7, a Saturday
    x = la.encode([_opened(la, frame(0, summer * SECOND, SENSORS, [1, 1, 1]))], RecordingContext())
    assert (int(x["slot_of_day"]), int(x["day_of_week"])) == (5, 5)
    x = utc.encode([_opened(utc, frame(0, summer * SECOND, SENSORS, [1, 1, 1]))], RecordingContext())
    assert (int(x["slot_of_day"]), int(x["day_of_week"])) == (12, 5)


def _opened(operator: Forecaster, record: Record) -> Record:
    operator.memory[record.key] = operator.fresh_memory()
    return record


def test_persistence_takes_its_sensors_from_any_card(weights: Path) -> None:
    operator = forecaster(weights, model="persistence", horizons=2)
    stream = [frame(0, 0, SENSORS, [30, None, 50], restart=True), frame(1, STEP_S * SECOND, SENSORS, [None, 20, 60])]
    outputs = operator.process(stream, RecordingContext())
    assert values(outputs).tolist() == [[[30, 50, 50]] * 2, [[30, 20, 60]] * 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizons": 9}, "horizons is 9"),
        ({"timezone": "Mars/Olympus"}, "Mars/Olympus"),
        ({"model": "weekly-average"}, "holds weights of 'sttn'"),
    ],
)
def test_wrong_options_are_named(weights: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forecaster(weights, **options)


def test_a_frame_of_another_network_is_a_dead_letter_and_a_step_without_values(weights: Path) -> None:
    def stream(foreign: Record | None) -> list[Record]:
        middle = frame(10, 10 * STEP_S * SECOND, SENSORS, [None, None, None]) if foreign is None else foreign
        return [*frames(10), middle, *(r for r in frames(20)[11:])]

    other = frame(10, 10 * STEP_S * SECOND, ("x", "y"), [99, None])
    context = RecordingContext()
    outputs = forecaster(weights).process(stream(other), context)
    expected = forecaster(weights).process(stream(None), RecordingContext())
    assert [r.origin.offset for r in outputs] == [offset for offset in range(20) if offset != 10]
    assert np.array_equal(values(outputs), values([*expected[:10], *expected[11:]]))
    assert [r.value.age_s.tolist() for r in outputs[10:]] == [r.value.age_s.tolist() for r in expected[11:]]
    assert context.reasons == [f"a frame of another network: it has x, y, and none of the 3 sensors of {weights}"]
    assert context.counts["unknown_sensor"] == 1
    # Wherever it is cut and restored, the same.
    for cut in (10, 11):
        first, second = forecaster(weights), forecaster(weights)
        before = first.process(stream(other)[:cut], RecordingContext())
        second.restore("net", first.snapshot("net"))
        after = second.process(stream(other)[cut:], RecordingContext())
        assert np.array_equal(values([*before, *after]), values(outputs))


def test_a_stream_of_another_network_has_no_forecast_at_all_and_one_of_ours_may_follow(weights: Path) -> None:
    foreign = [frame(i, i * STEP_S * SECOND, ("x",), [1], restart=i == 0) for i in range(14)]
    operator, context = forecaster(weights), RecordingContext()
    assert operator.process(foreign, context) == []
    assert len(context.dead) == 14
    assert context.counts["blind"] == context.counts["absent_sensors"] == 0
    ours = frame(14, 14 * STEP_S * SECOND, ("x", "b"), [None, 50])
    (out,) = operator.process([ours], context)
    assert not out.value.blind
    assert out.value.age_s.tolist() == [np.inf, 0, np.inf]


def test_sensors_that_a_frame_lacks_are_counted_and_the_log_says_so_once(
    weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stream = [frame(i, i * STEP_S * SECOND, ("b",), [50], restart=i == 0) for i in range(30)]
    context = RecordingContext()
    with caplog.at_level("WARNING", logger="stepstream"):
        operator = forecaster(weights)
        operator.process(stream, context)
        forecaster(weights).process(frames(30), context)
    assert context.counts["absent_sensors"] == 2 * 30
    assert not context.dead
    assert [r.getMessage() for r in caplog.records] == [
        f"2 of the 3 sensors of {weights} are in none of the first 12 frames: nothing is known of them"
    ]
