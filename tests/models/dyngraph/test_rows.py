"""A node's row taken out of one state and put into another is the same to the bit, and so is what follows from it."""

from __future__ import annotations

import pytest
import torch
from tests.models.dyngraph.memory_forms import NAMES, a_model, a_stream, copied, differences, run

from stepstream.models.dyngraph.base import GraphModel
from stepstream.models.dyngraph.edgebank import EdgeBank
from stepstream.models.dyngraph.nat import NAT, NATConfig
from stepstream.models.dyngraph.rows import carried, forget_references, leaves_of, read_row, row_spec, write_row

CARRIED = ("nat", "tgn", "jodie")


def model_of(name: str) -> GraphModel:
    if name != "nat":
        return a_model(name)
    torch.manual_seed(0)
    return NAT(NATConfig(node=6, edge=3, first=5, second=4, hidden=8)).eval()


@pytest.mark.parametrize("name", CARRIED)
@torch.no_grad()
def test_rows_of_all_nodes_are_the_state(name: str) -> None:
    model, stream = model_of(name), a_stream(80)
    state = run(model, model.initial_state(30), stream, 7)  # type: ignore[arg-type]
    how = carried(model)
    assert how is not None
    other = model.initial_state(30)
    rows = {node: read_row(state, node, how) for node in range(30)}
    before = copied(state)
    for node, row in rows.items():
        spec = {leaf: (str(values.dtype), values.shape) for leaf, values in row.items()}
        assert spec == row_spec(model, how)
        write_row(other, node, row, how)
        row[next(iter(row))][...] = 1  # what was read is a copy, and what was written too
    assert differences(other, before) == differences(state, before) == []


@pytest.mark.parametrize("name", CARRIED)
@torch.no_grad()
def test_nobody_refers_to_who_is_gone(name: str) -> None:
    model, stream = model_of(name), a_stream(80)
    state = run(model, model.initial_state(30), stream, 7)  # type: ignore[arg-type]
    how = carried(model)
    assert how is not None
    before = copied(state)
    forget_references(state, list(range(10)), 29, how)
    for leaf, values in leaves_of(state):
        was = dict(leaves_of(before))[leaf]
        gone = was < 10 if leaf in how.references else torch.zeros_like(was, dtype=torch.bool)
        assert torch.equal(values, torch.where(gone, torch.full_like(was, 29), was)), leaf
    assert how.references == () or differences(state, before) != []


def test_models_whose_updates_reach_further_are_not_carried() -> None:
    refused = [a_model(name) for name in NAMES if name not in CARRIED]
    assert [carried(model) for model in refused] == [None] * len(refused) and len(refused) == 4
    assert carried(EdgeBank()) is None
