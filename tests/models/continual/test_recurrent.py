"""GRU and LSTM: torch's modules over a window, their equations, and one cell update a step."""

from __future__ import annotations

import pytest
import torch
from equality import assert_close, check_ragged_clocks, check_step_equals_window
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent_checks import awake, check_no_graph, check_rows
from torch import Tensor, nn

from stepstream.models.base import state_bytes_per_stream
from stepstream.models.continual.base import NotSteppable
from stepstream.models.continual.recurrent import GRU, LSTM

KINDS = [(GRU, {}), (GRU, {"num_layers": 2, "bias": False}), (LSTM, {}), (LSTM, {"num_layers": 3, "proj_size": 2})]


def inputs(batch: int, time: int, features: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(batch, time, features, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from([GRU, LSTM]),
    features=st.integers(1, 4),
    hidden=st.integers(2, 6),
    layers=st.integers(1, 3),
    bias=st.booleans(),
    projected=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_step_equals_window_on_any_clocks(
    kind: type, features: int, hidden: int, layers: int, bias: bool, projected: bool, seed: int
) -> None:
    projection = {"proj_size": hidden - 1} if projected and kind is LSTM else {}
    layer = awake(kind(features, hidden, layers, bias, **projection).double(), seed)
    x = inputs(3, 20, features, torch.float64, seed)
    check_step_equals_window(layer, x)
    check_ragged_clocks(layer, x, seed)
    assert layer.bind((features,)) == (layer(x).shape[-1],)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_long_streams_in_float32(kind: type, options: dict) -> None:
    check_step_equals_window(awake(kind(5, 7, **options)), inputs(2, 620, 5))


@pytest.mark.parametrize("options", [{}, {"num_layers": 3, "bias": False}, {"num_layers": 2, "proj_size": 3}])
@pytest.mark.parametrize("kind", [GRU, LSTM])
def test_is_torchs_module(kind: type, options: dict) -> None:
    if kind is GRU and "proj_size" in options:
        with pytest.raises(ValueError, match="projections"):
            GRU(4, 6, **options)
        return
    torch.manual_seed(0)
    module = getattr(nn, kind.__name__)(4, 6, batch_first=True, **options)
    layer = kind(4, 6, **options)
    assert list(layer.state_dict()) == list(module.state_dict())
    layer.load_state_dict(module.state_dict())
    x = inputs(3, 30, 4)
    for same in (layer, kind.from_torch(module)):
        assert torch.equal(same(x), module(x)[0])
        check_step_equals_window(same, x)
    doubled = kind.from_torch(module.double().eval())
    assert not doubled.training and doubled.initial_state(2)["hidden"].dtype == torch.float64


def test_equals_a_loop_over_the_equations() -> None:
    s = torch.sigmoid
    gru, lstm = awake(GRU(3, 4).double()), awake(LSTM(3, 4, proj_size=2).double())
    x = inputs(1, 40, 3, torch.float64)
    with torch.no_grad():
        w, u = gru.weight_ih_l0.split(4), gru.weight_hh_l0.split(4)
        b, c = gru.bias_ih_l0.split(4), gru.bias_hh_l0.split(4)
        h, wanted = torch.zeros(4, dtype=torch.float64), []
        for v in x[0]:
            r, z = (s(w[i] @ v + b[i] + u[i] @ h + c[i]) for i in (0, 1))
            n = torch.tanh(w[2] @ v + b[2] + r * (u[2] @ h + c[2]))
            h = (1 - z) * n + z * h
            wanted.append(h)
        assert_close(gru(x)[0], torch.stack(wanted))
        check_step_equals_window(gru, x)
        w, u = lstm.weight_ih_l0.split(4), lstm.weight_hh_l0.split(4)
        b, c = lstm.bias_ih_l0.split(4), lstm.bias_hh_l0.split(4)
        h, cell, wanted = torch.zeros(2, dtype=torch.float64), torch.zeros(4, dtype=torch.float64), []
        for v in x[0]:
            i, f, g, o = (w[k] @ v + b[k] + u[k] @ h + c[k] for k in range(4))
            cell = s(f) * cell + s(i) * torch.tanh(g)
            h = lstm.weight_hr_l0 @ (s(o) * torch.tanh(cell))
            wanted.append(h)
        assert_close(lstm(x)[0], torch.stack(wanted))
        check_step_equals_window(lstm, x)


def test_what_has_no_step_is_refused() -> None:
    for kind in (GRU, LSTM):
        with pytest.raises(NotSteppable, match="end of the stream"):
            kind(3, 4, bidirectional=True)
    with pytest.raises(NotSteppable, match="end of the stream"):
        GRU.from_torch(nn.GRU(3, 4, bidirectional=True))
    with pytest.raises(ValueError, match="no LSTM"):
        LSTM.from_torch(nn.GRU(3, 4))
    with pytest.raises(ValueError, match="proj_size"):
        LSTM(3, 4, proj_size=4)
    with pytest.raises(ValueError, match="at least 1"):
        GRU(0, 4)
    with pytest.raises(ValueError, match="was expected"):
        GRU(3, 4).bind((2,))


def test_dropout_is_the_windows_alone() -> None:
    torch.manual_seed(0)
    layer = GRU(3, 8, 2, dropout=0.5)
    x = inputs(2, 10, 3)
    assert not torch.equal(layer(x), layer(x))
    check_step_equals_window(layer, x)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_rows_gradients_and_memory(kind: type, options: dict) -> None:
    layer = awake(kind(3, 5, **options))
    check_rows(layer, inputs(4, 6, 3))
    check_no_graph(layer, inputs(2, 12, 3))
    layer.double()
    x = inputs(1, 3, 3, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    layers = options.get("num_layers", 1)
    wanted = layers * 8 * (5 if kind is GRU else 5 + options.get("proj_size", 5))
    assert state_bytes_per_stream(layer.initial_state(2)) == wanted
