"""EventTransAct: a video transformer network on event frames, one frame at a time.

De Blegiers, Dave, Yousaf and Shah, "EventTransAct: A video transformer-based framework for Event-camera based action
recognition", IROS 2023, https://arxiv.org/abs/2308.13711: each event frame is embedded by itself, and a transformer
attends along time to the embeddings of a clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.models.base import StreamModel, Tree
from stepstream.models.continual.base import fresh_clock, put, take, tick
from stepstream.models.continual.encoder import Encoder
from stepstream.models.event_encoders import FrameViT, TimmEncoder, TransformerBlock

__all__ = ["EventTransAct", "EventTransActConfig", "FrameForm"]

TIMM = "timm:"


@dataclass(frozen=True)
class FrameForm:
    """What frames a network was trained on: options of `accumulate`, and the sensor's size.

    `every_us`: from one frame to the next, `window_us`: what a frame reaches back, both in microseconds.
    """

    kind: Literal["count", "polarity", "surface", "voxel"] = "polarity"
    channels: int = 2
    height: int = 34
    width: int = 34
    every_us: int = 20_000
    window_us: int = 40_000


@dataclass(frozen=True)
class EventTransActConfig:
    """Sizes of an EventTransAct.

    `classes`: their names. `pool`: pixels a side that are summed before anything else. `encoder`: "vit", our own, with
    `stem` channels of the convolutions before the last one and `spatial_layers`; or "timm:NAME". `memory`: frames that
    the temporal encoder sees. `form`: "exact" re-runs the temporal encoder, unmasked, over the last `memory`
    embeddings; "continual" keeps keys and values of each of its layers, banded-causal. Each wants weights trained so.
    """

    classes: tuple[str, ...]
    frame: FrameForm = FrameForm()
    pool: int = 1
    encoder: str = "vit"
    stem: tuple[int, ...] = (24, 48)
    width: int = 64
    spatial_layers: int = 1
    temporal_layers: int = 2
    heads: int = 4
    hidden: int = 128
    memory: int = 16
    form: Literal["continual", "exact"] = "continual"
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if len(self.classes) < 2 or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes are {self.classes}: at least two different names were expected")
        for name in ("pool", "width", "temporal_layers", "heads", "hidden", "memory"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 was expected")
        if self.encoder != "vit" and not self.encoder.startswith(TIMM):
            raise ValueError(f"encoder is {self.encoder!r}: vit or timm:NAME was expected")
        if self.form not in ("continual", "exact"):
            raise ValueError(f"form is {self.form!r}: continual or exact was expected")

    @classmethod
    def of(cls, tree: dict[str, Any]) -> EventTransActConfig:
        """From the JSON form of a card."""
        rest = {name: value for name, value in tree.items() if name not in ("classes", "frame", "stem")}
        frame, stem = FrameForm(**tree.get("frame", {})), tuple(tree.get("stem", cls.stem))
        return cls(classes=tuple(tree["classes"]), frame=frame, stem=stem, **rest)


class _RingEncoder(nn.Module):
    """Transformer blocks over the last `memory` embeddings, each told its age: the newest one's output."""

    def __init__(self, config: EventTransActConfig) -> None:
        super().__init__()
        self.age = nn.Parameter(torch.randn(config.memory, config.width) * 0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.heads, config.hidden, config.dropout)
            for _ in range(config.temporal_layers)
        )
        self.norm = nn.LayerNorm(config.width)

    def forward(self, ring: Tensor, age: Tensor) -> Tensor:
        """Embeddings [B, M, width] in any order, `age` int64 [B, M]: 0 is the newest, < 0 is none -> [B, width]."""
        x = ring + self.age[age.clamp(min=0)]
        seen = (age >= 0)[:, None, None]
        for block in self.blocks:
            x = block(x, seen)
        newest = (age == 0).to(x.dtype)[:, None] @ x
        result: Tensor = self.norm(newest[:, 0])
        return result


