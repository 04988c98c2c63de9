"""From a trained torch module to its step form, with the same weights."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from stepstream.models.continual.base import Layer, NotSteppable
from stepstream.models.continual.containers import Pointwise, Reduce, Sequential
from stepstream.models.continual.convert_modules import Layout, Wanted, convert_module, layout_of
from stepstream.models.continual.delay import Crop
from stepstream.models.continual.graph import Graph, Node

__all__ = ["continual"]

Source: TypeAlias = Any

_MERGES: dict[Any, Reduce] = {
    operator.add: "sum", operator.iadd: "sum", torch.add: "sum", "add": "sum", "add_": "sum",
    operator.mul: "mul", operator.imul: "mul", torch.mul: "mul", "mul": "mul", "mul_": "mul",
    torch.maximum: "max", torch.max: "max", torch.cat: "concat", torch.concat: "concat",
}  # fmt: skip
_ELEMENTWISE: dict[Any, Callable[[Tensor], Tensor]] = {
    F.relu: F.relu, torch.relu: F.relu, "relu": F.relu, "relu_": F.relu, F.relu6: F.relu6, F.gelu: F.gelu,
    F.silu: F.silu, F.elu: F.elu, F.leaky_relu: F.leaky_relu, F.hardswish: F.hardswish, F.softplus: F.softplus,
    torch.sigmoid: torch.sigmoid, F.sigmoid: torch.sigmoid, "sigmoid": torch.sigmoid, torch.tanh: torch.tanh,
    F.tanh: torch.tanh, "tanh": torch.tanh, torch.neg: torch.neg, torch.abs: torch.abs, torch.exp: torch.exp,
}  # fmt: skip
_SCALAR = {
    operator.add, torch.add, "add", "add_", operator.mul, torch.mul, "mul", "mul_", operator.sub, torch.sub, "sub",
    operator.truediv, torch.div, "div",
}  # fmt: skip


class _Function(nn.Module):
    """An elementwise function with its other arguments."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        before: tuple[Any, ...] = (),
        after: tuple[Any, ...] = (),
        more: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.function, self.before, self.after, self.more = function, before, after, dict(more or {})

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(*self.before, x, *self.after, **self.more)
        return result


def continual(
    module: nn.Module,
    *,
    memory: int | None = None,
    banded: bool = False,
    layout: Layout | None = None,
    features: tuple[int, ...] | None = None,
) -> Layer:
    """The step form of a trained torch module, with a copy of its weights, in evaluation mode.

    Understood are convolutions, pools, norms, activations, linear layers, recurrent layers and transformer encoders,
    one after the other or in any graph that torch.fx can trace whose branches are added, multiplied, concatenated or
    max'ed. What the returned layer emits is, output for output, what the module makes of a window in evaluation mode,
    but for outputs at the end of the window that look beyond it.

    `layout`: what the module's windows are: "channels", [B, C, T, ...] as convolutions want them, or "tokens",
    [B, T, C]; found by its first module that tells, if None. The layer's own windows are [B, T, C, ...] either way.
    `memory`: T, the window of a transformer encoder, which nothing in its parameters tells. One encoder layer steps
    exactly, and so do two; with more, all outputs of all layers but the last change at every step, and NotSteppable is
    raised unless `banded`: then every encoder is taken in its banded-causal form, which is another function of the same
    weights and wants fine-tuning. `features`: the shape of one stream's input at one step, where a delay needs it and
    no layer tells it.

    Raises NotSteppable naming the submodule that has no exact step form, and why.
    """
    inputs = inspect.signature(module.forward).parameters.values()
    required = [p.name for p in inputs if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if len(required) != 1:
        raise NotSteppable(f"{type(module).__name__} takes {', '.join(required)}: one stream was expected")
    wanted = Wanted(memory, banded)
    holder = nn.Sequential(copy.deepcopy(module).eval())
    traced = _trace(holder)
    found = layout or _layout(traced, holder)
    nodes, names = _nodes(traced, holder, found, wanted)
    result = _chain(nodes) or Graph(nodes, names)
    if features is not None:
        result.bind(features)
    parameter = next(module.parameters(), None)
    if parameter is not None:
        # What holds inputs back, too, keeps them as the module would have had them.
        result.to(parameter.device, parameter.dtype)
    return result.eval()


def _trace(holder: nn.Sequential) -> fx.Graph:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Layer) or super().is_leaf_module(m, module_qualified_name)

    try:
        return Tracer().trace(holder)
    except (fx.proxy.TraceError, TypeError, RuntimeError, AttributeError) as error:
        raise NotSteppable(
            f"{type(holder[0]).__name__}: its forward cannot be traced as a graph ({str(error).splitlines()[0]}): it "
            "depends on values or shapes of its input; convert its parts and put them together with Sequential"
        ) from None


