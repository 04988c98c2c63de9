"""A spiking network for event frames, trained with SLTT: memory that does not grow with time.

Meng, Xiao, Yan, Wang, Lin, Luo, "Towards Memory- and Time-Efficient Backpropagation for Training Spiking Neural
Networks", ICCV 2023, https://arxiv.org/abs/2302.14311
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.base import StreamModel, Tree

__all__ = ["SpikingNet", "draw_steps", "sltt_backward"]

THRESHOLD = 1.0


class _Spike(torch.autograd.Function):
    """1 where the potential reaches the threshold; its gradient is a triangle one threshold wide to both sides."""

    @staticmethod
    def forward(ctx: Any, potential: Tensor) -> Tensor:
        ctx.save_for_backward(potential)
        return (potential >= THRESHOLD).to(potential.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (potential,) = ctx.saved_tensors
        return gradients[0] * (1 - (potential - THRESHOLD).abs()).clamp(min=0)


class _Convolution(nn.Conv2d):
    """A convolution of weights that are standardised and scaled: what normalises without looking at other inputs.

    Brock, De, Smith, "Characterizing signal propagation to close the performance gap in unnormalized ResNets", ICLR
    2021, https://arxiv.org/abs/2101.08692, as SLTT uses it for large networks.
    """

    def __init__(self, inputs: int, outputs: int, gain: float) -> None:
        super().__init__(inputs, outputs, 3, stride=2, padding=1)
        self.gain = nn.Parameter(torch.full((outputs, 1, 1, 1), gain))

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        fan_in = weight[0].numel()
        mean = weight.mean((1, 2, 3), keepdim=True)
        variance = weight.var((1, 2, 3), keepdim=True, correction=0)
        scale = self.gain * torch.rsqrt(variance * fan_in + 1e-4)
        return F.conv2d(input, (weight - mean) * scale, self.bias, self.stride, self.padding)


class SpikingNet(StreamModel):
    """Event frames -> what is going on: convolutions of stride 2, each followed by leaky integrate-and-fire neurons.

    Frames: float [B, T, C, H, W] of counts, as `accumulate` makes them (log(1 + count) goes in). Output: [B, T,
    classes], the logits of the read-out so far: a linear layer on the last spikes, averaged over time with weights that
    fall by `memory` a frame, so that the newest frames count most and the first ones are not drowned by zeros.

    A neuron (equation 1 of the paper): u_t = leak v_{t-1} + input, s_t = 1 if u_t >= 1, v_t = u_t - s_t. State of a
    stream: {"potential": {"0": [S, C, H, W], ...}, "readout": [S, classes], "weight": [S]}; `forward` is the steps
    unrolled from a fresh state, equal to the bit where the same kernels run, else to 1e-5 as long as no potential lies
    that close to its threshold. Raises ValueError for sizes that do not fit.
    """

    task: ClassVar[str] = "events"

    receptive_field: int | None = None

    def __init__(
        self,
        classes: int,
        size: Sequence[int],
        channels: int = 2,
        widths: Sequence[int] = (24, 48, 96),
        leak: float = 0.5,
        memory: float = 0.95,
        gain: float = 3.0,
    ) -> None:
        super().__init__()
        if classes < 2 or len(size) != 2 or min(*size, channels, *widths) < 1 or not widths:
            raise ValueError(f"classes {classes}, size {list(size)}, widths {list(widths)}: expected sizes above 0")
        if not 0 <= leak < 1 or not 0 < memory <= 1:
            raise ValueError(f"leak {leak}, memory {memory}: expected 0 <= leak < 1 and 0 < memory <= 1")
        self.classes, self.leak, self.memory = classes, leak, memory
        sides, shapes = tuple(size), []
        for width in widths:
            sides = ((sides[0] + 1) // 2, (sides[1] + 1) // 2)
            shapes.append((width, *sides))
        self._shapes = tuple(shapes)
        inputs = (channels, *widths)
        self.convolutions = nn.ModuleList(_Convolution(a, b, gain) for a, b in zip(inputs, widths, strict=False))
        self.readout = nn.Linear(widths[-1] * sides[0] * sides[1], classes)

    def advance(self, x: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """Frames [B, C, H, W] and the state of B streams -> the read-out of these frames alone, and the next state.

        Nothing is detached: a gradient goes as far back as `state` has one.
        """
        spikes, potentials = torch.log1p(x), {}
        for name, convolution in enumerate(self.convolutions):
            potential = self.leak * state["potential"][str(name)] + convolution(spikes)
            spikes = _Spike.apply(potential)
            potentials[str(name)] = potential - THRESHOLD * spikes
        logits = self.readout(spikes.flatten(1))
        weight = self.memory * state["weight"] + 1
        readout = self.memory * state["readout"] + logits
        return logits, {"potential": potentials, "readout": readout, "weight": weight}

    @staticmethod
    def decision(state: Tree) -> Tensor:
        """The logits of the read-out so far: [B, classes]."""
        decision: Tensor = state["readout"] / state["weight"][:, None]
        return decision

    def forward(self, window: Tensor) -> Tensor:
        """[B, T, classes]: the steps from a fresh state, with all gradients through time."""
        state, out = self.initial_state(window.shape[0], window.device), []
        for x in window.unbind(1):
            _, state = self.advance(x, state)
            out.append(self.decision(state))
        return torch.stack(out, 1)

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """Neurons at rest, and nothing read out."""
        like = self.readout.weight

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(streams, *shape, dtype=like.dtype, device=device or like.device)

        potentials = {str(i): zeros(*shape) for i, shape in enumerate(self._shapes)}
        return {"potential": potentials, "readout": zeros(self.classes), "weight": zeros()}

    def step(self, x: Tensor, state: Tree, rows: Tensor | None = None) -> Tensor:
        """One frame for each stream in `rows` -> the logits so far [B, classes]."""
        before = state if rows is None else _each(state, lambda leaf: leaf.index_select(0, rows))
        _, after = self.advance(x, before)
        _put(state, after, rows)
        return self.decision(after)


def _each(tree: Tree, change: Callable[[Tensor], Tensor]) -> Tree:
    if isinstance(tree, Tensor):
        return change(tree)
    return {name: _each(leaf, change) for name, leaf in tree.items()}


def _put(state: Tree, new: Tree, rows: Tensor | None) -> None:
    if not isinstance(state, Tensor):
        for name, leaf in state.items():
            _put(leaf, new[name], rows)
    elif rows is None:
        state.copy_(new.detach())
    else:
        state.index_copy_(0, rows, new.detach())


def draw_steps(steps: int, chosen: int | None, generator: torch.Generator) -> list[bool]:
    """Which of T steps SLTT-K goes back through: K of them at random, all with None (SLTT)."""
    if chosen is None or chosen >= steps:
        return [True] * steps
    picked = torch.randperm(steps, generator=generator)[:chosen].tolist()
    return [step in picked for step in range(steps)]


def sltt_backward(
    model: SpikingNet,
    frames: Tensor,
    loss: Callable[[Tensor], Tensor],
    chosen: Sequence[bool] | None = None,
) -> tuple[float, Tensor]:
    """Adds SLTT's gradient of the mean loss over the steps of `frames` [B, T, C, H, W] to the parameters' `grad`.

    A gradient goes through space at one step and not through time (section 4.2: what goes through leak and reset is
    small, and left out), so each step is gone back through at once and forgotten: memory does not grow with T. `loss`
    takes the read-out of one step, [B, classes]. `chosen`: the steps to go back through (SLTT-K, section 4.3); the
    gradient is that of the mean over them. Returns the mean loss over the steps gone back through, and the logits
    after the last step.
    """
    steps = frames.shape[1]
    chosen = [True] * steps if chosen is None else chosen
    count, total = sum(chosen), 0.0
    if len(chosen) != steps or not count:
        raise ValueError(f"chosen: expected {steps} flags, at least one of them set, got {list(chosen)}")
    state = model.initial_state(frames.shape[0], frames.device)
    for x, back in zip(frames.unbind(1), chosen, strict=True):
        with torch.set_grad_enabled(back):
            logits, state = model.advance(x, state)
            if back:
                value = loss(logits) / count
                value.backward()
                total += float(value.detach())
        state = _each(state, Tensor.detach)
    return total, model.decision(state)
