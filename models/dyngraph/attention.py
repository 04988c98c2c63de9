"""Parts that the memory networks share: the encoding of time, attention of one query, and the link decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LinkDecoder", "OneQueryAttention", "TimeEncoder"]


class TimeEncoder(nn.Module):
    """cos(w log(1 + t) + b) of a duration t in seconds, with learned frequencies and phases.

    Xu et al., "Inductive Representation Learning on Temporal Graphs", 2020, arXiv:2002.07962, encode cos(w t + b), as
    TGN does. At w = 1 and t = a month float32 leaves an error of a quarter radian in that, and its gradient in w is
    2.6 million: on a scale of decades the argument stays below 200, and both are small for every t.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(0.1 * 80 ** torch.linspace(0, 1, width))
        self.phase = nn.Parameter(torch.zeros(width))

    def forward(self, duration: Tensor) -> Tensor:
        """Float32 seconds [...] -> [..., width]."""
        return torch.addcmul(self.phase, torch.log1p(duration)[..., None], self.frequency).cos()


class OneQueryAttention(nn.Module):
    """Multi-head attention of one query a row over the row's own few entries.

    With one query, (q W_k^T) x = q (W_k x), and sum_i a_i (W_v x_i) = W_v (sum_i a_i x_i): the projections of keys and
    values are applied once a row instead of once an entry, and the result is that of `nn.MultiheadAttention` without
    biases. A row with no entry gives the bias of the output projection.
    """

    def __init__(self, query: int, entry: int, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads, self.channels = heads, width // heads
        self.scale = self.channels**-0.5
        self.query = nn.Linear(query, width, bias=False)
        self.key = nn.Parameter(torch.empty(heads, self.channels, entry))
        self.value = nn.Parameter(torch.empty(heads, entry, self.channels))
        self.out = nn.Linear(width, width)
        for parameter in (self.key, self.value):
            nn.init.uniform_(parameter, -(entry**-0.5), entry**-0.5)

    def forward(self, query: Tensor, entries: Tensor, present: Tensor, dropout: float = 0.0) -> Tensor:
        """Queries [n, query], entries [n, K, entry], which of them there are bool [n, K] -> [n, width]."""
        absorbed = self.absorb(query)
        scores = torch.bmm(absorbed, entries.transpose(1, 2)) * self.scale  # [n, heads, K]
        absent = ~present[:, None]
        weights = torch.softmax(scores.masked_fill(absent, -1e30), -1).masked_fill(absent, 0.0)
        if dropout:
            weights = F.dropout(weights, dropout)
        return self.project(torch.bmm(weights, entries))

    def absorb(self, query: Tensor) -> Tensor:
        """Queries [n, query] as they meet entries: [n, heads, entry]."""
        q = self.query(query).view(query.shape[0], self.heads, self.channels).transpose(0, 1)
        return torch.matmul(q, self.key).transpose(0, 1)

    def project(self, pooled: Tensor) -> Tensor:
        """The entries' weighted means [n, heads, entry] -> [n, width]."""
        return self.out(torch.matmul(pooled.transpose(0, 1), self.value).transpose(0, 1).flatten(1))


class LinkDecoder(nn.Module):
    """A perceptron over both embeddings; its first layer is split, so that a source is projected once for all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.source = nn.Linear(width, width)
        self.destination = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, 1)

    def forward(self, source: Tensor, destination: Tensor) -> Tensor:
        """[B, width], [B, K, width] -> logits [B, K]."""
        hidden = torch.relu(self.source(source)[:, None] + self.destination(destination))
        return self.out(hidden).squeeze(-1)
