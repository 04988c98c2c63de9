"""What the tests of the convolutional layers share beside equality."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from equality import assert_close, check_ragged_clocks, check_step_equals_window
from torch import Tensor

from stepstream.models.base import close_rows, copy_rows
from stepstream.models.continual.base import Layer

compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile with inductor needs a C++ compiler")


def randomised(module: Any, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Random parameters and running statistics, none of them special, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    module.to(dtype).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(1, parameter[0].numel()) ** 0.5)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            if name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module


def random_window(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def leaves(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
        return
    for name in sorted(tree):
        yield from leaves(tree[name])


def clone(tree: Any) -> Any:
    return tree.clone() if isinstance(tree, Tensor) else {name: clone(part) for name, part in tree.items()}


def same_bits(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def check_all(layer: Layer, x: Tensor, tolerance: float | None = None) -> None:
    """x [B, T, ...]: equality, ragged clocks, and streams that come and go."""
    check_step_equals_window(layer, x, tolerance)
    check_ragged_clocks(layer, x[:, : x.shape[1] // 2 + 1], tolerance=tolerance)
    check_coming_and_going(layer, x, tolerance)


def check_coming_and_going(layer: Layer, x: Tensor, tolerance: float | None = None) -> None:
    """A slot is reset midway, one is copied to another, one rests: each goes on as its own stream would."""
    first, second = x[0], x[1]
    cut = x.shape[1] // 3
    with torch.no_grad():
        alone, late = layer(first[None])[0], layer(second[None])[0]
        state, rows = layer.initial_state(4), torch.tensor([2, 0])
        for t in range(cut):
            layer.advance(torch.stack([first[t], second[t]]), state, rows)
        resting = copy_rows(state, torch.tensor([0]))
        # Slot 2 moves to slot 3, and begins anew as the second stream.
        for leaf, old in zip(leaves(state), leaves(copy_rows(state, torch.tensor([2]))), strict=True):
            leaf[3] = old[0]
        close_rows(state, layer.initial_state(1), torch.tensor([2]))
        moved, begun = [], []
        for t in range(cut, x.shape[1]):
            inputs, emitted = torch.stack([first[t], second[t - cut]]), (moved, begun)
            y, due = layer.advance(inputs, state, torch.tensor([3, 2]))
            for i, outputs in enumerate(emitted):
                if due is None or due[i]:
                    outputs.append(y[i] if layer.upsampling > 1 else y[i : i + 1])
        assert same_bits(resting, copy_rows(state, torch.tensor([0])))
    found, begun_outputs = torch.cat(moved), torch.cat(begun)
    assert_close(found, alone[alone.shape[0] - found.shape[0] :], tolerance)
    assert_close(begun_outputs, late[: begun_outputs.shape[0]], tolerance)


def measured_field(layer: Layer, x: Tensor) -> int:
    """How far back from the input that emits an output, the newest counted, an input can change it; x [T, ...]."""
    time = x.shape[0]
    perturbed = x.repeat(time, *[1] * x.dim())
    for t in range(time):
        perturbed[t, t] += 1 + x[t].abs()
    with torch.no_grad():
        changed = (layer(perturbed) - layer(x[None])).flatten(2).abs().amax(-1) > 1e-9
    emitted_at = layer.delay + torch.arange(changed.shape[1]) // layer.upsampling * layer.stride
    back = emitted_at - torch.arange(time)[:, None] + 1
    assert not (changed & (back < 1)).any(), "an output depends on an input that has not come"
    return int(back[changed].max())


def check_compiled(layer: Layer, x: Tensor) -> None:
    """What inductor makes of a step gives the eager step's outputs and states, with and without rows; x [B, T, ...]."""
    torch._dynamo.reset()
    compiled = torch.compile(layer.advance, fullgraph=True)
    with torch.no_grad():
        for rows in (torch.arange(x.shape[0]).flip(0), None):
            a, b = (layer.initial_state(x.shape[0]) for _ in range(2))
            for t in range(x.shape[1]):
                (y, due), (wanted, wanted_due) = compiled(x[:, t], a, rows), layer.advance(x[:, t], b, rows)
                assert (due is None) == (wanted_due is None)
                assert due is None or torch.equal(due, wanted_due)
                torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
            for found, leaf in zip(leaves(a), leaves(b), strict=True):
                torch.testing.assert_close(found, leaf, atol=1e-5, rtol=1e-5)


def check_no_graph(layer: Layer, x: Tensor) -> None:
    """With gradients on, a step has a gradient to its input and weights, and none through the stream; x [B, T, ...]."""
    layer.requires_grad_(True)
    state = layer.initial_state(x.shape[0])
    for t in range(x.shape[1]):
        y, _ = layer.advance(x[:, t].requires_grad_(), state)
        assert not any(leaf.requires_grad for leaf in leaves(state))
    if y.requires_grad:
        y.sum().backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in layer.parameters())
