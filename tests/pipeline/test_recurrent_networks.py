"""Models whose state has no end, from training to a pipeline's outputs: dcrnn, and a cell of another library."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from tests.pipeline import small_network as small

from stepstream.connectors.base import InputError
from stepstream.connectors.recording import open_recording
from stepstream.models.base import StreamModel
from stepstream.models.dcrnn import DCRNN, DCRNNConfig
from stepstream.models.graph_cells import GraphCellConfig, GraphCellModel, cell_edges
from stepstream.models.registry import load_model
from stepstream.models.weights import Card, save_weights
from stepstream.pipeline.training import evaluate, traffic_metrics, train
from stepstream.pipeline.training.traffic_data import TrafficTensors
from stepstream.pipeline.training.traffic_metrics import evaluate_cold, evaluate_stream

needs_cells = pytest.mark.skipif(
    importlib.util.find_spec("torch_geometric_temporal") is None,
    reason="torch-geometric-temporal is not installed: pip install stepstream[graph]",
)
HOURS = 24 * 20
TINY = {"width": 6, "embedding": 4, "segments": [[2, 14]], "validate_every_s": 1e9}
GRAPH = np.array([0, 1, 2]), np.array([1, 2, 0]), np.array([0.5, 1.0, 0.2])
"""A ring of three; no edge leads to the fourth sensor."""


def write(path: Path, graph: bool) -> Path:
    """Twenty days of four sensors with a daily rhythm, hourly, with a gap of two days in the test part."""
    random = np.random.default_rng(0)
    hours = np.arange(HOURS)
    values = 50 + 10 * np.sin(2 * np.pi * (hours[:, None] / 24 + np.arange(4) / 8)) + random.normal(0, 2, (HOURS, 4))
    values[random.random((HOURS, 4)) < 0.05] = 0
    times = 1_600_000_000 // 3600 * 3600 + 3600 * hours + 48 * 3600 * (hours >= 420)
    arrays = {"values": values.astype(np.float32), "times_ns": times * 1_000_000_000, "step_s": np.array(3600)}
    if graph:
        arrays |= dict(zip(("adj_row", "adj_col", "adj_w"), GRAPH, strict=True))
    np.savez(path, sensors=np.array(["n", "e", "s", "w"]), **arrays)
    return path


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "ring.npz", graph=True)


def run(name: str, recording: Path, out: Path, steps: int, **options: object) -> dict[str, object]:
    given = {**TINY, "steps": steps, **options}
    return train(name, recording, out, device="cpu", seed=3, options=given)


def test_dcrnn_trains_and_is_scored_cold_and_along_the_stream(recording: Path, tmp_path: Path) -> None:
    summary = run("dcrnn", recording, tmp_path, 40, learning_rate=2e-2)
    assert summary["model"] == "dcrnn"
    loaded = load_model("dcrnn", tmp_path)
    assert (loaded.card.sensors, loaded.card.config["graph"]) == (("n", "e", "s", "w"), "given")
    assert float(loaded.model.walks[0].sum()) == 3
    result = evaluate("dcrnn", recording, weights=tmp_path, device="cpu")
    assert set(result["metrics"]) == set(result["warm"])
    assert result["metrics"] != result["warm"]
    assert result["metrics"]["mae_720"] < result["baselines"]["persistence"]["mae_720"]


def test_a_stopped_training_goes_on_bit_for_bit(recording: Path, tmp_path: Path) -> None:
    run("dcrnn", recording, tmp_path / "whole", 6)
    stop = Event()
    stopping = train(
        "dcrnn",
        recording,
        tmp_path / "cut",
        device="cpu",
        seed=3,
        options={**TINY, "steps": 6},
        on_progress=lambda now: stop.set() if now["step"] == 3 else None,
        stop=stop,
    )
    assert (stopping["ended"], stopping["steps"]) == (False, 3)
    run("dcrnn", recording, tmp_path / "cut", 6)
    whole, cut = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("whole", "cut"))
    assert all(torch.equal(whole["model"][name], cut["model"][name]) for name in whole["model"])
    assert all(torch.equal(whole["average"][name], cut["average"][name]) for name in whole["average"])
    with pytest.raises(InputError, match="holds a training of dcrnn: one of sttn was expected"):
        train("sttn", recording, tmp_path / "cut", device="cpu", options={"width": 6, "heads": 2, "steps": 1})


def test_the_matrices_between_hidden_layers_are_muons(recording: Path, tmp_path: Path) -> None:
    run("dcrnn", recording, tmp_path, 1, layers=2)
    muon, adamw = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimizers"]
    names = [name for name, _ in load_model("dcrnn", tmp_path).model.named_parameters()]
    hidden = {"head.weight", "between.0.weight", "cells.0.hidden.weight", "cells.1.hidden.weight"}
    assert len(muon["state"]) == len(hidden & set(names)) == 4
    assert len(adamw["state"]) == len(names) - 4


@needs_cells
def test_a_graph_cell_trains_and_is_scored(recording: Path, tmp_path: Path) -> None:
    run("graph-cell", recording, tmp_path, 12, cell="TGCN", options={"improved": True})
    card = load_model("graph-cell", tmp_path).card
    assert (card.config["cell"], card.config["options"], card.config["edges"]) == ("TGCN", {"improved": True}, 4)
    result = evaluate("graph-cell", recording, weights=tmp_path, device="cpu")
    assert result["warm"]["mae_180"] > 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dcrnn", {"form": "bidirectional"}, "dcrnn has the causal form alone"),
        ("dcrnn", {"hops": 0}, "hops is 0: at least 1"),
        ("dcrnn", {"memory": 3}, "--set memory: there is no such option"),
        ("persistence", {}, "sttn, dcrnn, graph-cell or weekly-average was expected"),
        pytest.param("graph-cell", {"cell": "GRU"}, "cell 'GRU' is not known: A3TGCN, DCRNN", marks=needs_cells),
        pytest.param("graph-cell", {"options": {"k": 1}}, "GConvGRU has no option 'k'", marks=needs_cells),
    ],
)
def test_wrong_options_are_named(
    recording: Path, tmp_path: Path, name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        run(name, recording, tmp_path, 1, **options)


def test_a_graph_cell_wants_a_graph_and_dcrnn_learns_one(tmp_path: Path) -> None:
    recording = write(tmp_path / "bare.npz", graph=False)
    with pytest.raises(InputError, match="bare has no graph, and a graph cell needs one"):
        run("graph-cell", recording, tmp_path / "cell", 1)
    run("dcrnn", recording, tmp_path / "dcrnn", 1)
    assert load_model("dcrnn", tmp_path / "dcrnn").card.config["graph"] == "learned"


def test_along_the_stream_means_from_before_the_part_through_it_and_afresh_at_a_gap(
    recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TrafficTensors.of(open_recording(recording))
    torch.manual_seed(0)
    model = DCRNN(DCRNNConfig(4, width=4, embedding=4, slots_per_day=24, graph="learned"), mean=50, std=10)
    torch.nn.init.normal_(model.head_out.weight)
    model.eval().requires_grad_(False)
    part = data.splits["test"]
    assert data.restarts[part.first + 1 : part.last].any()
    monkeypatch.setattr(traffic_metrics, "WARM_UP", 30)
    outputs = {}
    starts = [part.first - 30, *(part.first + np.flatnonzero(data.restarts[part.first : part.last]))]
    for start, stop in zip(starts, [*starts[1:], part.last], strict=True):
        run_of_frames = torch.arange(int(start), int(stop))
        outputs |= dict(zip(run_of_frames.tolist(), model(data.frames(run_of_frames[None]))[0], strict=True))
    expected = traffic_metrics.HorizonErrors(12)
    ends = torch.from_numpy(data.unbroken(part.first, part.last, 0, 12))
    expected.add(torch.stack([outputs[int(t)] for t in ends]), *data.truth(ends, 12))
    found = evaluate_stream(data, "test", model, 12)
    torch.testing.assert_close(found.sums, expected.sums, rtol=1e-6, atol=0)
    assert not torch.allclose(found.sums, evaluate_cold(data, "test", model, 12, 12).sums)


PIPELINE = """\
name: small
source: {replay: {path: day.npz, speed: max}}
operators:
  - align: {every: 10min}
  - forecast: {model: dcrnn, weights: dcrnn}
  - forecast: {model: graph-cell, weights: graph-cell}
  - score: {horizons: [1, 3], every: 1h, window: 6h}
