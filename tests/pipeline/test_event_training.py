"""EventTransAct is trained from the command line, goes on where it was, and is evaluated and served."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import DATA, RecordingContext
from typer.testing import CliRunner

from stepstream.connectors.base import InputError
from stepstream.connectors.records import EventSlice, Origin, Record
from stepstream.models.eventtransact import EventTransAct, FrameForm
from stepstream.models.registry import load_model
from stepstream.operators.accumulate import Accumulate
from stepstream.pipeline.cli import app
from stepstream.pipeline.training import train
from stepstream.pipeline.training.event_augment import Augmentation, draw_move
from stepstream.pipeline.training.event_data import LabelledEvents, frames_of, identity, read_labelled
from stepstream.pipeline.training.event_train import EventTrainer, EventTrainOptions, event_contrast

SMALL = {"stem": [4], "width": 8, "heads": 2, "hidden": 16, "temporal_layers": 1}
SETS = ["--set=stem=[4]", "--set=width=8", "--set=heads=2", "--set=hidden=16", "--set=clips=4", "--set=frames=3"]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty recordings of 120 ms: events in the upper or in the lower half."""
    random = np.random.default_rng(0)
    t, x, y, offsets = [], [], [], [0]
    labels = np.arange(40, dtype=np.uint8) % 2
    for label in labels:
        count = int(random.integers(150, 250))
        t.append(np.sort(random.integers(0, 120_000, count)))
        x.append(random.integers(0, 34, count))
        y.append(random.integers(0, 17, count) + 17 * label)
        offsets.append(offsets[-1] + count)
    path = tmp_path_factory.mktemp("events") / "halves.npz"
    columns = {name: np.concatenate(c).astype(d) for name, c, d in (("t", t, "u4"), ("x", x, "u1"), ("y", y, "u1"))}
    polarity = random.integers(0, 2, offsets[-1]).astype(np.uint8)
    np.savez(path, **columns, p=polarity, offsets=np.array(offsets), labels=labels)
    return path


