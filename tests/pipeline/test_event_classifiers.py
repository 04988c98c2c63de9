from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stepstream.connectors.base import InputError
from stepstream.models.registry import load_model
from stepstream.pipeline.training import evaluate, train
from stepstream.pipeline.training.event_sets import batches, read_event_set

SMALL: dict[str, Any] = {"frames": 4, "every_us": 5000, "batch": 8, "shift": 1, "epochs": 4}
SIZES: dict[str, dict[str, Any]] = {
    "sltt": {"widths": [6, 8]},
    "convs5-events": {"width": 6, "states": 4, "blocks": 1},
}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty recordings of 20 ms on 12 x 10 pixels: most events on the left (0) or on the right (1)."""
    rng = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {name: [] for name in "txyp"}
    labels = np.arange(60) % 2
    for label in labels:
        columns["t"].append(np.sort(rng.integers(0, 20_000, 80)).astype(np.uint32))
        columns["x"].append((rng.integers(0, 6, 80) + 6 * (rng.random(80) < (0.9 if label else 0.1))).astype(np.uint8))
        columns["y"].append(rng.integers(0, 10, 80).astype(np.uint8))
        columns["p"].append(rng.integers(0, 2, 80).astype(np.uint8))
    path = tmp_path_factory.mktemp("events") / "set.npz"
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    np.savez(path, **joined, offsets=80 * np.arange(61), labels=labels.astype(np.uint8))
    return path


def test_a_set_is_counted_into_frames_and_split_by_the_seed(recordings: Path) -> None:
    data = read_event_set(recordings, 5000, 3)
    raw = np.load(recordings)
    order = np.random.default_rng(0).permutation(60)
    assert (data.train.tolist(), data.test.tolist()) == (order[:48].tolist(), order[48:].tolist())
    assert data.frames.shape == (60, 3, 2, 10, 12)
    some = slice(80 * 7, 80 * 8)
    expected = np.zeros((3, 2, 10, 12))
    t = raw["t"][some].astype(int)
    for number, x, y, p in zip((t - t[0]) // 5000, raw["x"][some], raw["y"][some], raw["p"][some], strict=True):
        if number < 3:
            expected[number, p, y, x] += 1
    np.testing.assert_array_equal(data.frames[7], expected)


def test_batches_are_moved_within_the_shift_and_the_same_for_a_seed(recordings: Path) -> None:
    data = read_event_set(recordings, 5000, 3)
    plain = {int(label) for _, labels in batches(data, data.test, 5) for label in labels}
    assert plain == {0, 1}
    one, two = (list(batches(data, data.train, 16, 2, np.random.default_rng(3))) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, two, strict=True))
    assert sum(len(labels) for _, labels in one) == 48
    order = np.random.default_rng(3).permutation(data.train)
    original = torch.from_numpy(data.frames[order[0]].astype(np.float32))
    padded = torch.nn.functional.pad(original, (2, 2, 2, 2))
    windows = [padded[..., i : i + 10, j : j + 12] for i in range(5) for j in range(5)]
    assert any(torch.equal(one[0][0][0], window) for window in windows)


@pytest.mark.parametrize("model", SIZES)
def test_a_training_learns_and_one_that_was_stopped_goes_on_to_the_same_weights(
    model: str, recordings: Path, tmp_path: Path
) -> None:
    options = {**SMALL, **SIZES[model], "learning_rate": 1e-2}
    summary = train(model, recordings, tmp_path / "whole", device="cpu", options=options)
    assert summary["accuracy"] >= 0.9  # half would be guessed
    assert list(summary["accuracy_by_ms"]) == ["5", "10", "15", "20"]
    stop, seen = Event(), []

    def stop_early(progress: Any) -> None:
        seen.append(progress)
        if len(seen) == 9:  # within the second epoch
            stop.set()

    out = tmp_path / "stopped"
    train(model, recordings, out, device="cpu", options=options, on_progress=stop_early, stop=stop)
    assert seen[-1]["epoch"] == 2
    again = train(model, recordings, out, device="cpu", options=options)
    assert again["epochs"] == 4
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    loaded = load_model(model, out)
    assert loaded.card.scores["test"]["accuracy"] == again["accuracy"]
    evaluated = evaluate(model, recordings, weights=out, device="cpu")
    assert evaluated["metrics"] == {"accuracy": again["accuracy"]} and evaluated["evaluated"] == 12
    assert evaluated["curve"] == again["accuracy_by_ms"]
    assert evaluated["baselines"]["nearest-centroid"]["accuracy"] == 1.0
    trained_on = evaluate(model, recordings, weights=out, device="cpu", options={"split": "train"})
    assert trained_on["evaluated"] == 48
    data = read_event_set(recordings, 5000, 4)
    x = torch.from_numpy(data.frames[data.test].astype(np.float32))
    state = loaded.model.initial_state(len(x))
    for frame in x.unbind(1):
        logits = loaded.model.step(frame, state)
    right = (logits.argmax(-1).numpy() == data.labels[data.test]).mean()
    assert right == pytest.approx(again["accuracy"], abs=1e-4)


def test_other_ways_to_train_and_what_cannot_be_trained(recordings: Path, tmp_path: Path) -> None:
    base = {**SMALL, **SIZES["sltt"], "epochs": 1}
    found = {
        name: train("sltt", recordings, tmp_path / name, device="cpu", options={**base, **more})["weights_sha256"]
        for name, more in {"sltt": {}, "k": {"backward_steps": 2}, "bptt": {"method": "bptt"}}.items()
    }
    assert len(set(found.values())) == 3
    with pytest.raises(InputError, match="holds a training of sltt: one of convs5-events was expected"):
        train("convs5-events", recordings, tmp_path / "k", device="cpu", options=SMALL)
    with pytest.raises(InputError, match="holds a training with other sizes"):
        train("sltt", recordings, tmp_path / "k", device="cpu", options={**base, "widths": [4, 4]})
    with pytest.raises(InputError, match="--set epoch: there is no such option; did you mean 'epochs'"):
        train("sltt", recordings, tmp_path / "x", device="cpu", options={"epoch": 1})
    with pytest.raises(InputError, match="--set: .*expected sizes above 0"):
        train("sltt", recordings, tmp_path / "x", device="cpu", options={**base, "widths": [0]})
    with pytest.raises(InputError, match="--set split=all: test or train was expected"):
        evaluate("sltt", recordings, weights=tmp_path / "k", device="cpu", options={"split": "all"})
    with pytest.raises(InputError, match=r"2 classes of \[10, 12\] pixels; sltt-nmnist knows 10 of \[34, 34\]"):
        evaluate("sltt", recordings, weights="sltt-nmnist", device="cpu")
    with np.load(recordings) as raw:
        columns = dict(raw)
    for change, reason in (
        ({"labels": columns["labels"][:-1]}, "offsets: expected 60 from 0 to 4800"),
        ({"x": columns["x"][:-1]}, "x: expected 4800 as of t, got 4799"),
        ({"p": columns["p"] * 2.0}, "p: expected integers"),
        ({"p": columns["p"] + 1}, "expected p of 0 and 1"),
    ):
        np.savez(tmp_path / "bad.npz", **{**columns, **change})
        with pytest.raises(InputError, match=reason):
            read_event_set(tmp_path / "bad.npz", 5000, 3)
    del columns["t"]
    np.savez(tmp_path / "bad.npz", **columns)
    with pytest.raises(InputError, match="t: missing"):
        read_event_set(tmp_path / "bad.npz", 5000, 3)