class EventTransAct(StreamModel):
    """Logits of the classes after each event frame: float [B, T, C, H, W] -> [B, T, classes]; `step` [B, C, H, W].

    Values as `accumulate` makes them; counts are taken as log(1 + count). Time enters by the order of frames alone.

    Both forms step exactly: `step` equals `forward` at every step, to 1e-5 of the logits' scale in float32, 1e-10 in
    float64. Position t of `forward` depends on the last receptive_field frames: `memory` in the exact form,
    temporal_layers (memory - 1) + 1 in the continual one.
    """

    task: ClassVar[str] = "events"

    def __init__(self, config: EventTransActConfig) -> None:
        super().__init__()
        self.config = c = config
        side = (-(-c.frame.height // c.pool), -(-c.frame.width // c.pool))
        self.spatial: nn.Module
        if c.encoder == "vit":
            layers = c.spatial_layers
            self.spatial = FrameViT(c.frame.channels, side, c.stem, c.width, layers, c.heads, c.hidden, c.dropout)
        else:
            self.spatial = TimmEncoder(c.encoder.removeprefix(TIMM), c.frame.channels, c.width)
        self.ring: _RingEncoder | None = None
        self.temporal: Encoder | None = None
        if c.form == "exact":
            self.ring, self.receptive_field = _RingEncoder(c), c.memory
        else:
            self.temporal = Encoder(
                c.temporal_layers,
                c.width,
                c.heads,
                c.memory,
                feedforward=c.hidden,
                activation="gelu",
                norm_first=True,
                final_norm=True,
                dropout=c.dropout,
                positions="relative",
            )
            self.receptive_field = self.temporal.receptive_field
        self.head = nn.Linear(c.width, len(c.classes))

    @classmethod
    def from_card(cls, card: dict[str, Any]) -> EventTransAct:
        """The network that a card describes."""
        return cls(EventTransActConfig.of(card["config"]))

    def embed(self, frames: Tensor) -> Tensor:
        """Each frame by itself: [N, C, H, W] -> [N, width]."""
        if self.config.pool > 1:
            pool = self.config.pool
            frames = F.avg_pool2d(frames, pool, ceil_mode=True, count_include_pad=False) * pool**2
        if self.config.frame.kind in ("count", "polarity"):
            frames = torch.log1p(frames)
        result: Tensor = self.spatial(frames.contiguous(memory_format=torch.channels_last))
        return result

    def embeddings(self, window: Tensor) -> Tensor:
        """[B, T, C, H, W] -> [B, T, width]."""
        return self.embed(window.flatten(0, 1)).unflatten(0, window.shape[:2])

    def classify(self, embeddings: Tensor) -> Tensor:
        """The temporal half over a window: [B, T, width] -> [B, T, classes]."""
        if self.ring is None:
            assert self.temporal is not None
            logits: Tensor = self.head(self.temporal(embeddings))
            return logits
        memory, (batch, time) = self.config.memory, embeddings.shape[:2]
        windows = F.pad(embeddings, (0, 0, memory - 1, 0)).unfold(1, memory, 1).transpose(2, 3)
        age = torch.arange(memory - 1, -1, -1, device=embeddings.device)
        age = torch.where(age <= torch.arange(time, device=embeddings.device)[:, None], age, -1)
        newest = self.ring(windows.flatten(0, 1), age.repeat(batch, 1))
        result: Tensor = self.head(newest.unflatten(0, (batch, time)))
        return result

    def forward(self, window: Tensor) -> Tensor:
        """Logits at every position of a window."""
        return self.classify(self.embeddings(window))

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """Exact: a clock and the ring of embeddings. Continual: the temporal encoder's."""
        if self.temporal is not None:
            return self.temporal.initial_state(streams, device)
        weight = self.head.weight
        device = device or weight.device
        ring = torch.zeros(streams, self.config.memory, self.config.width, dtype=weight.dtype, device=device)
        return {"clock": fresh_clock(streams, device), "ring": ring}

    def step(self, x: Tensor, state: Tree, rows: Tensor | None = None) -> Tensor:
        """Logits after one more frame."""
        embedding = self.embed(x)
        if self.temporal is not None:
            logits: Tensor = self.head(self.temporal.step(embedding, state, rows))
            return logits
        assert self.ring is not None
        clock = tick(state, rows)[:, None]
        slots = torch.arange(self.config.memory, device=x.device)[None]
        ring = torch.where(
            (slots == clock % self.config.memory)[..., None], embedding[:, None], take(state["ring"], rows)
        )
        put(state["ring"], rows, ring)
        age = (clock - slots) % self.config.memory
        result: Tensor = self.head(self.ring(ring, torch.where(age <= clock, age, -1)))
        return result
