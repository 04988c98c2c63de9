"""Cells of torch-geometric-temporal as stream models: equal to the raw cell, and as free as any other model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.models import traffic_forms as forms
from tests.models.traffic_forms import SENSORS, frames
from torch import Tensor

from stepstream.models import graph_cells
from stepstream.models.graph_cells import CELLS, GraphCellConfig, GraphCellModel, cell_class, cell_edges
from stepstream.models.registry import load_model
from stepstream.models.weights import Card, WeightsError, save_weights

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_geometric_temporal") is None,
    reason="torch-geometric-temporal is not installed: pip install stepstream[graph]",
)

ROW, COLUMN, WEIGHT = np.array([0, 1, 1, 2, 3]), np.array([1, 2, 0, 0, 1]), np.array([0.5, 1.0, 0.25, 0.2, 0.7])
"""No edge leads to sensor 3; sensor 4 has none at all."""


def a_config(cell: str, **options: Any) -> GraphCellConfig:
    edges = cell_edges(SENSORS, ROW, COLUMN, WEIGHT)[0].shape[1]
    options = options or ({"periods": 3} if cell == "A3TGCN" else {})
    return GraphCellConfig(
        SENSORS,
        horizons=4,
        width=6,
        embedding=5,
        max_age=7,
        slots_per_day=24,
        cell=cell,
        options=options,
        edges=edges,
    )


def a_model(cell: str, dtype: torch.dtype = torch.float32, **options: Any) -> GraphCellModel:
    torch.manual_seed(0)
    model = GraphCellModel(a_config(cell, **options), cell_edges(SENSORS, ROW, COLUMN, WEIGHT), mean=50, std=10)
    forms.with_random_weights(model, dtype)
    return model


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_step_equals_window(cell: str, dtype: torch.dtype, tolerance: float) -> None:
    forms.step_equals_window(a_model(cell, dtype), frames(2, 60, dtype), tolerance)


@pytest.mark.parametrize("cell", CELLS)
def test_other_rows_keep_their_bits_and_a_closed_row_is_fresh(cell: str) -> None:
    forms.other_rows_keep_their_bits(a_model(cell))
    forms.what_was_not_observed_does_not_matter(a_model(cell))


@pytest.mark.parametrize("cell", CELLS)
def test_the_model_is_the_raw_cell_unrolled(cell: str) -> None:
    """The cell itself over one stream, in float32: what stands around it is spelled out here once more."""
    model, window = a_model(cell), frames(1, 25)
    window["observed"][:] = True
    value = (window["value"][0] - 50) / 10
    when = model.slot_of_day[window["slot_of_day"][0]] + model.day_of_week[window["day_of_week"][0]]
    place = model.sensor + when[:, None] * (1 + model.sensor_by_time)
    features = torch.stack([value, torch.ones_like(value), value, torch.zeros_like(value)], dim=-1)
    tokens = F.gelu(model.embed(torch.cat([features, place], -1)), approximate="tanh")
    raw, edges = model.cell, (model.edge_index, model.edge_weight)
    states: tuple[Tensor, ...] = ()
    expected = []
    for t in range(25):
        if cell == "A3TGCN":
            past = F.pad(tokens[: t + 1], (0, 0, 0, 0, 2, 0))[-3:]
            hidden = raw(past.permute(1, 2, 0), *edges)
        else:
            output = raw(tokens[t], *edges, *states)
            states = output if isinstance(output, tuple) else (output,)
            hidden = states[0]
        read = F.gelu(model.head(torch.cat([hidden, place[t]], -1)), approximate="tanh")
        expected.append((model.head_out(read).T + value[t]) * 10 + 50)
    torch.testing.assert_close(model(window)[0], torch.stack(expected), rtol=1e-5, atol=1e-4)
    assert type(raw) is cell_class(cell)


@pytest.mark.parametrize("cell", CELLS)
def test_a_sensor_that_no_edge_leads_to_stays_finite_in_outputs_and_gradients(cell: str) -> None:
    model = a_model(cell).train().requires_grad_(True)
    output = model(frames(2, 20))
    assert torch.isfinite(output).all()
    output.abs().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_without_our_loops_the_raw_diffusion_is_not_finite() -> None:
    """The reason for the loops: should the library mend it, they can go."""
    model = a_model("DCRNN")
    raw = torch.from_numpy(np.stack([ROW, COLUMN])), torch.from_numpy(WEIGHT).float()
    x = torch.randn(SENSORS, 6)
    assert not torch.isfinite(model.cell(x, *raw)).all()
    assert torch.isfinite(model.cell(x, model.edge_index, model.edge_weight)).all()


def test_edges_are_made_bearable() -> None:
    index, weight = cell_edges(4, np.array([0, 0, 2, 1]), np.array([1, 1, 1, 0]), np.array([0.5, 0.7, 0.0, 0.2]))
    # One edge twice (the last counts), one of weight 0 (it goes); 2 and 3 are alone (they get loops).
    assert index.tolist() == [[1, 0, 2, 3], [0, 1, 2, 3]]
    torch.testing.assert_close(weight, torch.tensor([0.2, 0.7, 1.0, 1.0]))
    for wrong in (-1.0, np.nan):
        with pytest.raises(ValueError, match="negative or not finite"):
            cell_edges(2, np.array([0]), np.array([1]), np.array([wrong]))


def test_only_a3tgcn_forgets() -> None:
    model = a_model("A3TGCN", torch.float64)
    assert model.receptive_field == 3 - 1 + 7
    assert forms.depends_on(model, 30, 19) == [17, 18, 19]  # all observed: no value of the past is filled in
    window = frames(1, 40, torch.float64)
    window["observed"][:] = True
    window["observed"][:, 21:28] = False  # the last value, of frame 20, is still known at frame 26
    for t, depends in ((28, True), (29, False)):
        other = {**window, "value": window["value"].clone()}
        other["value"][:, 20] += 1
        assert bool((model(window)[:, t] != model(other)[:, t]).any()) is depends, t
    assert a_model("TGCN").receptive_field is None
    assert forms.depends_on(a_model("TGCN", torch.float64), 30, 19) == list(range(20))


def write(folder: Path, cell: str = "GConvLSTM", **options: Any) -> GraphCellModel:
    model = a_model(cell, **options)
    config = vars(model.config).copy()
    card = Card(model="graph-cell", task="traffic", config=config, sensors=tuple("abcde"), step_s=3600)
    save_weights(model, folder, card)
    return model


def test_a_saved_stream_goes_on_in_another_process(tmp_path: Path) -> None:
    forms.goes_on_in_another_process("graph-cell", write(tmp_path / "weights"), tmp_path)


def test_weights_bring_the_graph_with_them(tmp_path: Path) -> None:
    model = write(tmp_path, "GConvGRU", K=3)
    loaded = load_model("graph-cell", tmp_path).model
    assert torch.equal(loaded(frames(1, 9)), model(frames(1, 9)))


@pytest.mark.parametrize(
    ("cell", "options", "message"),
    [
        ("GConvGRU", {"k": 3}, "has no option 'k'; known are K, normalization, bias"),
        ("TGCN", {"cached": True}, "has no option 'cached'"),
        ("GConvGRU", {"normalization": "rw"}, "'sym' was expected"),
        ("GConvGRU", {"K": 0}, "GConvGRU cannot be built with {'K': 0}"),
        ("EvolveGCNH", {}, "cell 'EvolveGCNH' is not known: A3TGCN, DCRNN"),
    ],
)
def test_impossible_cells_are_named(cell: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a_model(cell, **options)


def test_without_the_library_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.setattr(graph_cells.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"^graph cells need .* pip install stepstream\[graph\]$"):
        load_model("graph-cell", tmp_path)
