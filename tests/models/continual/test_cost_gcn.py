"""CoST-GCN: the step is the window form, the window form is ST-GCN's, written out in torch; the published sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_checks import (
    check_all,
    check_no_graph,
    measured_field,
    random_window,
    randomised,
)
from equality import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepstream.models.continual.cost_gcn import LAYOUT, LAYOUT_STRIDE_1, CoSTGCN, CoSTGCNBlock
from stepstream.models.continual.graph_conv import GraphConvolution

JOINTS = 5
ADJACENCY = torch.rand(3, JOINTS, JOINTS, generator=torch.Generator().manual_seed(3))


def small(**options: Any) -> CoSTGCN:
    arguments = {"persons": 2, "layout": ((6, 1), (6, 1), (8, 2)), "kernel": 5, "padding": 2, "pool": 4, **options}
    model = randomised(CoSTGCN(3, 4, ADJACENCY, **arguments))
    assert isinstance(model, CoSTGCN)
    return model


def a_norm(x: Tensor, norm: Any) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


def block_in_torch(block: Any, x: Tensor, stride: int, padding: int, shortcut: str) -> Tensor:
    """ST-GCN's block over a whole window [B, C, T, V] with both ends padded."""
    inner = block[0] if shortcut == "none" else block[0][0]
    graph = inner[0][0]
    partitions = graph.weight.unflatten(1, (3, -1)).unbind(1)
    edges = graph.adjacency * graph.importance
    z = sum(torch.einsum("oc,bctv,vw->botw", w, x, e) for w, e in zip(partitions, edges, strict=True))
    z = F.relu(a_norm(z + graph.bias[:, None, None], inner[0][1]))  # type: ignore[operator]
    z = a_norm(F.conv2d(z, inner[2].weight, inner[2].bias, (stride, 1), (padding, 0)), inner[3])
    crop = (inner[2].kernel - 1) // 2 - padding
    x = x[:, :, crop : x.shape[2] - crop]
    if shortcut == "projection":
        # With a crop, the projection stands behind it.
        conv, norm = block[0][1][1] if crop else block[0][1]
        x = a_norm(F.conv2d(x, conv.weight, conv.bias, (stride, 1)), norm)
    return F.relu(z if shortcut == "none" else z + x)


@pytest.mark.parametrize("shortcut", ["none", "identity", "projection"])
@pytest.mark.parametrize(("stride", "padding"), [(1, 4), (1, 0), (2, 4), (2, 1)])
def test_the_block_is_st_gcns(shortcut: str, stride: int, padding: int) -> None:
    if shortcut == "identity" and stride > 1:
        return
    out = 6 if shortcut == "identity" else 8
    block = CoSTGCNBlock(6, out, ADJACENCY, stride=stride, padding=padding, residual=shortcut != "none")
    randomised(block)
    x = random_window(2, 60, 6, JOINTS)
    with torch.no_grad():
        wanted = block_in_torch(block, x.transpose(1, 2), stride, padding, shortcut).transpose(1, 2)
        assert_close(block(x), wanted[:, : block(x).shape[1]])
    assert block.delay == 8 - padding
    block.bind((6, JOINTS))
    check_all(block, x)


@settings(max_examples=4, deadline=None)
@given(
    padding=st.sampled_from([0, 1, 2, "causal"]),
    graph_residual=st.booleans(),
    persons=st.integers(1, 2),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    double=st.booleans(),
)
def test_step_equals_window(
    padding: Any, graph_residual: bool, persons: int, strides: tuple[int, int], double: bool
) -> None:
    layout = ((4, 1), (4, strides[0]), (6, strides[1]))
    model = small(layout=layout, padding=padding, graph_residual=graph_residual, persons=persons, pool=3)
    model.to(torch.float64 if double else torch.float32)
    assert model.stride == strides[0] * strides[1]
    field = 1 + 4 + 4 + 4 * strides[0] + 2 * model.stride
    assert model.receptive_field == field
    x = random_window(2, 5 * field, 3, persons, JOINTS, dtype=torch.float64 if double else torch.float32)
    check_all(model, x)


