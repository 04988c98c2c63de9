"""Frames of events to activities: decisions that do not flicker, one state a camera, and what ends it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests.support import RecordingContext, plain

from stepstream.connectors.event_frames import EventFrame
from stepstream.connectors.records import Activity, Origin, Record
from stepstream.models.eventtransact import EventTransAct, EventTransActConfig, FrameForm
from stepstream.models.weights import Card, save_weights
from stepstream.operators.accumulate import Accumulate
from stepstream.operators.base import OptionError
from stepstream.operators.decisions import BEGUN, ENDED, GOES_ON, DecisionOptions, Decisions
from stepstream.operators.recognize import Recognize, RecognizeOptions, summed

EVERY = 20_000  # us
FORM = FrameForm(height=8, width=10, every_us=EVERY, window_us=2 * EVERY)
CONFIG = EventTransActConfig(("a", "b", "c"), FORM, stem=(4,), width=8, heads=2, hidden=16, memory=4)


def shown(label: int, random: np.random.Generator) -> np.ndarray:
    """A frame of events in the left, middle or right third; of -1: none."""
    values = random.poisson(0.02, (2, 8, 10)).astype(np.float32)
    if label >= 0:
        values[:, :, 3 * label : 3 * label + 3] += random.poisson(1.0, (2, 8, 3))
    return values


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network that has learned in which third of the sensor events are."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    model = EventTransAct(CONFIG).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        labels = random.integers(0, 3, 16)
        window = np.stack([[shown(label, random) for _ in range(3)] for label in labels])
        logits = model(torch.from_numpy(window)).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels).repeat_interleave(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    folder = tmp_path_factory.mktemp("weights")
    save_weights(model, folder, Card(model="eventtransact", task="events", config=dataclasses.asdict(CONFIG)))
    return folder


def operator(weights: Path, **options: Any) -> Recognize:
    quick = {"begin": 0.6, "end": 0.5, "hold": "40ms", "smooth": "20ms", "report": "80ms", "min_events": 10}
    return Recognize(RecognizeOptions.model_validate({"weights": weights, **quick, **options}))


def frames(count: int, key: str = "camera", seed: int = 0, first: int = 2, **other: Any) -> list[Record]:
    """Something else in every twelve frames: see `truth`."""
    random = np.random.default_rng(seed)
    made = []
    for i in range(first, first + count):
        values = shown(truth(i, seed), random)
        value = EventFrame(values, "polarity", (i - 2) * EVERY, i * EVERY, int(values.sum()), **other)
        made.append(Record(key, i * EVERY * 1000, value, Origin(key, 0, i)))
    return made


def truth(at: int, seed: int = 0) -> int:
    """Left, right, nothing, middle, ..."""
    return (0, 2, -1, 1)[(at // 12 + seed) % 4]


def alike(found: Sequence[Record], wanted: Sequence[Record]) -> bool:
    """Equal but for the rounding of batched arithmetic."""
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        x, y = a.value, b.value
        assert (a.key, a.time_ns, a.path, x.label, x.onset_ns, x.until_ns, x.ongoing) == (
            b.key, b.time_ns, b.path, y.label, y.onset_ns, y.until_ns, y.ongoing,
        )  # fmt: skip
        assert x.confidence == pytest.approx(y.confidence, abs=1e-5)
    return True


@pytest.mark.parametrize("cuts", [[1, 2, 3, 50, 61], [60], [7, 33, 99]], ids=str)
def test_activities_are_the_same_to_the_bit_however_the_stream_is_cut_and_restored(
    weights: Path, cuts: list[int]
) -> None:
    stream = frames(60) + frames(60, first=70)  # a gap in between
    whole = operator(weights).process(stream, RecordingContext())
    context, one, out = RecordingContext(), operator(weights), []
    for start, stop in itertools.pairwise([0, *cuts, 120]):
        out += one.process(stream[start:stop], context)
        saved = one.snapshot("camera")
        one.process(frames(30, seed=1, first=stop + 9), RecordingContext())
        one = operator(weights)
        one.restore("camera", saved)
    assert plain(out) == plain(whole)
    assert context.counts["begun"] == 8 and context.counts["gap"] == 1 and context.counts["steps"] == 120
    assert not context.dead


def test_many_cameras_in_one_step_get_what_each_gets_alone(weights: Path) -> None:
    streams = [frames(50, f"camera{i}", seed=i) for i in range(5)]
    mixed = [record for at in range(50) for stream in streams for record in stream[at : at + 1]]
    steps: list[int] = []
    together = operator(weights)
    together.on_step = lambda streams, seconds: steps.append(streams)
    out = together.process(mixed, RecordingContext())
    assert steps == [5] * 50
    for i, stream in enumerate(streams):
        alone = operator(weights).process(stream, RecordingContext())
        assert alone and alike([record for record in out if record.key == f"camera{i}"], alone)


def test_a_person_reads_what_happens_since_when_and_until_when(weights: Path) -> None:
    context = RecordingContext()
    out = operator(weights).process(frames(94), context)
    told: list[Activity] = [record.value for record in out]
    begun = [(a.label, a.onset_ns // 20_000_000) for a in told if a.ongoing]
    begun = [item for i, item in enumerate(begun) if item not in begun[:i]]
    labels = ["a", "c", "b", "a", "c", "b"]
    assert [label for label, _ in begun] == labels
    for (_, onset), at in zip(begun, (1, 12, 36, 48, 60, 84), strict=True):
        assert abs(onset + 1 - at) <= 2  # frames
    ended = [(a.label, a.until_ns // 20_000_000) for a in told if not a.ongoing]
    assert [label for label, _ in ended] == labels[:-1]
    for (_, until), at in zip(ended, (12, 24, 48, 60, 72), strict=True):
        assert 0 <= until + 1 - at <= 3
    assert context.counts["begun"] == 6 and context.counts["ended"] == 5
    for record, activity in zip(out, told, strict=True):
        assert activity.onset_ns < activity.until_ns <= record.time_ns
        assert activity.probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert len(out) < 40  # of 94 frames


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"boot_id": 1}, "rebooted"),
        ({"first": 90}, "gap"),
        ({"first": 20}, "backwards"),
    ],
)
def test_what_a_stream_was_before_is_forgotten_and_its_activity_ends(
    weights: Path, change: dict[str, Any], reason: str
) -> None:
    before, after = frames(20), frames(30, seed=1, **{"first": 22, **change})
    context = RecordingContext()
    one = operator(weights)
    last = one.process(before, context)[-1].value
    assert last.ongoing
    out = one.process(after, context)
    assert context.counts[reason] == context.counts["restarts"] == 1
    ended = out[0].value
    assert not ended.ongoing and (ended.label, ended.onset_ns) == (last.label, last.onset_ns)
    assert ended.until_ns == before[-1].time_ns and out[0].time_ns == after[0].time_ns
    fresh = operator(weights).process(after, RecordingContext())
    assert [plain(record.value) for record in out[1:]] == [plain(record.value) for record in fresh]


def test_a_larger_sensor_is_summed_down_and_a_smaller_one_is_refused(weights: Path) -> None:
    small = frames(12)
    large, tiny = [], []
    for record in small:
        wide = np.zeros((2, 16, 30), np.float32)
        wide[:, 1::2, 2::3] = record.value.values
        large.append(dataclasses.replace(record, value=dataclasses.replace(record.value, values=wide)))
        cut = dataclasses.replace(record.value, values=record.value.values[:, :, :9])
        tiny.append(dataclasses.replace(record, value=cut))
    context = RecordingContext()
    assert alike(operator(weights).process(large, context), operator(weights).process(small, RecordingContext()))
    assert context.counts["scaled"] == 12
    one = operator(weights)
    assert one.process(tiny, context) == []
    assert context.reasons == ["values: expected a sensor of at least 10 x 8, got 9 x 8"] * 12
    one.process(large[:6], context)
    one.process(small[6:], context)
    assert context.counts["resized"] == 1


def test_summing_down_loses_no_event() -> None:
    random = np.random.default_rng(0)
    values = random.poisson(1.0, (2, 31, 45)).astype(np.float32)
    out = summed(values, 7, 11)
    assert out.shape == (2, 7, 11)
    wanted = np.zeros((2, 7, 11))
    for y in range(31):
        for x in range(45):
            wanted[:, y * 7 // 31, x * 11 // 45] += values[:, y, x]
    assert np.array_equal(out, wanted)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"kind": "count"}, "kind: expected polarity with 2 channels, got count with 2"),
        ({"start_us": 7}, "start_us, end_us: expected 40000 us, got 39993"),
    ],
)
def test_frames_of_another_making_are_dead_letters(weights: Path, change: dict[str, Any], reason: str) -> None:
    record = frames(1)[0]
    context = RecordingContext()
    odd = dataclasses.replace(record, value=dataclasses.replace(record.value, **change))
    assert operator(weights).process([odd], context) == []
    assert context.reasons == [reason]


def test_accumulate_must_make_what_the_weights_were_trained_on(weights: Path) -> None:
    def made(**options: Any) -> Accumulate:
        return Accumulate(Accumulate.Options(**options))

    operator(weights).connect([made(every="20ms", window="40ms")], [])
    for options in ({"every": "20ms"}, {"every": "10ms", "window": "40ms"}, {"every": "40ms", "kind": "count"}):
        with pytest.raises(OptionError, match="every: 20ms, window: 40ms"):
            operator(weights).connect([made(**options)], [])


def test_an_end_above_the_beginning_is_refused(weights: Path) -> None:
    with pytest.raises(ValidationError, match=r"end: expected below begin \(0.3\)"):
        RecognizeOptions.model_validate({"weights": weights, "begin": 0.3})


def decide(
    stream: Sequence[Sequence[float]], events: int = 100, **options: Any
) -> list[tuple[int, str, dict[str, Any]]]:
    """What is told at which frame of 20 ms, of probabilities frame by frame."""
    rules = Decisions(DecisionOptions(**{"smooth": "0ms", "hold": "60ms", "report": None, **options}), len(stream[0]))
    memory, told = rules.fresh(), []
    for i, row in enumerate(stream):
        for what, fields in rules.take(memory, np.array(row), events, i * 20_000_000, (i + 1) * 20_000_000):
            told.append((i, what, fields))
    return told


A, B, UNSURE = (0.9, 0.1), (0.1, 0.9), (0.5, 0.5)


def test_an_activity_begins_after_a_hold_and_with_its_onset() -> None:
    told = decide([UNSURE] * 3 + [A] * 10)
    assert [(i, what) for i, what, _ in told] == [(5, BEGUN)]
    assert told[0][2] == {
        "label": 0,
        "onset": 0,
        "seen": 120_000_000,
        "confidence": 0.9,
    }  # argmax of a tie is the first
    told = decide([B, UNSURE, UNSURE] + [A] * 10)
    assert told[0][2]["onset"] == 20_000_000


def test_a_short_flicker_is_not_told() -> None:
    assert [what for _, what, _ in decide([A] * 10 + [B] * 2 + [A] * 10)] == [BEGUN]
    assert [what for _, what, _ in decide([UNSURE] * 5 + [A] * 2 + [UNSURE] * 5)] == []


def test_hysteresis_keeps_an_activity_between_the_bounds() -> None:
    between = (0.45, 0.55)
    told = decide([A] * 5 + [between] * 20 + [(0.3, 0.55)] * 5)
    assert [(i, what) for i, what, _ in told] == [(2, BEGUN), (27, ENDED)]
    assert told[1][2]["seen"] == 25 * 20_000_000  # the last frame that was above the bound
    assert told[1][2]["confidence"] == 0.3


def test_another_activity_ends_the_first_one_at_the_same_frame() -> None:
    told = decide([A] * 10 + [B] * 10)
    assert [(i, what, fields["label"]) for i, what, fields in told] == [(2, BEGUN, 0), (12, ENDED, 0), (12, BEGUN, 1)]
    assert told[2][2]["onset"] == 200_000_000


def test_the_onset_of_a_smoothed_decision_is_when_the_class_began_to_win() -> None:
    told = decide([A] * 20 + [B] * 20, smooth="100ms")
    begun = [fields for _, what, fields in told if what == BEGUN]
    assert [fields["onset"] for fields in begun] == [0, 20 * 20_000_000]
    at = next(i for i, what, fields in told if what == BEGUN and fields["label"] == 1)
    assert at > 24  # it takes the average a while


def test_a_running_activity_is_told_again_every_so_often() -> None:
    told = decide([A] * 60, report="400ms")
    assert [(i, what) for i, what, _ in told] == [(2, BEGUN), (22, GOES_ON), (42, GOES_ON)]
    assert {fields["onset"] for _, _, fields in told} == {0}


def test_frames_with_too_few_events_show_nothing() -> None:
    assert decide([A] * 30, events=4, min_events=5) == []
    assert [what for _, what, _ in decide([A] * 30, events=5, min_events=5)] == [BEGUN]
