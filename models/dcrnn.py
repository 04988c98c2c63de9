"""DCRNN: a recurrent network over a road graph, whose hidden state is carried along the stream.

Li et al., "Diffusion Convolutional Recurrent Neural Network: Data-Driven Traffic Forecasting", ICLR 2018,
https://arxiv.org/abs/1707.01926
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.base import Tree
from stepstream.models.recurrent import FEATURES, RecurrentConfig, RecurrentForecaster

__all__ = ["DCRNN", "DCRNNConfig", "diffusion_matrices", "random_walks"]


@dataclass(frozen=True)
class DCRNNConfig(RecurrentConfig):
    """Sizes of a DCRNN: `layers` diffusion-convolutional GRUs, which look `hops` edges up and down the roads a frame.

    `graph`: "given" is the recording's, "learned" is made of two factors of 16 channels a sensor.
    """

    layers: int = 1
    hops: int = 2
    graph: Literal["given", "learned"] = "given"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "hops"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 was expected")


def random_walks(weight: Tensor, hops: int) -> Tensor:
    """Powers 1 .. hops of D_O^-1 W, then those of D_I^-1 W^T: [..., N, N] -> [..., 2 hops, N, N].

    Row i of the first says where one step from sensor i along the edges leads, of the second where it may have come
    from. A sensor without such an edge has a row of zeros: it diffuses nothing, and nothing becomes non-finite.
    """
    powers = []
    for matrix in (weight, weight.transpose(-1, -2)):
        degree = matrix.sum(dim=-1, keepdim=True)
        walk = power = matrix / torch.where(degree > 0, degree, 1)
        powers.append(walk)
        for _ in range(hops - 1):
            power = power @ walk
            powers.append(power)
    return torch.stack(powers, dim=-3)


def diffusion_matrices(
    sensors: int,
    row: npt.NDArray[np.integer],
    column: npt.NDArray[np.integer],
    weight: npt.NDArray[np.floating],
    hops: int,
) -> Tensor:
    """`random_walks` of a directed weighted graph given by its edges row -> column: float32 [2 hops, N, N]."""
    adjacency = np.zeros((sensors, sensors))
    adjacency[np.asarray(row, dtype=np.int64), np.asarray(column, dtype=np.int64)] = weight
    return random_walks(torch.from_numpy(adjacency), hops).float()


class DiffusionGRU(nn.Module):
    """A GRU over a graph, whose matrix products are diffusion convolutions.

    Theta * z = sum_k (D_O^-1 W)^k z Theta_k + (D_I^-1 W^T)^k z Theta'_k, k = 0 .. K (the two terms of k = 0 are one);
    r, u = sigmoid(Theta_ru * [x, h] + b), c = tanh(Theta_cx * x + r (Theta_ch * h) + b), h' = u h + (1 - u) c.
    The reset gate acts after the product, as in torch.nn.GRU; the paper's acts before it (Theta_ch * (r h)), which
    would need a second diffusion. What x gives is linear, so it comes in as `drive`, made for all frames at once.
    """

    def __init__(self, width: int, terms: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(terms * width, 3 * width, bias=False)

    def forward(self, drive: Tensor, hidden: Tensor, walks: Tensor) -> Tensor:
        """Drive [B, N, 3 width], hidden [B, N, width], walks [2 K N, N] -> the next hidden [B, N, width]."""
        from_hidden, split = self.hidden(diffuse(hidden, walks)), 2 * hidden.shape[-1]
        reset, update = torch.sigmoid(drive[..., :split] + from_hidden[..., :split]).chunk(2, dim=-1)
        candidate = torch.tanh(torch.addcmul(drive[..., split:], reset, from_hidden[..., split:]))
        return torch.lerp(candidate, hidden, update)


def diffuse(x: Tensor, walks: Tensor) -> Tensor:
    """X [B, N, C] and what each walk of [M N, N] makes of it, side by side: [B, N, (1 + M) C]."""
    spread = torch.matmul(walks, x).unflatten(-2, (-1, x.shape[-2]))
    return torch.cat([x, *spread.unbind(-3)], dim=-1)


class DCRNN(RecurrentForecaster):
    """A stack of `DiffusionGRU`s over a road graph; for inputs, output and state see `RecurrentForecaster`.

    Differences from the paper: no decoder (see there); besides the value and the time of day the input has the missing
    mask, the last observed value with its age, the day of the week, and a learned embedding of the sensor; the reset
    gate acts after the diffusion. One layer is the default: on METR-LA it had the lower error after equal minutes.
    """

    walks: Tensor

    def __init__(self, config: DCRNNConfig, walks: Tensor | None = None, mean: float = 0.0, std: float = 1.0) -> None:
        """`walks`: float [2 hops, N, N], see `diffusion_matrices`; zeros if not given. Unused if graph is "learned"."""
        super().__init__(config, mean, std)
        self.config = config
        n, c, terms = config.sensors, config.width, 2 * config.hops + 1
        if config.graph == "given":
            if walks is None:
                walks = torch.zeros(terms - 1, n, n)
            if tuple(walks.shape) != (terms - 1, n, n):
                raise ValueError(f"walks have shape {tuple(walks.shape)}: {(terms - 1, n, n)} was expected")
            self.register_buffer("walks", walks.float())
        else:
            self.graph_source = nn.Parameter(torch.randn(n, 16) * 0.3)
            self.graph_target = nn.Parameter(torch.randn(16, n) * 0.3)
        self.embed = nn.Linear(terms * FEATURES + config.embedding, 3 * c)
        self.between = nn.ModuleList(nn.Linear(terms * c, 3 * c) for _ in range(config.layers - 1))
        self.cells = nn.ModuleList(DiffusionGRU(c, terms) for _ in range(config.layers))

    @classmethod
    def from_card(cls, card: dict[str, Any]) -> DCRNN:
        """The model whose `DCRNNConfig` is the card's `config`."""
        return cls(DCRNNConfig(**card["config"]))

    def graph_walks(self) -> Tensor:
        """[2 hops N, N]: of the given graph, or of the learned one (its weights as in Graph WaveNet, 1906.00121)."""
        if self.config.graph == "given":
            return self.walks.flatten(0, 1)
        weight = torch.softmax(F.relu(self.graph_source @ self.graph_target), dim=-1)
        return random_walks(weight, self.config.hops).flatten(0, 1)

    def fresh_hidden(self, streams: int) -> dict[str, tuple[int, ...]]:
        """The hidden state of each layer."""
        return {f"hidden{i}": (streams, self.config.sensors, self.config.width) for i in range(self.config.layers)}

    def recur(self, features: Tensor, place: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """Layer by layer, so that what does not depend on the hidden state is computed for all frames at once."""
        walks, after = self.graph_walks(), {}
        hidden = drive = self.embed(torch.cat([diffuse(features, walks), place], dim=-1))
        for i, cell in enumerate(self.cells):
            if i:
                drive = self.between[i - 1](diffuse(self.dropout(hidden), walks))
            now, outputs = state[f"hidden{i}"], []
            for frame in drive.unbind(1):
                now = cell(frame, now, walks)
                outputs.append(now)
            hidden, after[f"hidden{i}"] = torch.stack(outputs, dim=1), now
        return hidden, after
