"""Multi-scale retention (RetNet) in its three forms: parallel, by chunks, and one step at a time.

Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", 2023,
https://arxiv.org/abs/2307.08621
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.base import Tree
from stepstream.models.continual.base import Layer, fresh_clock, put, tick
from stepstream.models.continual.recurrent import held, takes

__all__ = ["Retention"]


class Retention(Layer):
    """Swish-gated multi-scale retention: [B, T, features] -> [B, T, features].

    Per head with decay g = 1 - 2^(-5 - head) and keys k_m, queries q_n rotated by their position (angles
    10000^(-linspace(0, 1)), so that a score depends on n - m only):
    R_nm = (q_n . k_m) / sqrt(d) g^(n - m) / sqrt(sum_i g^(n - i)), y_n = sum_m R_nm v_m / max(|sum_m R_nm|, 1);
    output = W_O (swish(W_G x) * norm(y)), the norm over each head (a group norm without parameters, as in the authors'
    code). `values` is the width of all values together, 2 features as published.

    All three normalisations of the paper's section 2.3 are here, in every form: the sum of a row of R is q_n times
    the decayed sum of keys, so a value of one more column, always 1, carries it in the state; the sum of decays is
    known from the clock. The authors' recurrent form leaves the last one out, which the norm undoes but for its eps.
    The derivative runs through the normaliser (the authors' stops there).

    State: {"clock": int64 [S], "memory": [S, heads, features / heads, values / heads + 1]}. Angles and decays come from
    the clock in float64: exact to rounding at any length. What limits float32 is the norm: a head whose scores
    cancel is a small number divided by its size, and in any form its last bits are noise.

    Raises ValueError if heads don't divide the widths or a head's keys don't come in pairs.
    """

    receptive_field = None

    def __init__(
        self, features: int, heads: int, *, values: int | None = None, chunk: int = 64, eps: float = 1e-6
    ) -> None:
        super().__init__()
        values = 2 * features if values is None else values
        if heads < 1 or features % (2 * heads) or values % heads or values < 1:
            raise ValueError(f"{heads} heads for {features} features (in pairs) and {values} values")
        if heads > 19:
            raise ValueError(f"{heads} heads: the decay of head 20 is 1 in float32, which never forgets")
        self.heads, self.chunk, self.eps, self.width = heads, chunk, eps, features
        self.features = (features,)
        self.keys = features // heads
        self.values = values // heads
        log_decay = torch.log1p(-torch.exp2(-5 - torch.arange(heads, dtype=torch.float64)))
        angles = torch.exp(torch.linspace(0, -math.log(10000), self.keys // 2, dtype=torch.float64))
        # As integers, for `.float()` and its like would round a buffer that is seen to hold float64.
        self.register_buffer("log_decay_bits", log_decay.view(torch.int64), persistent=False)
        self.register_buffer("angle_bits", angles.view(torch.int64), persistent=False)
        self.query = nn.Linear(features, features, bias=False)
        self.key = nn.Linear(features, features, bias=False)
        self.value = nn.Linear(features, values, bias=False)
        self.gate = nn.Linear(features, values, bias=False)
        self.out = nn.Linear(values, features, bias=False)
        for part in (self.query, self.key, self.value, self.gate):
            nn.init.xavier_uniform_(part.weight, gain=2**-2.5)  # the authors' code
        nn.init.xavier_uniform_(self.out.weight)

    def bind(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """[features] -> [features]; ValueError if it is not an input of this layer."""
        takes(self, (self.width,), features)
        return (self.width,)

    def _log_decay(self) -> Tensor:
        """Log g, float64 [heads]."""
        return self.get_buffer("log_decay_bits").view(torch.float64)

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated and scaled keys [..., heads, d], values and a one [..., heads, v + 1].

        `position` is float64 and broadcasts to the axes of x before the last.
        """
        angle = (position[..., None] * self.get_buffer("angle_bits").view(torch.float64))[..., None, :]
        cosine, sine = torch.cos(angle).to(x.dtype), torch.sin(angle).to(x.dtype)
        both = torch.stack((self.query(x), self.key(x) * self.keys**-0.5))
        even, odd = torch.unflatten(both, -1, (self.heads, -1, 2)).unbind(-1)
        q, k = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=-1).flatten(-2).unbind(0)
        value = torch.unflatten(self.value(x), -1, (self.heads, -1))
        return q, k, F.pad(value, (0, 1), value=1.0)

    def _finish(self, x: Tensor, retained: Tensor, position: Tensor) -> Tensor:
        """Normalises, gates and mixes the heads: retained [..., heads, v + 1] -> [..., features]."""
        log_decay = self._log_decay()
        decays = torch.expm1((position[..., None] + 1) * log_decay) / torch.expm1(log_decay)  # sum_i g^(n - i)
        # R carries 1 / sqrt(decays), so y / max(|sum R|, 1) is what was retained over the larger of these two.
        size = torch.maximum(retained[..., -1].abs(), torch.sqrt(decays).to(x.dtype))
        y = F.layer_norm(retained[..., :-1] / size[..., None], (self.values,), eps=self.eps)
        return self.out(F.silu(self.gate(x)) * y.flatten(-2))

    def forward(self, window: Tensor) -> Tensor:
        """Window [B, T, features] -> [B, T, features], by chunks: time and memory grow with T, not its square."""
        return self._window(window, self.chunk)

    def parallel(self, window: Tensor) -> Tensor:
        """The same from all pairs of positions at once, the paper's parallel form: one chunk."""
        return self._window(window, max(1, window.shape[1]))

    def _window(self, window: Tensor, chunk: int) -> Tensor:
        batch, time = window.shape[:2]
        position = torch.arange(time, dtype=torch.float64, device=window.device)
        q, k, v = (part.transpose(1, 2) for part in self._project(window, position))  # [B, heads, T, ...]
        index = torch.arange(chunk + 1, device=window.device)
        power = torch.exp(self._log_decay()[:, None] * index).to(window.dtype)[..., None]  # g^0 .. g^chunk
        age = index[:-1, None] - index[:-1]
        decay = torch.where(age >= 0, power[:, age.clamp(min=0), 0], 0)  # [heads, chunk, chunk]
        memory = torch.zeros(batch, self.heads, self.keys, self.values + 1, dtype=window.dtype, device=window.device)
        parts = []
        for start in range(0, time, chunk):
            n = min(chunk, time - start)
            q_i, k_i, v_i = (part[:, :, start : start + n] for part in (q, k, v))
            # `memory` ends at the step before the chunk, so position i of it is i + 1 steps away.
            earlier = torch.matmul(q_i * power[:, 1 : n + 1], memory)
            parts.append(torch.matmul(torch.matmul(q_i, k_i.mT) * decay[:, :n, :n], v_i) + earlier)
            memory = memory * power[:, n, None] + torch.matmul((k_i * power[:, :n].flip(1)).mT, v_i)
        return self._finish(window, torch.cat(parts, dim=2).transpose(1, 2), position)

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        like = self.query.weight
        shape = (streams, self.heads, self.keys, self.values + 1)
        device = device or like.device
        return {"clock": fresh_clock(streams, device), "memory": torch.zeros(shape, dtype=like.dtype, device=device)}

    def advance(
        self, x: Tensor, state: Tree, rows: Tensor | None = None, due: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        position = tick(state, rows, due).to(torch.float64)
        q, k, v = self._project(x, position)
        decay = torch.exp(self._log_decay()).to(x.dtype)[:, None, None]
        memory = torch.addcmul(k[..., None] * v[..., None, :], decay, held(state["memory"], rows))
        retained = torch.matmul(q[..., None, :], memory).squeeze(-2)
        put(state["memory"], rows, memory, due)
        return self._finish(x, retained, position), due
