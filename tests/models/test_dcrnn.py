"""DCRNN: step equals window, the published diffusion, sensors without roads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import traffic_forms as forms
from tests.models.traffic_forms import SENSORS, at, frames

from stepstream.models.base import state_bytes_per_stream
from stepstream.models.dcrnn import DCRNN, DCRNNConfig, DiffusionGRU, diffusion_matrices, random_walks
from stepstream.models.weights import Card, save_weights

SMALL = DCRNNConfig(SENSORS, horizons=4, layers=2, width=8, embedding=6, max_age=7, slots_per_day=24)
ROW, COLUMN, WEIGHT = np.array([0, 1, 1, 2]), np.array([1, 2, 0, 0]), np.array([0.5, 1.0, 0.25, 0.2])
"""Edges among the first three of five sensors; the others have none."""


def a_model(config: DCRNNConfig = SMALL, dtype: torch.dtype = torch.float32) -> DCRNN:
    torch.manual_seed(0)
    walks = diffusion_matrices(config.sensors, ROW, COLUMN, WEIGHT, config.hops) if config.graph == "given" else None
    model = DCRNN(config, walks, mean=50, std=10)
    forms.with_random_weights(model, dtype)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_step_equals_window_over_520_steps(dtype: torch.dtype, tolerance: float) -> None:
    forms.step_equals_window(a_model(dtype=dtype), frames(2, 520, dtype), tolerance)


@settings(max_examples=10, deadline=None)
@given(
    layers=st.integers(1, 3),
    hops=st.integers(1, 3),
    width=st.integers(1, 5),
    max_age=st.integers(1, 6),
    time=st.integers(1, 30),
    graph=st.sampled_from(["given", "learned"]),
)
def test_step_equals_window_for_any_sizes(
    layers: int, hops: int, width: int, max_age: int, time: int, graph: Literal["given", "learned"]
) -> None:
    config = DCRNNConfig(SENSORS, 3, width, 4, max_age, 24, layers=layers, hops=hops, graph=graph)
    model, window = a_model(config, torch.float64), frames(2, time, torch.float64)
    expected, state = model(window), model.initial_state(2)
    for t in range(time):
        torch.testing.assert_close(model.step(at(window, t), state), expected[:, t], rtol=1e-10, atol=1e-8)


def test_rows_run_on_their_own_clocks() -> None:
    forms.rows_run_on_their_own_clocks(a_model(dtype=torch.float64))


def test_other_rows_keep_their_bits_and_a_closed_row_is_fresh() -> None:
    forms.other_rows_keep_their_bits(a_model())


def test_what_was_not_observed_does_not_matter() -> None:
    forms.what_was_not_observed_does_not_matter(a_model())


def test_a_forecast_depends_on_all_frames_before_it_and_none_after() -> None:
    model = a_model(dtype=torch.float64)
    assert model.receptive_field is None
    assert forms.depends_on(model, 30, 19) == list(range(20))


def test_the_last_value_is_kept_until_it_is_too_old() -> None:
    """With a silent hidden state, what is forecast is the last value, and the mean once that is lost."""
    model = a_model()
    torch.nn.init.zeros_(model.head_out.weight)
    torch.nn.init.zeros_(model.head_out.bias)
    window = frames(1, 12)
    window["observed"][:] = False
    window["observed"][0, 2, 3] = True
    value = float(window["value"][0, 2, 3])
    expected = [50.0] * 2 + [value] * SMALL.max_age + [50.0] * 3
    torch.testing.assert_close(model(window)[0, :, 0, 3], torch.tensor(expected))
    torch.testing.assert_close(model(window)[0, :, 3, 1], torch.full((12,), 50.0))
    state = model.initial_state(1)
    ages = []
    for t in range(12):
        model.step(at(window, t), state)
        ages.append(int(state["age"][0, 3]))
    assert ages == [7, 7, 0, 1, 2, 3, 4, 5, 6, 7, 7, 7]


def test_walks_are_powers_of_the_two_random_walks() -> None:
    forward, forward2, backward, backward2 = diffusion_matrices(SENSORS, ROW, COLUMN, WEIGHT, 2).double()
    weight = np.zeros((SENSORS, SENSORS))
    weight[ROW, COLUMN] = WEIGHT
    for i in range(SENSORS):
        out_degree, in_degree = weight[i].sum(), weight[:, i].sum()
        np.testing.assert_allclose(forward[i], weight[i] / (out_degree or 1), atol=1e-7)
        np.testing.assert_allclose(backward[i], weight[:, i] / (in_degree or 1), atol=1e-7)
    torch.testing.assert_close(forward2, forward @ forward, rtol=0, atol=1e-6)
    torch.testing.assert_close(backward2, backward @ backward, rtol=0, atol=1e-6)
    assert (forward[3:] == 0).all() and (backward[3:] == 0).all()


def test_a_cell_is_the_gated_diffusion_of_its_docstring() -> None:
    torch.manual_seed(0)
    width, hops = 3, 2
    weight = torch.rand(SENSORS, SENSORS, dtype=torch.float64) * (torch.rand(SENSORS, SENSORS) > 0.4)
    forward, backward = weight / weight.sum(1, keepdim=True), weight.T / weight.sum(0)[:, None]
    assert torch.isfinite(forward).all() and torch.isfinite(backward).all()
    cell = DiffusionGRU(width, 2 * hops + 1).double()
    theta = cell.hidden.weight.view(3 * width, 2 * hops + 1, width).permute(1, 2, 0)  # [terms, in, out]
    hidden = torch.randn(2, SENSORS, width, dtype=torch.float64)
    drive = torch.randn(2, SENSORS, 3 * width, dtype=torch.float64)
    steps = [torch.eye(SENSORS, dtype=torch.float64), forward, forward @ forward, backward, backward @ backward]
    for b in range(2):
        z = torch.stack([step @ hidden[b] @ matrix for step, matrix in zip(steps, theta, strict=True)]).sum(0)
        reset = torch.sigmoid(drive[b, :, :3] + z[:, :3])
        update = torch.sigmoid(drive[b, :, 3:6] + z[:, 3:6])
        candidate = torch.tanh(drive[b, :, 6:] + reset * z[:, 6:])
        expected = update * hidden[b] + (1 - update) * candidate
        walks = random_walks(weight, hops).flatten(0, 1)
        torch.testing.assert_close(cell(drive, hidden, walks)[b], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("graph", ["given", "learned"])
def test_sensors_without_roads_stay_finite_in_outputs_and_gradients(graph: Literal["given", "learned"]) -> None:
    model = a_model(DCRNNConfig(**{**vars(SMALL), "graph": graph})).train().requires_grad_(True)
    output = model(frames(2, 30))
    assert torch.isfinite(output).all()
    output.abs().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_a_sensor_without_roads_is_no_one_elses_concern() -> None:
    """What stands on sensor 4, which no road touches, changes its own forecast and no other."""
    model, window = a_model(), frames(1, 30)
    other = {**window, "value": window["value"].clone()}
    other["value"][..., 4] += 5
    difference = (model(window) - model(other)).abs().amax((0, 1, 2))
    assert difference[4] > 0 and (difference[:4] == 0).all()


def test_step_compiles_without_a_graph_break() -> None:
    model = a_model()
    window, state, plain = frames(2, 3), model.initial_state(2), model.initial_state(2)
    compiled = torch.compile(model.step, fullgraph=True, backend="eager")
    for t in range(3):
        torch.testing.assert_close(compiled(at(window, t), state), model.step(at(window, t), plain))


def test_a_saved_stream_goes_on_in_another_process(tmp_path: Path) -> None:
    model = a_model()
    card = Card(model="dcrnn", task="traffic", config=vars(SMALL).copy(), sensors=tuple("abcde"), step_s=3600)
    save_weights(model, tmp_path / "weights", card)
    forms.goes_on_in_another_process("dcrnn", model, tmp_path)


def test_state_size_is_known_before_the_run() -> None:
    hidden, last, age = 2 * SENSORS * 8 * 4, SENSORS * 4, SENSORS * 8
    assert state_bytes_per_stream(a_model().initial_state(7)) == hidden + last + age


@pytest.mark.parametrize("field", ["layers", "hops", "width", "sensors", "max_age"])
def test_impossible_sizes_are_named(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is 0"):
        DCRNNConfig(**{**vars(SMALL), field: 0})


def test_walks_of_another_network_are_refused() -> None:
    with pytest.raises(ValueError, match=r"walks have shape \(4, 3, 3\)"):
        DCRNN(SMALL, torch.zeros(4, 3, 3))
