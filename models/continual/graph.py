"""A network whose layers meet in any pattern, not only in chains and side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepstream.models.base import Tree
from stepstream.models.continual.base import Layer, NotSteppable
from stepstream.models.continual.containers import Reduce, reduced
from stepstream.models.continual.delay import Delay

__all__ = ["Graph", "Node"]


@dataclass(frozen=True)
class Node:
    """One value of a graph: a layer's output of one value before it, or what several values are merged into.

    `inputs` are names of nodes before this one; "" is the graph's own input.
    """

    name: str
    inputs: tuple[str, ...]
    layer: Layer | None = None
    merge: Reduce = "sum"


@dataclass(frozen=True)
class _Rate:
    delay: int
    stride: int
    field: int | None


class Graph(Layer):
    """Layers that meet by their outputs: where values are merged, output i of one meets output i of the others.

    Values that come earlier are delayed to the latest. The last node is the output. Raises NotSteppable where values of
    different strides would meet, or where a delay is not a whole number of a value's steps. `names`: what the nodes are
    called in such a message, if not by their own name.
    """

    def __init__(self, nodes: Sequence[Node], names: dict[str, str] | None = None) -> None:
        super().__init__()
        self.nodes = tuple((node.name, node.inputs, node.merge, node.layer is not None) for node in nodes)
        self.layers = nn.ModuleDict({_key(node.name): node.layer for node in nodes if node.layer is not None})
        self.delays = nn.ModuleDict()
        rates = {"": _Rate(0, 1, 1)}
        for node in nodes:
            if node.layer is not None:
                rates[node.name] = self._after(node, rates[node.inputs[0]])
            else:
                rates[node.name] = self._meeting(node, rates, names or {})
        last = rates[nodes[-1].name]
        self.delay, self.stride, self.receptive_field = last.delay, last.stride, last.field
        first = next((node.layer for node in nodes if node.layer is not None and node.inputs == ("",)), None)
        if first is not None and first.features is not None:
            self.bind(first.features)

    @staticmethod
    def _after(node: Node, before: _Rate) -> _Rate:
        layer = node.layer
        assert layer is not None
        if layer.upsampling > 1:
            raise NotSteppable(f"{node.name}: an upsampling of {layer.upsampling} over time inside a graph")
        field = None
        if before.field is not None and layer.receptive_field is not None:
            field = before.field + (layer.receptive_field - 1) * before.stride
        return _Rate(before.delay + layer.delay * before.stride, before.stride * layer.stride, field)

    def _meeting(self, node: Node, rates: dict[str, _Rate], names: dict[str, str]) -> _Rate:
        parts = {name: rates[name] for name in node.inputs}
        called = {name: names.get(name, name) or "the input" for name in parts}
        strides = {part.stride for part in parts.values()}
        if len(strides) > 1:
            listed = ", ".join(f"{called[name]} every {part.stride} inputs" for name, part in parts.items())
            raise NotSteppable(f"{names.get(node.name, node.name)}: {listed}: outputs of different rates do not meet")
        stride, delay = strides.pop(), max(part.delay for part in parts.values())
        fields = []
        for name, part in parts.items():
            steps, rest = divmod(delay - part.delay, stride)
            if rest:
                raise NotSteppable(
                    f"{names.get(node.name, node.name)}: {called[name]} comes {delay - part.delay} inputs earlier than "
                    f"the others, which is not a whole number of its steps of {stride} inputs"
                )
            if steps:
                self.delays[_key(f"{node.name}<{name}")] = Delay(steps)
            fields.append(None if part.field is None else part.field + delay - part.delay)
        known = [field for field in fields if field is not None]
        return _Rate(delay, stride, max(known) if len(known) == len(fields) else None)

    def _layer(self, name: str) -> Layer:
        layer = self.layers[_key(name)]
        assert isinstance(layer, Layer)
        return layer

    def _delay(self, node: str, name: str) -> Delay | None:
        key = _key(f"{node}<{name}")
        found = dict(self.delays.items()).get(key)
        assert found is None or isinstance(found, Delay)
        return found

    def bind(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """Tells every layer and every delay."""
        self.features = tuple(features)
        shapes = {"": self.features}
        for name, inputs, merge, has_layer in self.nodes:
            if has_layer:
                shapes[name] = self._layer(name).bind(shapes[inputs[0]])
                continue
            for source in inputs:
                if (delay := self._delay(name, source)) is not None:
                    delay.bind(shapes[source])
            first = shapes[inputs[0]]
            if merge == "concat":
                shapes[name] = (sum(shapes[source][0] for source in inputs), *first[1:])
            else:
                shapes[name] = tuple(torch.broadcast_shapes(*(shapes[source] for source in inputs)))
        return shapes[self.nodes[-1][0]]

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, features...] -> [B, T', features...]."""
        values = {"": x}
        for name, inputs, merge, has_layer in self.nodes:
            if has_layer:
                values[name] = self._layer(name)(values[inputs[0]])
            else:
                # Those that come earlier have more outputs, of which the delay holds back the last.
                parts = [values[source] for source in inputs]
                length = min(part.shape[1] for part in parts)
                values[name] = reduced(merge, [part[:, :length] for part in parts], channels=2)
        return values[self.nodes[-1][0]]

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """The states of the layers and delays that have one."""
        parts: dict[str, nn.Module] = {**dict(self.layers.items()), **dict(self.delays.items())}
        states = {}
        for name, part in parts.items():
            assert isinstance(part, Layer)
            states[name] = part.initial_state(streams, device)
        return {name: state for name, state in states.items() if state}

    def advance(
        self, x: Tensor, state: Tree, rows: Tensor | None = None, due: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[B, features...] -> [B, features...] and which rows emit."""
        values: dict[str, tuple[Tensor, Tensor | None]] = {"": (x, due)}
        for name, inputs, merge, has_layer in self.nodes:
            if has_layer:
                value, emits = values[inputs[0]]
                values[name] = self._layer(name).advance(value, state.get(_key(name), {}), rows, emits)
                continue
            parts, latest = [], due
            for source in inputs:
                value, emits = values[source]
                if (delay := self._delay(name, source)) is not None:
                    value, emits = delay.advance(value, state[_key(f"{name}<{source}")], rows, emits)
                parts.append(value)
                # After their delays all of them emit at the same steps.
                latest = emits
            values[name] = reduced(merge, parts, channels=1), latest
        return values[self.nodes[-1][0]]


def _key(name: str) -> str:
    """A name that a module and a state may have."""
    return name.replace(".", "_")
