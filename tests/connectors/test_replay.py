from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support import DATA

from stepstream.connectors.base import InputError
from stepstream.connectors.bulk import make_readings
from stepstream.connectors.records import Origin, Reading, Record
from stepstream.connectors.replay import DATASETS, Replay
from stepstream.connectors.times import parse_time

HERE = ("la", 0)
START = parse_time("2020-01-01")
STEP = 60 * 10**9


@pytest.fixture(scope="module")
def la(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 frames of 5 sensors, a third of the values missing, five frames entirely."""
    values = np.random.default_rng(3).uniform(1, 70, (40, 5)).astype(np.float32)
    values[np.random.default_rng(4).random(values.shape) < 1 / 3] = 0
    values[[0, 7, 8, 9, 39]] = 0
    path = tmp_path_factory.mktemp("replay") / "la.npz"
    np.savez(path, values=values, sensors=list("abcde"), start="2020-01-01T00:00:00", step_s=60)
    return path


def everything(source: Replay, size: int = 7) -> list[Record]:
    records: list[Record] = []
    while not source.ended:
        records += source.poll(size, 0)
    return records


def replay(path: Path | None, **options: Any) -> Replay:
    return Replay(Replay.Options(path=path, **options))


def test_readings_are_the_values_that_are_there(la: Path) -> None:
    source = replay(la)
    values = source.recording.values
    expected = [
        (START + t * STEP, "abcde"[n], float(values[t, n]))
        for t, n in itertools.product(range(40), range(5))
        if not np.isnan(values[t, n])
    ]
    records = everything(source)
    assert [(r.time_ns, r.value.sensor, r.value.value) for r in records] == expected
    assert [r.origin for r in records] == [Origin("la", 0, i) for i in range(len(expected))]
    assert {(r.key, r.path, type(r.value.value)) for r in records} == {("la", (), float)}
    assert source.progress() == (len(expected), len(expected))
    assert source.poll(5, 0) == []


def test_frames_are_all_there_and_say_what_was_observed(la: Path) -> None:
    source = replay(la, emit="frames", key="net")
    records = everything(source)
    assert [r.time_ns for r in records] == [START + t * STEP for t in range(40)]
    assert {r.key for r in records} == {"net"}
    for record, row in zip(records, source.recording.values, strict=True):
        assert record.value.sensors == tuple("abcde")
        assert record.value.observed.tolist() == (~np.isnan(row)).tolist()
        assert record.value.values.tolist() == np.nan_to_num(row).tolist()


@given(st.sampled_from(["readings", "frames"]), st.data())
def test_seek_gives_the_same_records_again_at_any_batch_size(la: Path, emit: str, data: st.DataObject) -> None:
    source = replay(la, emit=emit)
    whole = everything(source, 1000)
    for _ in range(3):
        offset = data.draw(st.integers(0, len(whole)))
        source.seek({HERE: offset})
        assert source.ended == (offset == len(whole))
        again = everything(source, data.draw(st.integers(1, 50)))
        assert [(r.time_ns, r.origin) for r in again] == [(r.time_ns, r.origin) for r in whole[offset:]]
        if emit == "readings":
            assert again == whole[offset:]


def test_bounds_and_sensors_select(la: Path) -> None:
    source = replay(la, start="2020-01-01T00:10:00", end="2020-01-01T00:20:00", sensors=["d", "b"], emit="frames")
    records = everything(source)
    assert [(r.time_ns - START) // STEP for r in records] == list(range(10, 20))
    assert [r.origin.offset for r in records] == list(range(10))
    values = source.recording.values[10:20][:, [3, 1]]
    assert [r.value.values.tolist() for r in records] == np.nan_to_num(values).tolist()
    assert records[0].value.sensors == ("d", "b")


def test_all_sensors_in_another_order(la: Path) -> None:
    readings = everything(replay(la, sensors=list("edcba")))
    plain = everything(replay(la))
    assert [r.value for r in readings if r.value.sensor == "a"] == [r.value for r in plain if r.value.sensor == "a"]
    assert [r.value.sensor for r in readings[:9]] != [r.value.sensor for r in plain[:9]]


def test_zero_is_a_value_if_told_so(la: Path) -> None:
    assert len(everything(replay(la, zero_is_missing=False))) == 200


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sensors": ["a", "bb"]}, r"sensors: 'bb' is not in la \(5 sensors\); did you mean 'b'"),
        ({"sensors": []}, "sensors: expected at least one"),
        ({"sensors": ["a", "a"]}, "named twice"),
        ({"start": "2021-01-01"}, "la has nothing in 2021-01-01 to ..; it has 2020-01-01T00:00:00"),
        ({"graph": "/absent.csv"}, "absent.csv: graph: No such file"),
        ({"format": "traffic-h5"}, "cannot be read as HDF5"),
    ],
)
def test_what_is_wrong_is_named(la: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        replay(la, **options)


@pytest.mark.parametrize(
    "bad", [{"speed": 0}, {"speed": -1}, {"speed": "fast"}, {"start": "noon"}, {"emit": "x"}, {"k": 1}]
)
def test_options_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(bad))):
        Replay.Options(**bad)


def test_seek_beyond_or_elsewhere_says_why(la: Path) -> None:
    source = replay(la)
    with pytest.raises(InputError, match="offset: 100000 is not in la; expected 0 to"):
        source.seek({HERE: 100_000})
    with pytest.raises(InputError, match=r"partition: \('x', 0\)"):
        source.seek({("x", 0): 0})


def test_an_unknown_dataset_names_those_there_are() -> None:
    with pytest.raises(InputError, match="'metr-lb' is not in the package; expected metr-la-week"):
        replay(None, dataset="metr-lb")


def test_a_path_may_be_given_another_name(la: Path) -> None:
    source = replay(la, dataset="metr-la")
    assert source.partitions() == [("metr-la", 0)]
    assert source.poll(1, 0)[0].key == "metr-la"


def test_the_week_inside_the_package() -> None:
    try:
        source = replay(None)
    except InputError as error:
        if "missing from this installation" in str(error):
            pytest.skip("data/metr_la_week.npz is not there")
        raise
    assert source.partitions() == [(next(iter(DATASETS)), 0)]
    assert source.recording.values.shape == (2016, 207)
    assert source.recording.step_s == 300


def test_speed_is_kept_and_poll_does_not_wait_longer_than_asked(la: Path) -> None:
    """At 300 times, a frame of 60 s is due every 200 ms."""
    source = replay(la, emit="frames", speed=300)
    begun = time.monotonic()
    assert len(source.poll(100, 0)) == 1
    assert source.poll(100, 0) == []
    assert time.monotonic() - begun < 0.2
    due = [(r.time_ns - START) / 1e9 / 300 for r in source.poll(100, 5)]
    assert time.monotonic() - begun >= due[0]
    asked = time.monotonic()
    assert source.poll(100, 0.001) == []
    assert time.monotonic() - asked < 0.15
    while source.progress()[0] < 5:
        records = source.poll(100, 0.02)
        assert all(time.monotonic() - begun >= (r.time_ns - START) / 1e9 / 300 for r in records)


def test_what_is_replayed_after_a_restart_comes_at_once(la: Path) -> None:
    source = replay(la, emit="frames", speed=1)
    source.pace_from({HERE: 30})
    assert [r.origin.offset for r in source.poll(100, 0)] == list(range(31))  # the first paced one is due at once
    assert source.poll(100, 0.01) == []


@given(st.lists(st.tuples(st.text(), st.floats(allow_nan=False))), st.integers(0, 2**62), st.integers(-(2**63), 2**63))
def test_bulk_made_readings_are_those_of_the_constructors(
    rows: list[tuple[str, float]], first: int, time_ns: int
) -> None:
    made = make_readings("t", first, "k", time_ns, [s for s, _ in rows], [v for _, v in rows])
    assert made == [Record("k", time_ns, Reading(s, v), Origin("t", 0, first + i)) for i, (s, v) in enumerate(rows)]


def test_metr_la_offsets() -> None:
    path = DATA / "traffic" / "metr_la.npz"
    if not path.exists():
        pytest.skip("metr_la.npz is not in ../shared/data/traffic")
    source = replay(path)
    total = source.progress()[1]
    assert total == 6_519_002  # 8.109 % of 207 x 34,272 are missing
    source.seek({("metr-la", 0): total - 1})
    assert [r.origin.offset for r in source.poll(10, 0)] == [total - 1]
    assert source.ended