def invoke(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_train_then_evaluate(recording: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "weights")
    told = invoke("train", "eventtransact", "--data", str(recording), "--out", out, "--set=steps=60",
                  "--set=learning_rate=0.01", "--set=erase=0", "--set=ema=0.8", "--set=alone=0.8", *SETS)  # fmt: skip
    assert told["steps"] == 60
    found = invoke("evaluate", "eventtransact", "--data", str(recording), "--weights", out)
    assert {"model", "task", "split", "metrics", "baselines"} <= set(found)
    assert (found["task"], found["split"], found["evaluated"]) == ("events", "test", 8)
    assert found["metrics"] == {"accuracy": 1.0, "decisions": 8}
    assert found["baselines"]["nearest-centroid"]["accuracy"] == 1.0
    assert list(found["curve"]) == ["40", "80", "120"]
    card = json.loads((tmp_path / "weights" / "card.json").read_text())
    assert card["config"]["frame"]["every_us"] == 40_000 and card["training"]["recordings"] == 40
    there = str(tmp_path / "exact")
    exact = invoke("train", "eventtransact", "--data", str(recording), "--out", there, "--set=steps=2",
                   "--set=form=exact", f"--set=initial={out}", "--set=alone=0", *SETS)  # fmt: skip
    assert exact["steps"] == 2
    model = load_model("eventtransact", tmp_path / "exact").model
    assert isinstance(model, EventTransAct) and model.config.form == "exact"
    result = CliRunner().invoke(app, ["evaluate", "eventtransact", "--data", str(recording)])
    assert result.exit_code != 0 and "--weights" in result.stderr


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(recording: Path, tmp_path: Path) -> None:
    options = {"steps": 6, "clips": 2, "frames": 3, **SMALL}
    whole = train("eventtransact", recording, tmp_path / "whole", device="cpu", options=options)
    stop = threading.Event()

    def watch(progress: Any) -> None:
        if progress["step"] == 3:
            stop.set()

    part = train(
        "eventtransact", recording, tmp_path / "part", device="cpu", options=options, on_progress=watch, stop=stop
    )
    assert part["steps"] == 3
    rest = train("eventtransact", recording, tmp_path / "part", device="cpu", options=options)
    assert rest["steps"] == 6 and rest["weights_sha256"] == whole["weights_sha256"]
    with pytest.raises(InputError, match="other sizes"):
        train("eventtransact", recording, tmp_path / "part", device="cpu", options={**options, "width": 16})


@pytest.mark.parametrize(("every_us", "window_us"), [(20_000, 20_000), (10_000, 40_000)])
def test_frames_for_training_are_those_of_accumulate(recording: Path, every_us: int, window_us: int) -> None:
    data = read_labelled(recording)
    form = FrameForm(every_us=every_us, window_us=window_us)
    piece = data.pieces[7]
    t, x, y, p = data.events(piece)
    records = []
    for i, low in enumerate(range(0, 130_000, 5000)):
        some = slice(*np.searchsorted(t, (low, low + 5000)))
        value = EventSlice(t[some], x[some], y[some], p[some].astype(bool), 34, 34, low, low + 5000, i)
        records.append(Record("k", low * 1000, value, Origin("in", 0, i)))
    every, window = (f"{us // 1000}ms" for us in (every_us, window_us))
    operator = Accumulate(Accumulate.Options(every=every, window=window))
    wanted = np.stack([r.value.values for r in operator.process(records, RecordingContext())])
    found = frames_of((t, x, y, p), form, len(wanted), 0, identity(34, 34))
    assert len(wanted) >= 6 and wanted.sum() > 100
    assert np.array_equal(found, wanted)


def test_no_event_of_the_test_part_is_trained_on(recording: Path) -> None:
    data = read_labelled(recording)
    train_part, test = ({p.recording for p in data.part(s)} for s in ("train", "test"))
    assert len(test) == 8 and not train_part & test
    fold = {p.recording for p in data.part("train", 1, inside=True)}
    assert fold and fold | {p.recording for p in data.part("train", 1)} == train_part


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> LabelledEvents:
    """Two clips in the bs2 layout, of which the later half is the test part."""
    folder, random = tmp_path_factory.mktemp("clips"), np.random.default_rng(3)
    for number, name in enumerate(("wave", "clap")):
        t = np.sort(random.integers(0, 800_000, 4000))
        rows = np.zeros((4000, 5), np.uint8)
        rows[:, 0], rows[:, 1] = random.integers(64 * number, 64 * number + 64, 4000), random.integers(0, 128, 4000)
        rows[:, 2], rows[:, 3], rows[:, 4] = t >> 16, (t >> 8) & 255, t & 255
        (folder / f"{number:02d}_{name}.bs2").write_bytes(rows.tobytes())
    return read_labelled(folder)


def test_the_later_half_of_a_clip_is_held_back(clips: LabelledEvents) -> None:
    assert (clips.protocol, clips.classes, clips.width) == ("time", ("wave", "clap"), 128)
    for before, after in zip(clips.part("train"), clips.part("test"), strict=True):
        assert before.recording == after.recording and before.begin_us == 0
        assert before.end_us == after.begin_us and abs(after.end_us - 2 * before.end_us) <= 1
        assert clips.events(before)[0].max() < clips.events(after)[0].min()
        beyond = clips.events(before, before.end_us - 1000, after.end_us)[0]
        assert len(beyond) and beyond.max() < before.end_us  # however long a clip is asked for


def test_a_spliced_clip_has_the_label_of_each_frame(clips: LabelledEvents, tmp_path: Path) -> None:
    still = Augmentation(shift=0, rotate=0, shear=0, scale=0, distort=0, speed=0, erase=0)
    options = EventTrainOptions(
        steps=1, alone=0.0, splice=1.0, clips=6, frames=8, augment=still, model={**SMALL, "memory": 4}
    )
    window, labels, shown = EventTrainer(clips, tmp_path, options)._batch()
    assert window.shape == (12, 8, 2, 128, 128) and labels.shape == shown.shape == (12, 8)
    right = window.sum(dim=(2, 3))[..., 64:].sum(-1) > window.sum(dim=(2, 3))[..., :64].sum(-1)
    assert torch.equal(right.long(), labels)
    assert (labels[:, 0] != labels[:, -1]).any()
    assert torch.equal(shown[:, 0], torch.ones(12, dtype=torch.int64))
    assert all(sorted(row.tolist()) != list(range(1, 9)) for row in shown)


def test_augmentation_moves_a_little_and_erases_what_it_says() -> None:
    random = np.random.default_rng(0)
    still = Augmentation(shift=0, rotate=0, shear=0, scale=0, distort=0, speed=0, erase=0)
    move = draw_move(still, (34, 34), 4, 10, 1.0, random)
    assert np.allclose(move.where, identity(34, 34).where, atol=1e-5) and (move.keep == 1).all()
    moved = [draw_move(Augmentation(erase=0), (34, 34), 4, 10, 1.0, random) for _ in range(50)]
    far = [np.abs(m.where - move.where).mean() for m in moved]
    assert 0.5 < np.mean(far) < 4 and all((m.keep == 1).all() for m in moved)
    erased = [draw_move(Augmentation(erase=1), (34, 34), 4, 10, 1.0, random) for _ in range(200)]
    polarity = [(m.keep.reshape(4, 2) == 0).all(axis=0).any() for m in erased]
    assert 0.25 < np.mean(polarity) < 0.55
    assert 0.4 < np.mean([(m.where[0] == -1).sum() >= 25 for m in erased]) < 0.9


def test_the_contrast_is_small_where_a_frame_is_like_itself_in_the_other_view_alone() -> None:
    frames = torch.eye(6)[None].repeat(2, 1, 1)
    aligned, shifted = event_contrast(frames, frames), event_contrast(frames, frames.roll(1, dims=1))
    by_hand = -torch.log(torch.exp(torch.tensor(10.0)) / (torch.exp(torch.tensor(10.0)) + 10))
    assert float(aligned) == pytest.approx(float(by_hand), rel=1e-3)
    assert float(shifted) > 5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"labels": None}, "labels: missing"),
        ({"offsets": np.array([0, 5])}, "offsets: expected 41 ascending"),
        ({"x": np.zeros(3, np.uint8)}, "x, y, p: expected"),
        ({"t": np.zeros((2, 2), np.uint32)}, "t: expected a list of integers"),
        ({"p": np.array([1.5])}, "p: expected a list of integers"),
    ],
)
def test_files_that_are_no_labelled_events_are_refused_by_field(
    recording: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with np.load(recording) as file:
        parts = {name: file[name] for name in file.files} | change
    np.savez(tmp_path / "bad.npz", **{name: part for name, part in parts.items() if part is not None})
    with pytest.raises(InputError, match=said):
        read_labelled(tmp_path / "bad.npz")


@pytest.mark.skipif(not (DATA / "event" / "nmnist_small").is_dir(), reason="needs ../shared/data")
def test_the_shipped_digits_are_what_their_card_says() -> None:
    data = str(DATA / "event" / "nmnist_small" / "train1k.npz")
    found = invoke("evaluate", "eventtransact", "--data", data, "--weights", "eventtransact-nmnist")
    assert found["evaluated"] == 196 and found["baselines"]["nearest-centroid"]["accuracy"] < 0.8
    assert found["metrics"]["accuracy"] >= 0.95