def _called(name: str) -> str:
    """A submodule's name as the user knows it: without the holder's."""
    return name.removeprefix("0").removeprefix(".") or "the module"


def _layout(graph: fx.Graph, holder: nn.Module) -> Layout:
    for node in graph.nodes:
        if node.op == "call_module" and (found := layout_of(holder.get_submodule(str(node.target)))):
            return found
    return "channels"


def _chain(nodes: list[Node]) -> Layer | None:
    """The nodes as a Sequential, if each feeds the next."""
    before = ""
    for node in nodes:
        if node.layer is None or node.inputs != (before,):
            return None
        before = node.name
    return Sequential({node.name.replace(".", "_"): node.layer for node in nodes if node.layer is not None})


def _nodes(graph: fx.Graph, holder: nn.Module, layout: Layout, wanted: Wanted) -> tuple[list[Node], dict[str, str]]:
    """The graph's nodes as ours; values that are passed on unchanged are known by the node that made them."""
    nodes: list[Node] = []
    known: dict[fx.Node, str] = {}
    layouts: dict[str, Layout] = {"": layout}
    names: dict[str, str] = {}

    def emit(node: fx.Node, inputs: tuple[str, ...], layer: Layer | None, merge: Reduce = "sum") -> None:
        nodes.append(Node(node.name, inputs, layer, merge))
        known[node], layouts[node.name] = node.name, layouts[inputs[0]]
        names[node.name] = _called(str(node.target)) if node.op == "call_module" else node.name

    for node in graph.nodes:
        if node.op == "placeholder":
            known[node] = ""
        elif node.op == "call_module":
            source = _one_source(node, known)
            target = holder.get_submodule(str(node.target))
            layer = convert_module(_called(str(node.target)), target, layouts[source], wanted)
            if layer is None:
                known[node] = source
            else:
                emit(node, (source,), layer)
        elif node.op in ("call_function", "call_method"):
            _call(node, known, layouts, emit)
        elif node.op == "output":
            (value,) = node.args
            if not isinstance(value, fx.Node):
                raise NotSteppable("the module returns several values: one was expected")
            if not nodes or known[value] != nodes[-1].name:
                nodes.append(Node("output", (known[value],), Crop(0)))
        else:
            raise NotSteppable(
                f"{node.target}: a parameter is used in forward itself: its shape may hold one number for each step"
            )
    return nodes, names


def _one_source(node: fx.Node, known: dict[fx.Node, str]) -> str:
    others = [value for value in (*node.args[1:], *node.kwargs.values()) if value is not None]
    if others or not node.args or not isinstance(node.args[0], fx.Node):
        raise NotSteppable(f"{_called(str(node.target))}: is called with more than its input, {others}: not understood")
    return known[node.args[0]]


