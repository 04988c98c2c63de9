"""Models of dynamic graphs are trained from the command line, go on where they were, and are evaluated and served."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from stepstream.connectors.base import InputError
from stepstream.models.dyngraph.loading import load_graph_model
from stepstream.models.dyngraph.nat import NAT, NATConfig
from stepstream.models.dyngraph.nat_training import NATLearner
from stepstream.pipeline.cli import app
from stepstream.pipeline.pipeline import Pipeline
from stepstream.pipeline.training import train
from stepstream.pipeline.training.graph_data import read_graph
from stepstream.pipeline.training.graph_train import GraphTrainer, GraphTrainOptions

PEOPLE, PAGES = 30, 15
SIZES = {
    "nat": {"node": 8, "first": 8, "second": 4, "hidden": 16},
    "memory": {"width": 16, "time_width": 8, "neighbours": 4},
}


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """People who mostly go back to the page they saw last."""
    random = np.random.default_rng(1)
    count = 1000
    source, destination = random.integers(0, PEOPLE, count), PEOPLE + random.integers(0, PAGES, count)
    last: dict[int, int] = {}
    for i, person in enumerate(source.tolist()):
        if person in last and random.random() < 0.85:
            destination[i] = last[person]
        last[person] = int(destination[i])
    path = tmp_path_factory.mktemp("graph") / "people.npz"
    np.savez(path, src=source, dst=destination, ts=np.cumsum(random.integers(1, 4, count)) * 60)
    return path


def sizes(model: str) -> dict[str, Any]:
    return SIZES["nat" if model == "nat" else "memory"]


@pytest.mark.parametrize("model", ["nat", "tgn", "pres"])
def test_train_then_evaluate_then_serve(model: str, recording: Path, tmp_path: Path) -> None:
    out, sets = tmp_path / "weights", [f"--set={k}={v}" for k, v in sizes(model).items()]
    sets += ["--set=epochs=3", "--set=learning_rate=0.01"]
    result = CliRunner().invoke(app, ["train", model, "--data", str(recording), "--out", str(out), "--json", *sets])
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["epochs"] == 3 and told["ap_random"] > (0.7 if model == "nat" else 0.5)
    result = CliRunner().invoke(
        app, ["evaluate", model, "--data", str(recording), "--weights", str(out), "--json", "--set=split=validation"]
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["metrics"]["ap_random"] == pytest.approx(told["ap_random"], abs=5e-3)
    assert found["per_event"]["mrr"] > (3 if model == "nat" else 1) / PAGES
    assert set(found["baselines"]) == {"edgebank", "edgebank-window", "recency"}
    served = Pipeline.from_dict(
        {
            "name": "links",
            "source": {"replay": {"path": str(recording)}},
            "operators": [{"interactions": {}}, {"links": {"model": model, "weights": str(out)}}],
            "sink": {"files": {"path": str(tmp_path / "out")}},
        }
    ).run()
    assert (served.records_out, served.dead_letters) == (1000, 0)


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(recording: Path, tmp_path: Path) -> None:
    options = {**sizes("nat"), "epochs": 3, "patience": 9}
    whole = train("nat", recording, tmp_path / "whole", device="cpu", options=dict(options))
    stop = threading.Event()

    def at_second_epoch(now: Any) -> None:
        if now["epoch"] == 2:
            stop.set()

    first = train(
        "nat",
        recording,
        tmp_path / "parts",
        device="cpu",
        options=dict(options),
        on_progress=at_second_epoch,
        stop=stop,
    )
    assert first["epochs"] == 1
    second = train("nat", recording, tmp_path / "parts", device="cpu", options=dict(options))
    assert second["epochs"] == 3
    assert second["weights_sha256"] == whole["weights_sha256"]
    lines = (tmp_path / "parts" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]


def test_the_learning_rate_falls_along_half_a_cosine_over_all_epochs(recording: Path, tmp_path: Path) -> None:
    trainer = GraphTrainer("tgn", read_graph(recording), tmp_path, GraphTrainOptions(epochs=2, batch=100))
    rates: list[float] = []
    trainer.run(lambda run, loss: rates.append(run.optimizer.param_groups[0]["lr"]))
    assert rates[0] == 1e-3
    assert rates == sorted(rates, reverse=True)
    assert rates[len(rates) // 2] == pytest.approx(0.525e-3)
    assert 0.05e-3 < rates[-1] < 0.1e-3


def test_it_ends_when_validation_gets_no_better(recording: Path, tmp_path: Path) -> None:
    trainer = GraphTrainer(
        "nat",
        read_graph(recording),
        tmp_path,
        GraphTrainOptions(epochs=20, patience=1, learning_rate=0.0, model=sizes("nat")),
    )
    trainer.run()
    assert (trainer.epoch, trainer.best_epoch) == (2, 1)


def test_nat_learns_on_a_part_of_the_state_what_it_would_on_all_of_it(recording: Path) -> None:
    data = read_graph(recording)
    columns = [torch.from_numpy(part[:300]) for part in (data.source, data.destination, data.time_ns)]
    torch.manual_seed(0)
    nat = NAT(NATConfig(**sizes("nat")))
    learner, state = NATLearner(nat), nat.initial_state(data.nodes)
    for first in range(0, 300, 100):
        batch = (*(column[first : first + 100] for column in columns), None)
        loss = learner.loss(state, batch, batch[1][:, None].roll(1, 0))
        loss.backward()
        learner.take(state, batch)
    learner.flush(state)
    expected = nat.initial_state(data.nodes)
    with torch.no_grad():
        nat.update(expected, *columns)
    assert all(torch.allclose(leaf.double(), expected[name].double(), atol=1e-5) for name, leaf in state.items())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in nat.parameters())


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("recency", {}, "recency has nothing to train: nat, pres, tgn"),
        ("nat", {"nodes": 3}, "--set nodes: there is no such option"),
        ("nat", {"batch": "x"}, "--set batch='x'"),
        ("tgn", {"width": 7}, "width 7 is not a multiple of heads 2"),
        ("pres", {"backbone": "gru"}, "backbone 'gru' is not known"),
    ],
)
def test_what_cannot_be_trained_is_named(
    recording: Path, tmp_path: Path, model: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(model, recording, tmp_path / "w", device="cpu", options=options)


def test_weights_of_one_model_are_not_another_ones(recording: Path, tmp_path: Path) -> None:
    train("nat", recording, tmp_path, device="cpu", options={**sizes("nat"), "epochs": 1})
    assert load_graph_model("nat", tmp_path).features == 0
    with pytest.raises(ValueError, match="holds weights of 'nat'"):
        load_graph_model("tgn", tmp_path)
    with pytest.raises(InputError, match="holds a training of nat"):
        train("tgn", recording, tmp_path, device="cpu", options=sizes("tgn"))
    with pytest.raises(InputError, match="a training with other sizes"):
        train("nat", recording, tmp_path, device="cpu", options={**sizes("nat"), "hidden": 8})
