"""Layers made of layers: one after the other, side by side, and any torch module that looks at one step at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from stepstream.models.base import Tree
from stepstream.models.continual.base import Layer, NotSteppable
from stepstream.models.continual.delay import Crop, Delay
from stepstream.models.continual.follower import Follower, follow, follower_memory

__all__ = ["Parallel", "Pointwise", "Reduce", "Residual", "Sequential", "reduced"]

Reduce: TypeAlias = Literal["sum", "concat", "mul", "max"]


class Pointwise(Follower):
    """A torch module that acts on each time step for itself: [N, features...] -> [N, features...], N any number.

    In a window, the steps of all streams are its batch. A module that normalises over the batch (BatchNorm) is refused
    in a step in training mode. NotSteppable for a layer with a state, and for recurrent modules.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for part in module.modules():
            if isinstance(part, Layer | nn.RNNBase):
                raise NotSteppable(f"Pointwise is given {type(part).__name__}, which acts along time")
        self.module = module
        self.over_batch = any(isinstance(part, _NormBase) for part in module.modules())

    def bind(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the module's output, found by running it on zeros in evaluation mode."""
        self.features = tuple(features)
        like = next(self.module.parameters(), torch.empty(0))
        training = [part for part in self.module.modules() if part.training]
        self.module.eval()
        with torch.no_grad():
            y = self.module(torch.zeros(1, *features, dtype=like.dtype, device=like.device))
        for part in training:
            part.training = True
        return tuple(y.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, features...] -> [B, T, features...]."""
        y: Tensor = self.module(x.flatten(0, 1))
        return y.reshape(*x.shape[:2], *y.shape[1:])

    def follow(
        self, x: Tensor, memory: Tree, rows: Tensor | None, due: Tensor | None, clock: Tensor | None, begins: int
    ) -> Tensor:
        """[B, features...] -> [B, features...]."""
        if self.over_batch and self.training:
            raise NotSteppable("Pointwise: in training mode the module normalises over the batch; call eval() first")
        result: Tensor = self.module(x)
        return result


def _named(parts: tuple[Layer | Mapping[str, Layer], ...]) -> dict[str, Layer]:
    """Layers by name; those without a name are numbered."""
    first = parts[0] if parts else None
    named: dict[str, Any] = dict(first) if isinstance(first, Mapping) else {str(i): p for i, p in enumerate(parts)}
    if not named or (isinstance(first, Mapping) and len(parts) > 1):
        raise ValueError("layers were expected, or one mapping of names to layers")
    for name, part in named.items():
        if not isinstance(part, Layer):
            raise TypeError(
                f"part {name} is a {type(part).__name__}: a Layer was expected; Pointwise(module) makes one of a "
                "torch module that acts on each time step for itself"
            )
    return named


class _Container(Follower):
    """Named parts, which are this module's children, and states by their names.

    Where every part emits one output an input, the parts follow the container's clock; otherwise each has its own.
    """

    def __init__(self, parts: dict[str, Layer]) -> None:
        super().__init__()
        self.names = tuple(parts)
        self.parts_in_step = all(part.stride == 1 and part.upsampling == 1 for part in parts.values())
        for name, part in parts.items():
            self.add_module(name, part)

    def part(self, name: str) -> Layer:
        """A part by its name."""
        return cast(Layer, self._modules[name])

    def __iter__(self) -> Iterator[Layer]:
        return (self.part(name) for name in self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Layer:
        return self.part(self.names[i])

    @property
    def in_step(self) -> bool:
        """Every part is."""
        return self.parts_in_step

    @property
    def needs_clock(self) -> bool:
        """A part does."""
        return any(isinstance(part, Follower) and part.in_step and part.needs_clock for part in self)


class Sequential(_Container):
    """Layers one after the other, given in order or as a mapping of names.

    delay and receptive field add up, counted in inputs of the whole; strides multiply. What follows a layer with
    upsampling u runs u times a step; it may not emit some of a step's outputs and keep the others for the next, so
    NotSteppable is raised if its stride is neither a multiple nor a divisor of u, or its delay not a multiple of u (of
    stride s: the delay modulo u must be below s). There, receptive_field is an upper bound, as the outputs of one step
    need not all see the same inputs.
    """

    def __init__(self, *parts: Layer | Mapping[str, Layer]) -> None:
        super().__init__(_named(parts))
        layers = list(self)
        self.after = [_Rates(layers[i:]) for i in range(len(layers) + 1)]
        """The rates of the rest from each part on."""
        whole = self.after[0]
        self.delay, self.stride, self.upsampling = whole.delay, whole.stride, whole.upsampling
        self.receptive_field = whole.receptive_field
        shape: tuple[int, ...] | None = None
        for layer in layers:
            shape = layer.features if shape is None else shape
            shape = None if shape is None else layer.bind(shape)
        self.features = layers[0].features

    def bind(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """Tells every part."""
        self.features = tuple(features)
        for layer in self:
            features = layer.bind(features)
        return features

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, features...] -> [B, T', features...]."""
        for layer in self:
            x = layer(x)
        return x

    def memory(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """The memories of the parts that have one, by name."""
        memories = {name: follower_memory(self.part(name), streams, device) for name in self.names}
        return {name: memory for name, memory in memories.items() if memory}

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """The states of the parts that have one, by name; one clock for all if all are in step."""
        if self.parts_in_step:
            return super().initial_state(streams, device)
        states = {name: self.part(name).initial_state(streams, device) for name in self.names}
        return {name: state for name, state in states.items() if state}

    def follow(
        self, x: Tensor, memory: Tree, rows: Tensor | None, due: Tensor | None, clock: Tensor | None, begins: int
    ) -> Tensor:
        """[B, features...] -> [B, features...]."""
        for name in self.names:
            layer = self.part(name)
            x = follow(layer, x, memory.get(name, {}), rows, due, clock, begins)
            begins += layer.delay
        return x

    def advance(
        self, x: Tensor, state: Tree, rows: Tensor | None = None, due: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, features...] -> [B, features...] and which rows emit."""
        if self.parts_in_step:
            return super().advance(x, state, rows, due)
        return self._advance_from(0, x, state, rows, due)

    def _advance_from(
        self, first: int, x: Tensor, state: Tree, rows: Tensor | None, due: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        for i in range(first, len(self.names)):
            name = self.names[i]
            layer = self.part(name)
            x, due = layer.advance(x, state.get(name, {}), rows, due)
            if layer.upsampling > 1 and i + 1 < len(self.names):
                return self._each(i + 1, x, state, rows, due)
        return x, due

    def _each(
        self, first: int, x: Tensor, state: Tree, rows: Tensor | None, due: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What follows an upsampling layer: once for each of its outputs x [B, u, features...]."""
        rest = self.after[first]
        kept, emits = [], due
        for j in range(x.shape[1]):
            y, y_due = self._advance_from(first, x[:, j], state, rows, due)
            if j in rest.kept(x.shape[1]):
                kept.append(y if rest.upsampling > 1 else y.unsqueeze(1))
                emits = y_due
        y = torch.cat(kept, dim=1)
        return (y.squeeze(1) if y.shape[1] == 1 else y), emits


class _Rates:
    """Delay, stride, upsampling and receptive field of layers one after the other."""

    def __init__(self, layers: list[Layer]) -> None:
        self.delay, self.stride, self.upsampling = 0, 1, 1
        self.receptive_field: int | None = 1
        for i, layer in enumerate(layers):
            rest = None
            if layer.upsampling > 1 and i + 1 < len(layers):
                rest = _Rates(layers[i + 1 :])
                rest.check(layer.upsampling)
            self._append(layer.delay, layer.stride, layer.upsampling, layer.receptive_field)
            if rest is not None:
                self._spread(layer.upsampling, rest)
                return

    def _append(self, delay: int, stride: int, upsampling: int, field: int | None) -> None:
        self.delay += delay * self.stride
        known = self.receptive_field
        self.receptive_field = None if known is None or field is None else known + (field - 1) * self.stride
        self.stride, self.upsampling = self.stride * stride, upsampling

    def _spread(self, up: int, rest: _Rates) -> None:
        """Appends what runs `up` times a step."""
        first, field = rest.kept(up)[0], rest.receptive_field
        back = None if field is None else max(0, -(-(field - 1 - first) // up)) + 1
        self._append(rest.delay // up, max(1, rest.stride // up), len(rest.kept(up)) * rest.upsampling, back)

    def kept(self, up: int) -> range:
        """Which of the `up` runs of a step emit, once the first has."""
        return range(self.delay % up, up, self.stride)

    def check(self, up: int) -> None:
        """NotSteppable if a step of `up` runs would not always emit the same number of outputs."""
        if self.stride % up and up % self.stride:
            raise NotSteppable(
                f"a stride of {self.stride} after an upsampling of {up}: neither is a multiple of the other, so that "
                "the number of outputs would differ from step to step"
            )
        if self.stride < up and self.delay % up >= self.stride:
            raise NotSteppable(
                f"a delay of {self.delay} after an upsampling of {up}: the outputs of one step would be emitted in "
                "two; use padding='causal', or add a Delay that makes it a multiple"
            )


def reduced(reduce: Reduce, outputs: Sequence[Tensor], channels: int) -> Tensor:
    """Outputs of the same steps as one; `channels` is the axis that "concat" is along."""
    if reduce == "concat":
        return torch.cat(list(outputs), dim=channels)
    result = outputs[0]
    for output in outputs[1:]:
        if reduce == "sum":
            result = result + output
        elif reduce == "mul":
            result = result * output
        else:
            result = torch.maximum(result, output)
    return result


class Parallel(_Container):
    """Layers side by side: each is given the whole input; outputs are summed, concatenated, multiplied, or max'ed.

    Output i of one branch meets output i of the others. Branches are delayed, at their input, to the longest delay
    among them, so that these are emitted by the same step. Outputs broadcast; "concat" is along the channels. Raises
    NotSteppable if strides or upsampling differ: the branches' outputs would never meet again.
    """

    def __init__(self, *branches: Layer | Mapping[str, Layer], reduce: Reduce = "sum") -> None:
        super().__init__(_named(branches))
        if reduce not in ("sum", "concat", "mul", "max"):
            raise ValueError(f"reduce is {reduce!r}: sum, concat, mul or max was expected")
        layers = dict(zip(self.names, self, strict=True))
        for rate in ("stride", "upsampling"):
            rates = {name: getattr(layer, rate) for name, layer in layers.items()}
            if len(set(rates.values())) > 1:
                listed = ", ".join(f"{value} in {name!r}" for name, value in rates.items())
                raise NotSteppable(f"branches differ in {rate} ({listed}): their outputs would not meet")
        first = next(iter(layers.values()))
        self.reduce, self.stride, self.upsampling = reduce, first.stride, first.upsampling
        self.delay = max(layer.delay for layer in layers.values())
        # Not children by name: the names of a trained network's parameters are those of its branches.
        self.delays = nn.ModuleList(Delay(self.delay - layer.delay) for layer in layers.values())
        fields = [(layer.receptive_field, self.delay - layer.delay) for layer in layers.values()]
        whole = [field + delay for field, delay in fields if field is not None]
        self.receptive_field = max(whole) if len(whole) == len(fields) else None
        shapes = [layer.features for layer in layers.values() if layer.features is not None]
        if shapes:
            self.bind(shapes[0])

    def bind(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """Tells every branch and its delay."""
        self.features = tuple(features)
        outputs = []
        for delay, layer in self._branches():
            delay.bind(features)
            outputs.append(layer.bind(features))
        if self.reduce == "concat":
            return (sum(shape[0] for shape in outputs), *outputs[0][1:])
        return tuple(torch.broadcast_shapes(*outputs))

    def _branches(self) -> Iterator[tuple[Delay, Layer]]:
        for delay, layer in zip(self.delays, self, strict=True):
            assert isinstance(delay, Delay)
            yield delay, layer

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, features...] -> [B, T', features...]."""
        return reduced(self.reduce, [layer(delay(x)) for delay, layer in self._branches()], channels=2)

    def memory(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """By branch: the memory of its delay and its own."""
        memories = {}
        for name, (delay, layer) in zip(self.names, self._branches(), strict=True):
            parts = {"delay": delay.memory(streams, device), "branch": follower_memory(layer, streams, device)}
            memories[name] = {key: part for key, part in parts.items() if part}
        return {name: memory for name, memory in memories.items() if memory}

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """By branch: the state of its delay and its own; one clock for all if all are in step."""
        if self.parts_in_step:
            return super().initial_state(streams, device)
        states = {}
        for name, (delay, layer) in zip(self.names, self._branches(), strict=True):
            parts = {"delay": delay.initial_state(streams, device), "branch": layer.initial_state(streams, device)}
            states[name] = {key: part for key, part in parts.items() if part}
        return {name: state for name, state in states.items() if state}

    def follow(
        self, x: Tensor, memory: Tree, rows: Tensor | None, due: Tensor | None, clock: Tensor | None, begins: int
    ) -> Tensor:
        """[B, features...] -> [B, features...]."""
        outputs = []
        for name, (delay, layer) in zip(self.names, self._branches(), strict=True):
            own = memory.get(name, {})
            delayed = delay.follow(x, own.get("delay", {}), rows, due, clock, begins)
            outputs.append(follow(layer, delayed, own.get("branch", {}), rows, due, clock, begins + delay.delay))
        return reduced(self.reduce, outputs, channels=1)

    def advance(
        self, x: Tensor, state: Tree, rows: Tensor | None = None, due: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, features...] -> [B, features...] and which rows emit."""
        if self.parts_in_step:
            return super().advance(x, state, rows, due)
        outputs, emits = [], due
        for name, (delay, layer) in zip(self.names, self._branches(), strict=True):
            own = state.get(name, {})
            delayed, delayed_due = delay.advance(x, own.get("delay", {}), rows, due)
            # The branches emit at the same steps.
            y, emits = layer.advance(delayed, own.get("branch", {}), rows, delayed_due)
            outputs.append(y)
        return reduced(self.reduce, outputs, channels=2 if self.upsampling > 1 else 1), emits


class Residual(Parallel):
    """A layer and a shortcut around it: output i is inner(x)_i + shortcut(x)_i, or another `reduce` of both.

    The shortcut is delayed by the inner layer's delay. `shortcut` (None: the identity) must have the inner layer's
    stride. `crop`: inputs that the shortcut leaves out at the start, at most the inner delay; for an inner layer
    without padding, half of its delay sets the middle of what it saw against its output, and all of it the newest.
    """

    def __init__(self, inner: Layer, shortcut: Layer | None = None, crop: int = 0, reduce: Reduce = "sum") -> None:
        around = Delay(0) if shortcut is None else shortcut
        if crop:
            around = Sequential({"crop": Crop(crop), "layer": around})
        if around.delay > inner.delay:
            raise NotSteppable(f"the shortcut's delay is {around.delay}, above the inner layer's, {inner.delay}")
        super().__init__({"inner": inner, "shortcut": around}, reduce=reduce)
