"""Encoders of one event frame: a small vision transformer with a convolutional stem, or any network of timm."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FrameViT", "TimmEncoder", "TransformerBlock"]


class TransformerBlock(nn.Module):
    """Attention among tokens and a feed-forward network, pre-norm: [B, N, width] -> the same.

    Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, https://arxiv.org/abs/2010.11929.
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """`seen` bool, broadcast to [B, heads, N, N]: which keys a query may see; None: all."""
        qkv = self.query_key_value(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(attended))
        result: Tensor = x + self.dropout(self.contract(F.gelu(self.expand(self.norm2(x)))))
        return result


class FrameViT(nn.Module):
    """A small vision transformer: a stem of convolutions of stride 2, whose last output's pixels are the tokens.

    A stem of convolutions in the place of the paper's patches: a transformer of this size on so few recordings learns
    edges badly by itself (Xiao et al., "Early Convolutions Help Transformers See Better", 2021,
    https://arxiv.org/abs/2106.14881). Float [N, channels, height, width] -> [N, width of the embedding].
    """

    def __init__(
        self,
        channels: int,
        side: tuple[int, int],
        stem: tuple[int, ...],
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        before, (height, breadth) = channels, side
        for after in (*stem, width):
            parts += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.GELU()]
            before, height, breadth = after, (height + 1) // 2, (breadth + 1) // 2
        self.stem = nn.Sequential(*parts)
        self.position = nn.Parameter(torch.randn(height * breadth, width) * 0.02)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, hidden, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, frames: Tensor) -> Tensor:
        """The mean of the last block's tokens, [N, width]."""
        x = self.stem(frames).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.norm(x).mean(dim=1)
        return result


class TimmEncoder(nn.Module):
    """A network of timm (pip install "stepstream[timm]") for one frame, without its classifier, then a projection.

    Frames are resized to the side the network was made for. Nothing is downloaded: its parameters come from training
    or from a folder of weights. Float [N, channels, height, width] -> [N, width]. Raises ValueError if timm is not
    installed, or has no such network.
    """

    def __init__(self, name: str, channels: int, width: int) -> None:
        super().__init__()
        try:
            timm: Any = import_module("timm")
        except ImportError:
            raise ValueError(f'encoder timm:{name}: timm is not installed; pip install "stepstream[timm]"') from None
        if not timm.is_model(name):
            raise ValueError(f"encoder timm:{name}: timm {timm.__version__} has no such network")
        self.network: nn.Module = timm.create_model(name, pretrained=False, in_chans=channels, num_classes=0)
        size: tuple[int, int, int] = self.network.pretrained_cfg["input_size"]
        self.side = (int(size[-2]), int(size[-1]))
        self.project = nn.Linear(int(self.network.num_features), width)

    def forward(self, frames: Tensor) -> Tensor:
        """Embeddings, [N, width]."""
        if tuple(frames.shape[-2:]) != self.side:
            frames = F.interpolate(frames, self.side, mode="bilinear", align_corners=False)
        result: Tensor = self.project(self.network(frames)) / math.sqrt(self.project.out_features)
        return result
