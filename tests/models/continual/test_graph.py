"""Graphs of any pattern step as their window form, and see no further back than they say."""

from __future__ import annotations

import torch
from conv_checks import check_all, measured_field, random_window, randomised
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from stepstream.models.continual.base import NotSteppable
from stepstream.models.continual.containers import Pointwise
from stepstream.models.continual.conv import Conv1d
from stepstream.models.continual.graph import Graph, Node

WIDTH = 2


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Layers and merges of any values before them; what is merged may have come at different times."""
    nodes = [Node("first", ("",), Conv1d(WIDTH, WIDTH, draw(st.integers(1, 3))))]
    for i in range(draw(st.integers(1, 6))):
        values = ["", *(node.name for node in nodes)]
        kind = draw(st.sampled_from(["conv", "pointwise", "merge", "merge"]))
        if kind == "merge":
            inputs = draw(st.lists(st.sampled_from(values), min_size=2, max_size=3, unique=True))
            nodes.append(Node(f"n.{i}", tuple(inputs), merge=draw(st.sampled_from(["sum", "mul", "max"]))))
            continue
        kernel, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 2))
        padding = draw(st.sampled_from([0, "causal", dilation * (kernel - 1) // 2]))
        conv = Conv1d(WIDTH, WIDTH, kernel, draw(st.sampled_from([1, 1, 1, 2])), padding, dilation)
        nodes.append(Node(f"n.{i}", (draw(st.sampled_from(values)),), conv if kind == "conv" else Pointwise(nn.Tanh())))
    nodes.append(Node("all", tuple(draw(st.permutations([nodes[-1].name, nodes[0].name]))), merge="concat"))
    assume(nodes[-1].inputs[0] != nodes[-1].inputs[1])
    try:
        return Graph(nodes)
    except NotSteppable:
        assume(False)
        raise


@settings(max_examples=20, deadline=None)
@given(graph=graphs(), double=st.booleans())
def test_any_graph_steps_as_its_window_form(graph: Graph, double: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    field = graph.receptive_field
    assert field is not None and graph.bind((WIDTH,)) == (2 * WIDTH,)
    layer = randomised(graph, dtype=dtype)
    check_all(layer, random_window(2, 5 * field + 3 * graph.stride + graph.delay, WIDTH, dtype=dtype))


@settings(max_examples=15, deadline=None)
@given(graph=graphs())
def test_no_graph_sees_further_back_than_it_says(graph: Graph) -> None:
    layer, field = randomised(graph, dtype=torch.float64), graph.receptive_field
    assert field is not None
    x = random_window(2 * field + 2 * graph.stride + graph.delay, WIDTH, dtype=torch.float64)
    # A maximum, or the zeros of a product, may hide inputs; nothing may add any.
    hides = any(merge in ("mul", "max") for _, _, merge, has_layer in graph.nodes if not has_layer)
    measured = measured_field(layer, x)
    assert measured <= field if hides else measured == field
