"""Training goes on where it was stopped, fits any recording, and evaluation follows the published protocol."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from tests.support import DATA

from stepstream.connectors.base import InputError
from stepstream.connectors.recording import open_recording
from stepstream.models.registry import load_model
from stepstream.models.weights import read_card
from stepstream.pipeline.training import evaluate, train
from stepstream.pipeline.training.traffic_baselines import persistence_errors, ridge_errors, weekly_average_errors
from stepstream.pipeline.training.traffic_data import TrafficTensors
from stepstream.pipeline.training.traffic_metrics import HorizonErrors, evaluate_cold, evaluate_warm

HOURS = 24 * 40
TINY = {"width": 8, "blocks": 1, "memory": 4, "input_frames": 3, "segments": [[2, 16]], "validate_every_s": 1e9}


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty days of four sensors with a daily rhythm, noise, missing values and one gap of two days, hourly."""
    random = np.random.default_rng(0)
    hours = np.arange(HOURS)
    values = 50 + 10 * np.sin(2 * np.pi * (hours[:, None] / 24 + np.arange(4) / 8)) + random.normal(0, 2, (HOURS, 4))
    values[random.random((HOURS, 4)) < 0.05] = 0
    times = 1_600_000_000 // 3600 * 3600 + 3600 * hours + 48 * 3600 * (hours >= 300)
    path = tmp_path_factory.mktemp("data") / "rhythm.npz"
    sensors = np.array(["n", "e", "s", "w"])
    np.savez(path, values=values.astype(np.float32), times_ns=times * 1_000_000_000, sensors=sensors, step_s=3600)
    return path


def run(recording: Path, out: Path, steps: int, stop: Event | None = None, **options: object) -> dict[str, object]:
    given = {**TINY, "steps": steps, **options}
    return train("sttn", recording, out, device="cpu", seed=3, options=given, stop=stop)


def test_training_without_a_graph_fits_and_is_served(recording: Path, tmp_path: Path) -> None:
    summary = run(recording, tmp_path, 60, learning_rate=1e-2)
    assert summary["ended"] is True
    loaded = load_model("sttn", tmp_path)
    assert loaded.card.sensors == ("n", "e", "s", "w")
    assert loaded.card.config["slots_per_day"] == 24
    assert loaded.card.config["graph"] == loaded.card.training["graph"] == "learned"
    result = evaluate("sttn", recording, weights=tmp_path, device="cpu")
    keys = {f"{name}_{minutes}" for name in ("mae", "rmse", "mape") for minutes in (180, 360, 720)}
    assert set(result["metrics"]) == keys == set(result["warm"])
    assert set(result["baselines"]) == {"persistence", "weekly-average", "ridge"}
    assert result["metrics"]["mae_720"] < result["baselines"]["persistence"]["mae_720"]


def test_without_roads_the_graph_is_of_positions_and_the_card_says_so(recording: Path, tmp_path: Path) -> None:
    where = tmp_path / "where.csv"
    where.write_text("n,34.02,-118.2\ne,34.01,-118.19\ns,34.0,-118.2\nw,34.01,-118.21\n")
    run(recording, tmp_path / "given", 2, graph_file=str(where))
    card = read_card(tmp_path / "given")
    assert (card.config["graph"], card.training["graph"]) == ("given", "positions in where.csv")
    run(recording, tmp_path / "learned", 2, graph_file=str(where), graph="learned")
    card = read_card(tmp_path / "learned")
    assert (card.config["graph"], card.training["graph"]) == ("learned", "learned")


def test_a_stopped_training_goes_on_bit_for_bit(recording: Path, tmp_path: Path) -> None:
    run(recording, tmp_path / "whole", 8)
    stop = Event()
    stopping = train(
        "sttn",
        recording,
        tmp_path / "cut",
        device="cpu",
        seed=3,
        options={**TINY, "steps": 8},
        on_progress=lambda now: stop.set() if now["step"] == 3 else None,
        stop=stop,
    )
    assert stopping["ended"] is False
    assert stopping["steps"] == 3
    run(recording, tmp_path / "cut", 8)
    whole, cut = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("whole", "cut"))
    assert all(torch.equal(whole["model"][name], cut["model"][name]) for name in whole["model"])
    assert all(torch.equal(whole["average"][name], cut["average"][name]) for name in whole["average"])