def _call(node: fx.Node, known: dict[fx.Node, str], layouts: dict[str, Layout], emit: Callable[..., None]) -> None:
    """A function or method call."""
    values = [value for value in _flat(node.args) if isinstance(value, fx.Node)]
    if not values:
        raise NotSteppable(f"{node.name}: a value that does not depend on the stream: not understood")
    first = known[values[0]]
    function = node.target
    if function in _MERGES and len(values) > 1:
        _check_merge(node, layouts[first])
        sources = tuple(known[value] for value in values)
        if len({layouts[source] for source in sources}) > 1:
            raise NotSteppable(f"{node.name}: values of different layouts, [B, C, T] and [B, T, C], meet")
        emit(node, sources, None, _MERGES[function])
    elif function in _ELEMENTWISE:
        more = {name: value for name, value in node.kwargs.items() if name != "inplace"}
        emit(node, (first,), Pointwise(_Function(_ELEMENTWISE[function], after=tuple(node.args[1:]), more=more)))
    elif function in _SCALAR and len(values) == 1 and all(isinstance(v, int | float | fx.Node) for v in node.args):
        at = node.args.index(values[0])
        actual = getattr(torch, str(function).removesuffix("_")) if isinstance(function, str) else function
        emit(node, (first,), Pointwise(_Function(actual, node.args[:at], node.args[at + 1 :], node.kwargs)))
    elif function in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d):
        known[node] = first
    elif function in ("transpose", "permute", torch.transpose, torch.permute):
        _swap(node, first, known, layouts, emit)
    elif function is operator.getitem:
        _item(node, first, known, layouts[first], emit)
    else:
        name = function if isinstance(function, str) else getattr(function, "__name__", str(function))
        raise NotSteppable(f"{node.name}: calls {name}, of which no step form is known")


def _flat(arguments: tuple[Any, ...]) -> list[Any]:
    return [v for argument in arguments for v in (argument if isinstance(argument, list | tuple) else [argument])]


def _check_merge(node: fx.Node, layout: Layout) -> None:
    merge, axis = _MERGES[node.target], 1 if layout == "channels" else 2
    if merge == "concat":
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        allowed = (axis,) if layout == "channels" else (axis, -1)
        if dim not in allowed:
            raise NotSteppable(f"{node.name}: concatenates along axis {dim}: the channels' axis {axis} was expected")
    elif node.kwargs:
        raise NotSteppable(f"{node.name}: {dict(node.kwargs)} is not understood")


def _swap(
    node: fx.Node, source: str, known: dict[fx.Node, str], layouts: dict[str, Layout], emit: Callable[..., None]
) -> None:
    axes = list(_flat(tuple(node.args[1:])))
    swaps = sorted(axis % 3 for axis in axes) == [1, 2] if len(axes) == 2 else axes == [0, 2, 1]
    if node.kwargs or not swaps:
        raise NotSteppable(f"{node.name}: moves axes {axes}: only time and channels may be swapped, transpose(1, 2)")
    emit(node, (source,), Crop(0))
    layouts[node.name] = "tokens" if layouts[source] == "channels" else "channels"


def _item(node: fx.Node, source: str, known: dict[fx.Node, str], layout: Layout, emit: Callable[..., None]) -> None:
    """`[0]` of what a recurrent layer returns, or a slice of time that leaves out a margin."""
    arguments: tuple[Any, ...] = node.args
    before, index = arguments
    if index == 0 and isinstance(before, fx.Node) and before.op == "call_module":
        known[node] = source
        return
    time = 2 if layout == "channels" else 1
    if isinstance(index, tuple) and len(index) > time and all(isinstance(part, slice) for part in index):
        part, rest = index[time], [p for i, p in enumerate(index) if i != time]
        start, stop = part.start or 0, part.stop
        # A margin left out at the end of a window is nothing that a stream has.
        open_ended = stop is None or (isinstance(stop, int) and stop < 0)
        if all(p == slice(None) for p in rest) and part.step in (None, 1) and start >= 0 and open_ended:
            emit(node, (source,), Crop(start))
            return
    raise NotSteppable(f"{node.name}: takes {index} of a value: a margin in time, [:, :, a:-b], was expected")