def test_the_published_layouts() -> None:
    adjacency = torch.rand(3, 25, 25)
    strided = CoSTGCN(3, 60, adjacency, persons=2)
    assert [channels for channels, _ in LAYOUT] == [64] * 4 + [128] * 3 + [256] * 3
    assert (strided.stride, strided.receptive_field) == (4, 1 + 8 * (5 + 2 * 3 + 4 * 2) + 4 * 74)
    every_frame = CoSTGCN(3, 60, adjacency, persons=2, layout=LAYOUT_STRIDE_1, padding=0, pool=220)
    assert (every_frame.stride, every_frame.delay, every_frame.receptive_field) == (1, 80 + 219, 81 + 219)
    # ST-GCN's size for 60 classes: 3.1 million, for the graph's edges are counted per block.
    parameters = sum(parameter.numel() for parameter in every_frame.parameters())
    assert parameters == sum(parameter.numel() for parameter in strided.parameters())
    assert 3.0e6 < parameters < 3.2e6
    states = every_frame.eval().initial_state(1)
    with torch.no_grad():
        y, due = every_frame.advance(torch.randn(1, 3, 2, 25), states)
    assert y.shape == (1, 60)
    assert due is not None
    assert not due.any()


def test_receptive_field_is_what_brute_force_finds() -> None:
    model = small().double()
    assert measured_field(model, random_window(70, 3, 2, JOINTS, dtype=torch.float64)) == model.receptive_field


def test_the_model_is_made_from_lists_as_a_card_holds_them() -> None:
    model = CoSTGCN.from_card(
        {"config": {"in_channels": 3, "classes": 4, "adjacency": ADJACENCY.tolist(), "layout": [[4, 1]], "pool": 2}}
    )
    assert model.step(torch.randn(1, 3, 1, JOINTS), model.eval().initial_state(1)).shape == (1, 4)


@settings(max_examples=10, deadline=None)
@given(
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    partitions=st.integers(1, 3),
    persons=st.integers(1, 3),
    bias=st.booleans(),
    double=st.booleans(),
)
def test_graph_convolutions_of_any_size(
    channels: tuple[int, int], partitions: int, persons: int, bias: bool, double: bool
) -> None:
    dtype = torch.float64 if double else torch.float32
    layer = randomised(GraphConvolution(*channels, ADJACENCY[:partitions], bias), dtype=dtype)
    x = random_window(2, 8, channels[0], persons * JOINTS, dtype=dtype)
    check_all(layer, x)
    edges = (layer.adjacency * layer.importance).detach()
    weight = layer.weight.detach().unflatten(1, (partitions, -1))
    wanted = torch.einsum("opc,btcnv,pvw->btonw", weight, x.unflatten(3, (persons, JOINTS)), edges).flatten(3)
    with torch.no_grad():
        assert_close(layer(x), wanted if not bias else wanted + layer.bias[:, None])


def test_persons_do_not_mix_before_the_pool() -> None:
    layer = randomised(GraphConvolution(3, 4, ADJACENCY))
    x = random_window(2, 6, 3, 2 * JOINTS)
    with torch.no_grad():
        assert_close(layer(x)[..., :JOINTS], layer(x[..., :JOINTS]))
        assert_close(layer(x)[..., JOINTS:], layer(x[..., JOINTS:]))
    with pytest.raises(ValueError, match="multiple of 5 nodes"):
        layer.bind((3, 7))
    with pytest.raises(ValueError, match=r"\[partitions, nodes, nodes\]"):
        GraphConvolution(3, 4, ADJACENCY[0])


def test_gradients() -> None:
    layer = GraphConvolution(2, 2, ADJACENCY).double()
    assert torch.autograd.gradcheck(layer, (random_window(1, 2, 2, JOINTS).double().requires_grad_(),), fast_mode=True)
    check_no_graph(small(), random_window(2, 9, 3, 2, JOINTS))
