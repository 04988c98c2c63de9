"""What the models of event frames are held to, whatever they are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepstream.models.base import StreamModel, close_rows, copy_rows


def frames(batch: int, steps: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Counts of two polarities, mostly zeros."""
    generator = torch.Generator().manual_seed(seed)
    return torch.poisson(torch.full((batch, steps, 2, *size), 0.3), generator=generator)


@torch.no_grad()
def check_steps(model: StreamModel, x: Tensor, tolerance: float) -> None:
    """Steps of many streams, each on its own clock, give at every frame what the window form gives."""
    model.eval()
    expected = model(x)
    streams, steps = x.shape[:2]
    state, at = model.initial_state(streams), [0] * streams
    generator = torch.Generator().manual_seed(1)
    while min(at) < steps:
        ready = [s for s in range(streams) if at[s] < steps]
        picked = [s for s in ready if torch.rand((), generator=generator) < 0.6] or ready[:1]
        rows = torch.tensor(picked)
        idle = torch.tensor([s for s in range(streams) if s not in picked], dtype=torch.int64)
        before = copy_rows(state, idle)
        y = model.step(torch.stack([x[s, at[s]] for s in picked]), state, rows)
        for i, s in enumerate(picked):
            torch.testing.assert_close(y[i], expected[s, at[s]], atol=tolerance, rtol=tolerance)
            at[s] += 1
        same(copy_rows(state, idle), before)


def same(a: Any, b: Any) -> None:
    """Two states, to the bit."""
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
        return
    assert a.keys() == b.keys()
    for name in a:
        same(a[name], b[name])


@torch.no_grad()
def check_snapshot(model: StreamModel, x: Tensor) -> None:
    """A stream that is moved to another row, or another process, goes on to the bit; a closed row is fresh."""
    model.eval()
    state = model.initial_state(1)
    for frame in x[:1].unbind(1):
        model.step(frame, state)
    saved = copy_rows(state, torch.tensor([0]))
    other = model.initial_state(3)
    close_rows(other, saved, torch.tensor([2]))
    rest = x[1:2].unbind(1)
    for frame in rest:
        here = model.step(frame, state)
        there = model.step(frame, other, torch.tensor([2]))
        assert torch.equal(here, there)
    close_rows(other, model.initial_state(1), torch.tensor([2]))
    same(copy_rows(other, torch.tensor([2])), model.initial_state(1))


@torch.no_grad()
def check_compiles(model: StreamModel, x: Tensor) -> None:
    """A step has no branch on data: it is one graph."""
    model.eval()
    rows = torch.tensor([1, 0])
    plain, compiled = model.initial_state(2), model.initial_state(2)
    step = torch.compile(model.step, fullgraph=True, backend="eager")
    for frame in x[:2, :3].unbind(1):
        torch.testing.assert_close(step(frame, compiled, rows), model.step(frame, plain, rows))
