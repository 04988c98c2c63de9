"""What every layer with an unbounded memory is asked beside equality: rows, gradients, no drift."""

from __future__ import annotations

from typing import Any

import torch
from equality import TOLERANCE, assert_close, stepped
from torch import Tensor, nn

from stepstream.models.base import close_rows, copy_rows
from stepstream.models.continual.base import Layer


def awake(layer: Layer, seed: int = 0, scale: float = 0.5) -> Layer:
    """Every weight random, so that no path is silent."""
    torch.manual_seed(seed)
    for name, parameter in layer.named_parameters():
        if name.split(".")[-1] not in ("eigenvalues", "log_step"):
            nn.init.normal_(parameter, std=scale)
    return layer.eval()


def equal(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_rows(layer: Layer, x: Tensor) -> None:
    """Only the stepped and due rows change, to the bit; a copy is its own; a closed row is a fresh stream.

    x is [4, T, ...], T at least 6.
    """
    state = layer.initial_state(4)
    first = stepped(layer, x[:, :3], state)
    fresh, before = layer.initial_state(1), copy_rows(state, torch.arange(4))
    assert not equal(copy_rows(state, torch.tensor([1])), fresh)
    with torch.no_grad():
        layer.step(x[[3, 1], 3], state, torch.tensor([3, 1]))
        idle = torch.tensor([0, 2])
        assert equal(copy_rows(state, idle), copy_rows(before, idle))
        assert not equal(copy_rows(state, torch.tensor([1])), copy_rows(before, torch.tensor([1])))
        assert equal(before, copy_rows(before, torch.arange(4)))
        for rows in (None, torch.tensor([2, 0, 1, 3])):
            masked, plain = copy_rows(before, torch.arange(4)), copy_rows(before, torch.arange(4))
            due = torch.tensor([True, False, True, False])
            y, emits = layer.advance(x[:, 4], masked, rows, due)
            wanted, all_emit = layer.advance(x[:, 4], plain, rows)
            assert all_emit is None and emits is not None and torch.equal(emits, due)
            assert_close(y[due], wanted[due])
            order = torch.arange(4) if rows is None else rows
            assert equal(copy_rows(masked, order[due]), copy_rows(plain, order[due]))
            assert equal(copy_rows(masked, order[~due]), copy_rows(before, order[~due]))
            assert layer.step(x[:, 4], masked, rows).isfinite().all()
    close_rows(state, fresh, torch.tensor([1]))
    assert equal(copy_rows(state, torch.tensor([1])), fresh)
    assert_close(stepped(layer, x[1:2, :3], state, torch.tensor([1])), first[1:2])


def _nodes(y: Tensor) -> int:
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return len(seen)


def check_no_graph(layer: Layer, x: Tensor) -> None:
    """With grad mode on no step remembers the one before, and a gradient reaches through one step."""
    assert torch.is_grad_enabled()
    for rows in (None, torch.arange(x.shape[0])):
        state = layer.initial_state(x.shape[0])
        sizes = []
        for t in range(12):
            u = x[:, t].clone().requires_grad_()
            y = layer.step(u, state, rows)
            sizes.append(_nodes(y))
            assert all(not leaf.requires_grad and leaf.grad_fn is None for leaf in state.values())
            if t > 1:
                layer.zero_grad()
                y.square().sum().backward()
                assert u.grad is not None and u.grad.abs().sum() > 0
                assert all(p.grad is not None for p in layer.parameters())
        assert len(set(sizes[2:])) == 1 and sizes[0] > 1


def drift(layer: Layer, x: Tensor) -> None:
    """Float32 steps over a long stream against the float32 window, and against the float64 window, both at the end."""
    with torch.no_grad():
        found = stepped(layer, x)
        assert_close(found, layer(x))
        exact = layer.double()(x.double())
    layer.float()
    scale = max(1.0, float(exact.abs().max()))
    tail = x.shape[1] // 4
    errors = (found.double() - exact).abs()
    assert float(errors[:, -tail:].max()) <= 10 * TOLERANCE[torch.float32] * scale
