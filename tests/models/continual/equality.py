"""What every layer's test asks: stepping emits the window form's outputs, whoever else is in the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepstream.models.base import StreamModel
from stepstream.models.continual.base import Layer, outputs_after

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def stepped(layer: Layer, x: Tensor, state: Any = None, rows: Tensor | None = None) -> Tensor:
    """The outputs emitted while stepping through a window [B, T, ...]; every row must emit at the same steps."""
    state = layer.initial_state(x.shape[0]) if state is None else state
    outputs = []
    with torch.no_grad():
        for t in range(x.shape[1]):
            y, due = layer.advance(x[:, t], state, rows)
            if due is None or bool(due.all()):
                outputs.append(y.clone() if layer.upsampling > 1 else y.unsqueeze(1).clone())
            else:
                assert not due.any(), f"some rows emit and some don't at step {t}"
    return torch.cat(outputs, dim=1) if outputs else torch.empty(x.shape[0], 0)


def assert_close(found: Tensor, wanted: Tensor, tolerance: float | None = None) -> None:
    """Equal within 1e-5 (float32) or 1e-10 (float64) of the scale of what is wanted."""
    found, wanted = found.detach(), wanted.detach()
    assert found.shape == wanted.shape, f"{tuple(found.shape)} is not {tuple(wanted.shape)}"
    assert torch.isfinite(wanted).all() and torch.isfinite(found).all()
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    worst = float((found - wanted).abs().max()) if wanted.numel() else 0.0
    assert worst <= (tolerance or TOLERANCE[wanted.dtype]) * scale, f"differs by {worst:.3g}, scale {scale:.3g}"


def check_step_equals_window(layer: Layer, x: Tensor, tolerance: float | None = None) -> None:
    """Over the whole of x [B, T, ...]; T should be several receptive fields."""
    layer.eval()
    with torch.no_grad():
        wanted = layer(x)
    assert wanted.shape[1] == outputs_after(layer, x.shape[1]) > 0
    assert_close(stepped(layer, x), wanted, tolerance)


def check_ragged_clocks(layer: StreamModel, x: Tensor, seed: int = 0, tolerance: float | None = None) -> None:
    """Streams x [B, T, ...] that are stepped in random subsets, join late and leave, give what each gives alone."""
    layer.eval()
    streams, time = x.shape[:2]
    random = torch.Generator().manual_seed(seed)
    slots = torch.randperm(streams + 3, generator=random)[:streams]
    state = layer.initial_state(streams + 3)
    at = [0] * streams
    emitted: list[list[Tensor]] = [[] for _ in range(streams)]
    with torch.no_grad():
        alone = [layer(x[i : i + 1])[0] for i in range(streams)]
        while min(at) < time:
            chosen = [i for i in range(streams) if at[i] < time and torch.rand((), generator=random) < 0.6]
            if not chosen:
                continue
            inputs = torch.stack([x[i, at[i]] for i in chosen])
            y = layer.step(inputs, state, slots[chosen])
            for i, output in zip(chosen, y, strict=True):
                at[i] += 1
                if not output.isnan().all():
                    emitted[i].append(output)
    for found, wanted in zip(emitted, alone, strict=True):
        together = torch.cat(found) if getattr(layer, "upsampling", 1) > 1 else torch.stack(found)
        assert_close(together, wanted, tolerance)