def test_both_forms_train_and_a_form_can_start_from_the_other(recording: Path, tmp_path: Path) -> None:
    run(recording, tmp_path / "causal", 3, memory=12)
    run(recording, tmp_path / "paper", 3, form="bidirectional", memory=12, start_from=None)
    assert read_card(tmp_path / "paper").config["form"] == "bidirectional"
    result = evaluate("sttn", recording, weights=tmp_path / "paper", device="cpu")
    assert "warm" not in result
    # YAML reads 1e-3 as a word.
    run(
        recording,
        tmp_path / "next",
        3,
        learning_rate="1e-3",
        form="bidirectional",
        memory=12,
        start_from=str(tmp_path / "causal"),
    )
    assert read_card(tmp_path / "next").training["start_from"] == str(tmp_path / "causal")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
        ({"width": 7}, "width 7 is not a multiple"),
        ({"learning_rate": "fast"}, "learning_rate='fast'"),
        ({"graph": "guessed"}, "graph='guessed'"),
        ({"form": "bidirectional"}, "memory is 4: at least 12"),
    ],
)
def test_wrong_options_are_named(recording: Path, tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(recording, tmp_path, 1, **options)


def test_weights_for_other_sensors_are_refused(recording: Path) -> None:
    with pytest.raises(InputError, match="207 sensors of metr-la"):
        evaluate("sttn", recording, weights="sttn-metr-la", device="cpu")
    with pytest.raises(InputError, match="takes no --weights"):
        evaluate("ridge", recording, weights="sttn-metr-la", device="cpu")


def test_splits_are_those_of_dcrnn() -> None:
    """34,272 frames: 23,974 training windows, 3,425 for validation, 6,850 for test (DCRNN's published counts)."""

    class Recording:
        name, step_s = "metr-la", 300
        values = np.ones((34272, 1), dtype=np.float32)
        times_ns = np.arange(34272) * 300_000_000_000

    splits = TrafficTensors.of(Recording()).splits  # type: ignore[arg-type]
    assert [splits[n].last - splits[n].first for n in ("train", "validation", "test")] == [23974, 3425, 6850]
    assert splits["test"].last + 12 == 34272


def test_errors_are_masked_means(recording: Path) -> None:
    forecast = torch.tensor([[[1.0, 2.0]], [[3.0, 100.0]]])
    truth = torch.tensor([[[2.0, 0.0]], [[6.0, 7.0]]])
    observed = torch.tensor([[[True, True]], [[True, False]]])
    errors = HorizonErrors(1)
    errors.add(forecast, truth, observed)
    metrics = errors.metrics(300, [1])
    assert metrics["mae_5"] == pytest.approx((1 + 2 + 3) / 3)
    assert metrics["rmse_5"] == pytest.approx(np.sqrt((1 + 4 + 9) / 3))
    assert metrics["mape_5"] == pytest.approx((1 / 2 + 3 / 6) / 2)


def test_windows_do_not_cross_a_gap(recording: Path) -> None:
    data = TrafficTensors.of(open_recording(recording))
    ends = data.unbroken(0, HOURS, 11, 12)
    assert not np.isin(ends, np.arange(300 - 12, 300 + 11)).any()
    assert np.isin([300 - 13, 300 + 11], ends).all()


def test_warm_and_cold_agree_for_a_model_that_remembers_only_what_both_see(recording: Path) -> None:
    data = TrafficTensors.of(open_recording(recording))

    def last_value(x: dict[str, torch.Tensor]) -> torch.Tensor:
        return x["value"].unsqueeze(2).expand(-1, -1, 12, -1)

    cold = evaluate_cold(data, "test", last_value, 1, 12).metrics(3600, [3])
    warm = evaluate_warm(data, "test", last_value, 5, 12, chunk=7).metrics(3600, [3])
    assert cold == pytest.approx(warm)


@pytest.mark.skipif(not (DATA / "traffic").exists(), reason="the METR-LA recording is not here (../shared/data)")
def test_baselines_stand_where_they_should_on_metr_la() -> None:
    """The past helps most at 15 minutes and the calendar at 60; both together beat either."""
    data = TrafficTensors.of(open_recording(DATA / "traffic" / "metr_la.npz"))
    ridge = ridge_errors(data, "test", 12, 288, horizons_wanted=(3, 6, 12)).metrics(300, [3, 6, 12])
    assert [ridge[f"mae_{m}"] for m in (15, 30, 60)] == pytest.approx([3.27, 3.68, 4.02], abs=0.01)
    weekly = weekly_average_errors(data, "test", 12, 288).metrics(300, [3, 12])
    last = persistence_errors(data, "test", 12).metrics(300, [3, 12])
    assert ridge["mae_15"] < last["mae_15"] < weekly["mae_15"]
    assert ridge["mae_60"] < weekly["mae_60"] < last["mae_60"]
