"""ConvS5, a state-space layer for images: convolutions in space, a diagonal recurrence in time.

Smith, De Mello, Kautz, Linderman, Byeon, "Convolutional State Space Models for Long-Range Spatiotemporal Modeling",
NeurIPS 2023, https://arxiv.org/abs/2310.19694
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.base import Tree
from stepstream.models.continual.base import Layer, put
from stepstream.models.continual.recurrent import held, takes
from stepstream.models.continual.s5 import draw_log_steps, hippo_eigenvalues, zero_order_hold
from stepstream.models.continual.scan import linear_scan

__all__ = ["ConvS5"]


class ConvS5(Layer):
    """x_k = A_bar . x_{k-1} + B_bar * u_k, y_k = 2 Re(C * x_k) + D u_k: [B, T, C, H, W] -> [B, T, C, H, W].

    `.` is pointwise and `*` a convolution in space that keeps the size (zeros around it), of odd width `input_kernel`
    for B and `output_kernel` for C; D is one number a channel. The 1 x 1 state kernel is diagonal, as in the paper,
    which makes the recurrence one of S5 at every pixel: HiPPO-N in `blocks` blocks, zero-order hold, a learned step a
    state, drawn between `step_min` and `step_max`, eigenvalues kept left of -1e-4. `size` is (H, W), if
    nobody else tells it (`bind`).

    State: {"state": [S, states, 2, H, W]}, real and imaginary planes in the parameters' dtype. Raises ValueError for
    sizes that don't fit.
    """

    receptive_field = None

    def __init__(
        self,
        channels: int,
        states: int,
        size: tuple[int, int] | None = None,
        *,
        input_kernel: int = 3,
        output_kernel: int = 3,
        blocks: int = 1,
        step_min: float = 0.001,
        step_max: float = 0.1,
    ) -> None:
        super().__init__()
        if input_kernel % 2 == 0 or output_kernel % 2 == 0:
            raise ValueError(f"kernels of {input_kernel} and {output_kernel}: odd widths were expected")
        self.states, self.channels = states, channels
        self.features = None if size is None else (channels, *size)
        eigenvalues, vectors = hippo_eigenvalues(states, blocks)
        self.eigenvalues = nn.Parameter(torch.view_as_real(eigenvalues).float())
        # B = V^-1 B' and C = C' V for B' and C' drawn as He et al. do, by the inputs that a kernel sums.
        b = torch.randn(2 * states, channels * input_kernel**2, dtype=torch.float64)
        b = torch.view_as_real(vectors.mH @ (b * (2 / b.shape[1]) ** 0.5).to(vectors.dtype))
        self.input_weight = nn.Parameter(
            b.transpose(1, 2).reshape(states, 2, channels, input_kernel, input_kernel).float().contiguous()
        )
        c = torch.randn(channels, output_kernel, output_kernel, 2 * states, dtype=torch.float64)
        c = torch.view_as_real((c * (2 / (2 * states * output_kernel**2)) ** 0.5).to(vectors.dtype) @ vectors)
        self.output_weight = nn.Parameter(c.permute(0, 3, 4, 1, 2).float().contiguous())
        self.feedthrough = nn.Parameter(torch.randn(channels))
        self.log_step = nn.Parameter(draw_log_steps(states, step_min, step_max))

    def bind(self, features: tuple[int, ...]) -> tuple[int, ...]:
        """[C, H, W] -> the same; ValueError if it is not an input of this layer."""
        if len(features) != 3 or features[0] != self.channels:
            raise ValueError(f"ConvS5 is given {tuple(features)}: {self.channels} channels, H and W were expected")
        if self.features is not None:
            takes(self, self.features, features)
        self.features = tuple(features)
        return self.features

    def _system(self) -> tuple[Tensor, Tensor]:
        """A_bar [P, 2] and the kernel B_bar [2 P, C, k, k], its real and imaginary channels in turn."""
        a, gain = zero_order_hold(self.eigenvalues, torch.exp(self.log_step))
        gain_real, gain_imaginary = gain[..., None, None, None].unbind(1)
        real, imaginary = self.input_weight.unbind(1)
        kernel = torch.stack(
            (gain_real * real - gain_imaginary * imaginary, gain_real * imaginary + gain_imaginary * real), dim=1
        )
        return a, kernel.flatten(0, 1)

    def _read(self, real: Tensor, imaginary: Tensor, u: Tensor) -> Tensor:
        """2 Re(C * x) + D u: two of [N, P, H, W], u [N, C, H, W] -> [N, C, H, W]."""
        kernel = self.output_weight
        x = torch.stack((2 * real, -2 * imaginary), dim=2).flatten(1, 2)
        y = F.conv2d(x, kernel.flatten(1, 2), padding=kernel.shape[-1] // 2)
        return torch.addcmul(y, self.feedthrough[:, None, None], u)

    def _drive(self, u: Tensor, kernel: Tensor) -> Tensor:
        """B_bar * u: [N, C, H, W] -> [N, P, 2, H, W]."""
        return torch.unflatten(F.conv2d(u, kernel, padding=kernel.shape[-1] // 2), 1, (self.states, 2))

    def forward(self, window: Tensor) -> Tensor:
        """Window [B, T, C, H, W] -> [B, T, C, H, W], by a parallel scan."""
        a, kernel = self._system()
        u = window.flatten(0, 1)
        real, imaginary = torch.unflatten(self._drive(u, kernel), 0, window.shape[:2]).unbind(3)
        factors = torch.view_as_complex(a)[None, None, :, None, None]
        x = linear_scan(factors, torch.complex(real, imaginary)).flatten(0, 1)
        return torch.unflatten(self._read(x.real, x.imag, u), 0, window.shape[:2])

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        if self.features is None:
            raise ValueError("ConvS5: the size of an image is not known: give `size` or bind the layer")
        like = self.log_step
        shape = (streams, self.states, 2, *self.features[1:])
        return {"state": torch.zeros(shape, dtype=like.dtype, device=device or like.device)}

    def advance(
        self, x: Tensor, state: Tree, rows: Tensor | None = None, due: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        a, kernel = self._system()
        a_real, a_imaginary = a[..., None, None].unbind(1)
        b_real, b_imaginary = self._drive(x, kernel).unbind(2)
        old_real, old_imaginary = held(state["state"], rows).unbind(2)
        real = b_real + a_real * old_real - a_imaginary * old_imaginary
        imaginary = b_imaginary + a_real * old_imaginary + a_imaginary * old_real
        put(state["state"], rows, torch.stack((real, imaginary), dim=2), due)
        return self._read(real, imaginary, x), due
