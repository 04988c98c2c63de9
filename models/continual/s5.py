"""S5, a diagonal state-space layer: a parallel scan over a window, one small linear update a step.

Smith, Warrington, Linderman, "Simplified State Space Layers for Sequence Modeling", ICLR 2023,
https://arxiv.org/abs/2208.04933
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.base import Tree
from stepstream.models.continual.base import Layer, put
from stepstream.models.continual.recurrent import held, takes
from stepstream.models.continual.scan import linear_scan

__all__ = ["S5", "S5Block", "draw_log_steps", "hippo_eigenvalues", "zero_order_hold"]

# Eigenvalues stay this far left of the imaginary axis, so that no stream is long enough to make a state grow
# (the published code's `clip_eigs`, after Gu et al., 2022, https://arxiv.org/abs/2206.11893).
_LARGEST_REAL = -1e-4


def hippo_eigenvalues(states: int, blocks: int = 1) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of the normal part of HiPPO-LegS, one of each conjugate pair.

    HiPPO-N is A + p p^T with A_nk = -sqrt(2n + 1) sqrt(2k + 1) below the diagonal, -(n + 1) on it, p_n = sqrt(n + 1/2):
    -1/2 on the diagonal and skew-symmetric off it (section 4.3). `blocks` copies of the matrix of
    2 states / blocks rows stand on the diagonal. Returns complex128 [states] and V [2 states, states].

    Raises ValueError if states is not a multiple of blocks.
    """
    if blocks < 1 or states < 1 or states % blocks:
        raise ValueError(f"{states} states can't be shared by {blocks} blocks")
    n = torch.arange(2 * states // blocks, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    skew = (-0.5 * torch.outer(root, root)).tril(-1)
    values, vectors = torch.linalg.eigh(torch.complex(torch.zeros_like(skew), skew.mT - skew))
    half = states // blocks  # ascending, in pairs of opposite sign: the upper half has the positive ones
    eigenvalues = torch.complex(torch.full((half,), -0.5, dtype=torch.float64), values[half:])
    diagonal = torch.kron(torch.eye(blocks, dtype=vectors.dtype), vectors[:, half:].contiguous())
    return eigenvalues.repeat(blocks), diagonal


def draw_log_steps(states: int, step_min: float, step_max: float) -> Tensor:
    """Logarithms of step lengths, uniform between those of the two limits: float32 [states]."""
    if not 0 < step_min <= step_max:
        raise ValueError(f"steps from {step_min} to {step_max}: 0 < step_min <= step_max was expected")
    return torch.empty(states).uniform_(math.log(step_min), math.log(step_max))


def zero_order_hold(eigenvalues: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """exp(l s) and (exp(l s) - 1) / l for an input that is constant during a step of length s.

    Complex numbers as pairs in the last axis: eigenvalues [P, 2], step [..., P] -> two of [..., P, 2]. Exact for small
    l s too, where exp(l s) - 1 would cancel.
    """
    real, imaginary = eigenvalues[..., 0].clamp(max=_LARGEST_REAL), eigenvalues[..., 1]
    if not torch.compiler.is_compiling():
        value = torch.complex(real, imaginary)
        exponent = value * step
        return torch.view_as_real(torch.exp(exponent)), torch.view_as_real(torch.expm1(exponent) / value)
    # The same in real numbers: inductor makes no kernels of complex ones.
    x, y = real * step, imaginary * step
    size, sine, cosine = torch.exp(x), torch.sin(y), torch.cos(y)
    half = torch.sin(0.5 * y)
    up, right = size * sine, torch.expm1(x) * cosine - 2 * half * half
    square = real * real + imaginary * imaginary
    gain = torch.stack(((right * real + up * imaginary) / square, (up * real - right * imaginary) / square), dim=-1)
    return torch.stack((size * cosine, up), dim=-1), gain


def _times(a: Tensor, b: Tensor) -> Tensor:
    """Product of complex numbers that are pairs in the last axis."""
    if not torch.compiler.is_compiling():
        return torch.view_as_real(torch.view_as_complex(a) * torch.view_as_complex(b))
    (a_real, a_imaginary), (b_real, b_imaginary) = a.unbind(-1), b.unbind(-1)
    return torch.stack(
        (a_real * b_real - a_imaginary * b_imaginary, a_real * b_imaginary + a_imaginary * b_real), dim=-1
    )


class S5(Layer):
    """x_k = A_bar x_{k-1} + B_bar u_k, y_k = 2 Re(C x_k) + D u_k: [B, T, features] -> [B, T, features].

    `states` complex numbers stand for as many conjugate pairs. A is diagonal, drawn from HiPPO-N in `blocks` blocks;
    zero-order hold with a learned step per state, drawn between `step_min` and `step_max`. With `timed`, an input has
    one more feature, the last: the time since the input before it, in units in which a regular step is 1; the step of
    every state is multiplied by it, as published for irregular sampling (section 6.3).

    Eigenvalues are kept left of -1e-4, so that |A_bar| < 1. State: {"state": [S, states, 2]}, real and imaginary parts
    in the parameters' dtype. Raises ValueError for sizes that don't fit.
    """

    receptive_field = None

    def __init__(
        self,
        features: int,
        states: int,
        *,
        blocks: int = 1,
        step_min: float = 0.001,
        step_max: float = 0.1,
        timed: bool = False,
    ) -> None:
        super().__init__()
        self.states, self.timed, self.width = states, timed, features
        self.features = (features + timed,)
        eigenvalues, vectors = hippo_eigenvalues(states, blocks)
        self.eigenvalues = nn.Parameter(torch.view_as_real(eigenvalues).float())
        # B = V^-1 B' and C = C' V for real B' and complex C' of variance 1 / 2P (appendix B.1).
        spread = (2 * states) ** -0.5
        drawn = nn.init.trunc_normal_(
            torch.empty(2 * states, features, dtype=torch.float64), 0, spread, -2 * spread, 2 * spread
        )
        b = vectors.mH @ drawn.to(vectors.dtype)
        read = nn.init.trunc_normal_(
            torch.empty(features, 2 * states, 2, dtype=torch.float64), 0, spread, -2 * spread, 2 * spread
        )
        c = torch.view_as_complex(read) @ vectors
        # [P, 2, features] and [features, P, 2]: seen as real matrices without a copy.
        self.input_weight = nn.Parameter(torch.view_as_real(b).transpose(1, 2).float().contiguous())
        self.output_weight = nn.Parameter(torch.view_as_real(c).float())
        self.feedthrough = nn.Parameter(torch.randn(features))
        self.log_step = nn.Parameter(draw_log_steps(states, step_min, step_max))

    def bind(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """[features (+ 1 if timed)] -> [features]; ValueError if it is not an input of this layer."""
        takes(self, (self.width + self.timed,), features)
        return (self.width,)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The input without its time, and the discrete system at it: A_bar and the gain [..., P, 2]."""
        step = torch.exp(self.log_step)
        if self.timed:
            x, time = x[..., :-1], x[..., -1:]
            step = time * step
        a, gain = zero_order_hold(self.eigenvalues, step)
        return x, a, gain

    def _drive(self, u: Tensor, gain: Tensor) -> Tensor:
        """B_bar u: [..., features] -> [..., P, 2]."""
        return _times(gain, torch.unflatten(F.linear(u, self.input_weight.flatten(0, 1)), -1, (self.states, 2)))

    def _read(self, x: Tensor, u: Tensor) -> Tensor:
        """2 Re(C x) + D u: x [..., P, 2] -> [..., features]."""
        real, imaginary = (2 * x).unbind(-1)
        y = F.linear(torch.stack((real, -imaginary), dim=-1).flatten(-2), self.output_weight.flatten(1))
        return torch.addcmul(y, self.feedthrough, u)

    def forward(self, window: Tensor) -> Tensor:
        """Window [B, T, features (+ 1 if timed)] -> [B, T, features], by a parallel scan."""
        u, a, gain = self._split(window)
        factors = torch.view_as_complex(a)
        x = linear_scan(factors if self.timed else factors[None, None], torch.view_as_complex(self._drive(u, gain)))
        return self._read(torch.view_as_real(x), u)

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        like = self.log_step
        return {"state": torch.zeros(streams, self.states, 2, dtype=like.dtype, device=device or like.device)}

    def advance(
        self, x: Tensor, state: Tree, rows: Tensor | None = None, due: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        u, a, gain = self._split(x)
        new = self._drive(u, gain) + _times(a, held(state["state"], rows))
        put(state["state"], rows, new, due)
        return self._read(new, u), due


class S5Block(Layer):
    """The published block: x + gate(GELU(S5(norm(x)))), or with `prenorm=False` norm(x + gate(GELU(S5(x)))).

    `gate` (names of ours for the published code's half_glu1, half_glu2, full_glu and gelu): "half"
    (g sigmoid(W g) with g = GELU(s), the paper's), "inner" (s sigmoid(W g)), "full" ((W' g) sigmoid(W g)) or "none"
    (g). The norm is a layer norm; the published code's batch norm over a sequence is left out. With `timed`, the last
    feature of the input is the time since the input before it, and the block hands it on as the last feature of its
    output, so that blocks stack. Dropout acts in training.
    """

    receptive_field = None

    def __init__(
        self,
        features: int,
        states: int,
        *,
        blocks: int = 1,
        step_min: float = 0.001,
        step_max: float = 0.1,
        timed: bool = False,
        gate: Literal["half", "inner", "full", "none"] = "half",
        prenorm: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if gate not in ("half", "inner", "full", "none"):
            raise ValueError(f'gate {gate!r} is none of "half", "inner", "full", "none"')
        self.gate, self.prenorm, self.timed = gate, prenorm, timed
        self.features = (features + timed,)
        self.norm = nn.LayerNorm(features, eps=1e-6)
        self.ssm = S5(features, states, blocks=blocks, step_min=step_min, step_max=step_max, timed=timed)
        self.gate_weight = None if gate == "none" else nn.Linear(features, features)
        self.value_weight = nn.Linear(features, features) if gate == "full" else None
        self.dropout = nn.Dropout(dropout)

    def bind(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """The same shape; ValueError if it is not an input of this layer."""
        self.ssm.bind(features)
        return tuple(features)

    def _before(self, x: Tensor) -> Tensor:
        if not self.prenorm:
            return x
        return torch.cat([self.norm(x[..., :-1]), x[..., -1:]], dim=-1) if self.timed else self.norm(x)

    def _after(self, x: Tensor, s: Tensor) -> Tensor:
        skip = x[..., :-1] if self.timed else x
        g = self.dropout(F.gelu(s, approximate="tanh"))  # the approximation is the published code's
        if self.gate_weight is not None:
            value = s if self.gate == "inner" else g if self.value_weight is None else self.value_weight(g)
            g = self.dropout(value * torch.sigmoid(self.gate_weight(g)))
        y = skip + g if self.prenorm else self.norm(skip + g)
        return torch.cat([y, x[..., -1:]], dim=-1) if self.timed else y

    def forward(self, window: Tensor) -> Tensor:
        """Window [B, T, features (+ 1 if timed)] -> the same shape."""
        return self._after(window, self.ssm(self._before(window)))

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        return self.ssm.initial_state(streams, device)

    def advance(
        self, x: Tensor, state: Tree, rows: Tensor | None = None, due: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        s, due = self.ssm.advance(self._before(x), state, rows, due)
        return self._after(x, s), due
