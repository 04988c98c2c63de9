"""GRU and LSTM in two forms: torch's own kernel over a window, one cell update a step for many streams."""

from __future__ import annotations

import math
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.base import Tree
from stepstream.models.continual.base import Layer, NotSteppable, put, take

__all__ = ["GRU", "LSTM", "held", "takes"]


def held(leaf: Tensor, rows: Tensor | None) -> Tensor:
    """The rows of a leaf of state, safe to put new ones while autograd remembers these."""
    old = take(leaf, rows)
    return old.clone() if rows is None and torch.is_grad_enabled() else old


def takes(layer: Layer, wanted: tuple[int, ...], given: tuple[int, ...]) -> None:
    """Raises ValueError if what one step is said to give a layer has not the shape that the layer takes."""
    if tuple(given) != wanted:
        raise ValueError(f"{type(layer).__name__} is given {tuple(given)}: {wanted} was expected")


class _Recurrent(Layer):
    """What GRU and LSTM share: parameters named and shaped as torch names them, so that its state_dict loads as is."""

    receptive_field = None
    gates: ClassVar[int]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        *,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if bidirectional:
            raise NotSteppable(
                f"{name}: bidirectional: its backward pass begins at the end of the stream, so every output waits for "
                "inputs that have not come yet"
            )
        if min(input_size, hidden_size, num_layers) < 1:
            raise ValueError(f"{name}: input_size, hidden_size and num_layers are at least 1")
        if not 0 <= proj_size < hidden_size:
            raise ValueError(f"{name}: proj_size {proj_size} is not in 0 .. hidden_size - 1")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.dropout, self.proj_size = bias, dropout, proj_size
        self.output_size = proj_size or hidden_size
        self.features = (input_size,)
        rows = self.gates * hidden_size
        for layer in range(num_layers):
            inputs = self.output_size if layer else input_size
            shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, inputs), "weight_hh": (rows, self.output_size)}
            if bias:
                shapes |= {"bias_ih": (rows,), "bias_hh": (rows,)}
            if proj_size:
                shapes["weight_hr"] = (proj_size, hidden_size)
            for part, shape in shapes.items():
                self.register_parameter(f"{part}_l{layer}", nn.Parameter(torch.empty(shape)))
        bound = 1 / math.sqrt(hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_torch(cls, module: nn.GRU | nn.LSTM) -> Self:
        """The layer with the weights of torch's module; its window is batch first whatever the module's is.

        Raises NotSteppable if the module is bidirectional, ValueError if it is of another kind.
        """
        if type(module).__name__ != cls.__name__:
            raise ValueError(f"a {type(module).__name__} is no {cls.__name__}")
        layer = cls(
            module.input_size,
            module.hidden_size,
            module.num_layers,
            module.bias,
            dropout=module.dropout,
            bidirectional=module.bidirectional,
            proj_size=module.proj_size,
        ).to(module.get_parameter("weight_ih_l0"))
        layer.load_state_dict(module.state_dict())
        return layer.train(module.training)

    def bind(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """[input_size] -> [proj_size or hidden_size]; ValueError if it is not an input of this layer."""
        takes(self, (self.input_size,), features)
        return (self.output_size,)

    def _weights(self, layer: int) -> list[Tensor]:
        """weight_ih, weight_hh, bias_ih and bias_hh if there are any, weight_hr if it projects."""
        parts = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if self.bias else [])]
        parts += ["weight_hr"] if self.proj_size else []
        return [getattr(self, f"{part}_l{layer}") for part in parts]

    def _flat_weights(self) -> list[Tensor]:
        return [weight for layer in range(self.num_layers) for weight in self._weights(layer)]

    def _zeros(
        self, streams: int, size: int, like: Tensor | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """A fresh leaf [streams, layers, size], or with `like` the kernel's [layers, streams, size]."""
        weight = self.get_parameter("weight_ih_l0")
        if like is not None:
            return torch.zeros(self.num_layers, streams, size, dtype=like.dtype, device=like.device)
        return torch.zeros(streams, self.num_layers, size, dtype=weight.dtype, device=device or weight.device)


class GRU(_Recurrent):
    """Gated recurrent unit of one or more layers: [B, T, input_size] -> [B, T, hidden_size].

    Per layer, with the equations and the gate order of torch.nn.GRU (the reset gate after the product with W_hn):
    r = s(W_ir x + b_ir + W_hr h + b_hr), z = s(W_iz x + b_iz + W_hz h + b_hz),
    n = tanh(W_in x + b_in + r (W_hn h + b_hn)), h' = (1 - z) n + z h.
    Dropout between layers acts on the window in training, never on a step. Raises NotSteppable if bidirectional.

    Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014, https://arxiv.org/abs/1406.1078
    """

    gates = 3

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        *,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
    ) -> None:
        if proj_size:
            raise ValueError("GRU: torch has projections for LSTM only")
        super().__init__(input_size, hidden_size, num_layers, bias, dropout=dropout, bidirectional=bidirectional)

    def forward(self, window: Tensor) -> Tensor:
        """Window [B, T, input_size] -> [B, T, hidden_size], by torch's kernel."""
        fresh = self._zeros(window.shape[0], self.hidden_size, like=window)
        y, _ = torch.gru(
            window, fresh, self._flat_weights(), self.bias, self.num_layers, self.dropout, self.training, False, True
        )
        return y

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        return {"hidden": self._zeros(streams, self.hidden_size, device=device)}

    def advance(
        self, x: Tensor, state: Tree, rows: Tensor | None = None, due: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        old, new = held(state["hidden"], rows), []
        for layer in range(self.num_layers):
            x = torch.gru_cell(x, old[:, layer], *self._weights(layer))
            new.append(x)
        put(state["hidden"], rows, torch.stack(new, dim=1), due)
        return x, due


class LSTM(_Recurrent):
    """Long short-term memory of one or more layers: [B, T, input_size] -> [B, T, proj_size or hidden_size].

    Per layer, with the equations and the gate order of torch.nn.LSTM: i, f, o = s(W x + b + U h + c) each with its own
    weights, g = tanh(likewise), c' = f c + i g, h' = o tanh(c'), and with a projection h' = W_hr (o tanh(c')).
    Dropout between layers acts on the window in training, never on a step. Raises NotSteppable if bidirectional.

    Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; the projection: Sak et al., 2014,
    https://arxiv.org/abs/1402.1128
    """

    gates = 4

    def forward(self, window: Tensor) -> Tensor:
        """Window [B, T, input_size] -> [B, T, proj_size or hidden_size], by torch's kernel."""
        hidden = self._zeros(window.shape[0], self.output_size, like=window)
        cell = self._zeros(window.shape[0], self.hidden_size, like=window)
        y, _, _ = torch.lstm(
            window,
            [hidden, cell],
            self._flat_weights(),
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            False,
            True,
        )
        return y

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        return {
            "hidden": self._zeros(streams, self.output_size, device=device),
            "cell": self._zeros(streams, self.hidden_size, device=device),
        }

    def advance(
        self, x: Tensor, state: Tree, rows: Tensor | None = None, due: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        hidden, cell = held(state["hidden"], rows), held(state["cell"], rows)
        new_hidden, new_cell = [], []
        for layer in range(self.num_layers):
            x, memory = self._cell(x, hidden[:, layer], cell[:, layer], layer)
            new_hidden.append(x)
            new_cell.append(memory)
        put(state["hidden"], rows, torch.stack(new_hidden, dim=1), due)
        put(state["cell"], rows, torch.stack(new_cell, dim=1), due)
        return x, due

    def _cell(self, x: Tensor, hidden: Tensor, cell: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        weights = self._weights(layer)
        if not self.proj_size:
            return torch.lstm_cell(x, [hidden, cell], *weights)
        # torch's cell has no projection.
        *weights, projection = weights
        w_ih, w_hh, *biases = weights
        gates = F.linear(x, w_ih, *biases[:1]) + F.linear(hidden, w_hh, *biases[1:])
        i, f, g, o = gates.chunk(4, dim=-1)
        memory = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
        return F.linear(torch.sigmoid(o) * torch.tanh(memory), projection), memory