sink: {files: {path: out}}
engine: {local: {commit_every: 40, max_batch: 50, snapshot_every_s: 0}}
"""


def a_network(name: str) -> StreamModel:
    torch.manual_seed(0)
    sizes = {"sensors": 5, "horizons": 3, "width": 6, "embedding": 4, "slots_per_day": 86_400 // small.STEP_S}
    model: StreamModel
    if name == "dcrnn":
        model = DCRNN(DCRNNConfig(**sizes), torch.rand(4, 5, 5) / 5, mean=50, std=10)
    else:
        edges = cell_edges(5, *GRAPH)
        model = GraphCellModel(GraphCellConfig(**sizes, cell="GConvLSTM", edges=edges[0].shape[1]), edges, 50, 10)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


@needs_cells
def test_a_pipeline_publishes_what_the_unrolled_models_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small.write_npz(tmp_path / "day.npz")
    (tmp_path / "small.yaml").write_text(PIPELINE)
    values = torch.from_numpy(small.speeds())
    seconds = torch.arange(small.FRAMES)
    day = {
        "value": values.nan_to_num()[None],
        "observed": values.isfinite()[None],
        "slot_of_day": seconds[None],
        "day_of_week": torch.zeros(1, small.FRAMES, dtype=torch.int64),
    }
    expected = {}
    for name in ("dcrnn", "graph-cell"):
        model = a_network(name)
        expected[name] = model(day)[0]
        card = Card(model=name, task="traffic", config=vars(model.config).copy(), sensors=small.SENSORS, step_s=600)
        save_weights(model, tmp_path / name, card)
    summary = small.good()
    assert summary["records_out"]["Forecast"] == 2 * small.FRAMES
    assert {score["model"] for score in summary["scores"]} == {"dcrnn", "graph-cell"}
    for name, outputs in expected.items():
        published = [row["values"] for row in small.rows("out/forecasts.jsonl") if row["model"] == name]
        torch.testing.assert_close(torch.tensor(published), outputs, rtol=0, atol=2e-3)
