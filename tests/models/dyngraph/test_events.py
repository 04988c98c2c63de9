"""Interactions as memories take them in: the compiled form against torch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_forms import START, copied, differences

from stepstream.models.dyngraph import events
from stepstream.models.dyngraph.base import GraphState
from stepstream.models.dyngraph.events import Ends, Interactions, arrange, clock_state, remember, ring_state

NODES = 9


def a_batch(size: int, features: int, generator: torch.Generator) -> Interactions:
    """Few nodes, few times and few features, so that there are ties, self loops, late ones and exact repeats."""
    ends = torch.randint(NODES, (2, size), generator=generator)
    times = START + torch.randint(0, 6, (size,), generator=generator).sort().values
    wide = torch.randint(0, 2, (size, features), generator=generator).float() if features else None
    if size > 1:  # the same again
        ends[:, 1], times[1] = ends[:, 0], times[0]
        if wide is not None:
            wide[1] = wide[0]
    return Interactions(ends[0], ends[1], times, wide)


def columns(ends: Ends | None) -> dict[str, torch.Tensor | None]:
    if ends is None:
        return {}
    # Of a batch of one the torch form does not sort the two ends.
    order = torch.argsort(ends.node, stable=True)
    found = {"last": torch.argsort(order)[ends.last(torch.arange(len(order)))].sort().values}
    names = ("node", "other", "time_ns", "source", "features", "rank")
    return found | {name: None if getattr(ends, name) is None else getattr(ends, name)[order] for name in names}


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 999), st.sampled_from([0, 2]), st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_compiled_is_to_the_bit_what_torch_does(sizes: list[int], seed: int, features: int, ring: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    state: GraphState = clock_state(NODES, features, torch.device("cpu"))
    if ring:
        state |= ring_state(NODES, 3, features, torch.device("cpu"))
    plain = copied(state)
    for size in sizes:
        batch = a_batch(size, features, generator)
        found = arrange(state, batch)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(events, "_compiles", lambda *_: False)
            expected = arrange(plain, batch)
            if expected is not None:
                remember(plain, expected)
        one, other = columns(found), columns(expected)
        assert one.keys() == other.keys()
        for name, column in other.items():
            assert column is None or torch.equal(column, one[name]), name  # type: ignore[arg-type]
        if found is not None:
            remember(state, found)
        assert differences(state, plain) == []


@pytest.mark.parametrize("node", [-1, NODES])
def test_a_node_without_a_row_is_refused(node: int) -> None:
    state = clock_state(NODES, 0, torch.device("cpu"))
    batch = Interactions(torch.tensor([0, node]), torch.tensor([1, 2]), torch.tensor([START, START]))
    with pytest.raises(IndexError, match=rf"node {node} is out of range: 0 to 8"):
        arrange(state, batch)
