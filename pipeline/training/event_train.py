"""Training of EventTransAct on labelled recordings: every position of a clip carries a loss, and frames a contrast."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stepstream.connectors.base import InputError
from stepstream.models.eventtransact import EventTransAct, EventTransActConfig
from stepstream.pipeline.training.event_augment import Augmentation, draw_move, erase_values
from stepstream.pipeline.training.event_data import LabelledEvents, Piece, frames_of
from stepstream.pipeline.training.event_metrics import score_pieces

__all__ = ["EventTrainOptions", "EventTrainer", "event_contrast"]

TEMPERATURE = 0.1
_SPATIAL = "spatial."
CONTRAST_EVERY = 2
"""Of each clip every second frame is contrasted (in the authors' code every fourth): neighbours look too much alike."""


@dataclass(frozen=True)
class EventTrainOptions:
    """How to train. The learning rate rises over `warmup` of the run and falls to zero as a cosine at its end.

    The run ends after `minutes` of training time, or after `steps` optimiser steps if given (then it is reproducible).
    `clips`: recordings in a step, each in two views of `frames` frames. `alone`: share of the run, at its beginning, in
    which as many frames a step are trained by themselves, drawn one by one: the spatial encoder learns most of what it
    can so, several times faster. `splice`: share of the clips that begin with frames of another one. `contrast`: weight
    of the event-contrastive loss. `smoothing`: of the labels. `ema`: decay of the averaged weights, which are what is
    evaluated and shipped. `fold`: part of the training recordings that is held back to compare settings; None trains on
    all of them. `initial`: weights (a folder or a shipped name) whose spatial encoder to begin with.
    """

    form: Literal["continual", "exact"] = "continual"
    minutes: float = 40.0
    steps: int | None = None
    seed: int = 0
    clips: int = 16
    frames: int = 16
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    smoothing: float = 0.1
    contrast: float = 0.1
    ema: float = 0.995
    alone: float = 0.5
    splice: float = 0.0
    fold: int | None = None
    initial: str | None = None
    save_every_s: float = 60.0
    device: str = "cpu"
    augment: Augmentation = field(default_factory=Augmentation)
    model: dict[str, Any] = field(default_factory=dict)


def event_contrast(first: Tensor, second: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """The event-contrastive loss of two views' frame embeddings, [B, T, width] each: a mean over frames.

    NT-Xent among the frames of one recording: a frame in one view is drawn to the same frame in the other view, and
    pushed away from all other frames of both, so that the spatial encoder tells moments of one action apart (de
    Blegiers et al., 2023, after Chen et al., arXiv:2002.05709).
    """
    both = F.normalize(torch.cat([first, second], dim=1), dim=-1)
    time_ = first.shape[1]
    scores = both @ both.transpose(1, 2) / temperature
    own = torch.eye(2 * time_, dtype=torch.bool, device=first.device)
    scores = scores.masked_fill(own, -torch.inf)
    partner = torch.arange(2 * time_, device=first.device).roll(time_)
    return F.cross_entropy(scores.flatten(0, 1), partner.repeat(first.shape[0]))


class EventTrainer:
    """One training run in a folder, resumable.

    Files: `checkpoint.pt` (everything needed to go on), `log.jsonl` (a line per `save_every_s`).
    """

    def __init__(
        self, data: LabelledEvents, out: Path, options: EventTrainOptions, initial: Mapping[str, Tensor] | None = None
    ) -> None:
        """`initial`: parameters of a spatial encoder, by the names of the whole network, to begin with."""
        torch.manual_seed(options.seed)
        self.data, self.out, self.options = data, out, options
        self.config = _config(data, options)
        # On a CPU convolutions of so few channels take a quarter less time so.
        self.model = EventTransAct(self.config).to(options.device).to(memory_format=torch.channels_last)
        if initial is not None:
            spatial = {name: tensor for name, tensor in initial.items() if name.startswith(_SPATIAL)}
            try:
                self.model.spatial.load_state_dict({n.removeprefix(_SPATIAL): p for n, p in spatial.items()})
            except RuntimeError as error:
                raise InputError(f"--set initial: another spatial encoder: {str(error).splitlines()[-1]}") from None
        self.pieces = data.part("train", options.fold)
        self.average = {name: p.detach().clone() for name, p in self.model.state_dict().items()}
        plain = [p for p in self.model.parameters() if p.dim() < 2]
        matrices = [p for p in self.model.parameters() if p.dim() >= 2]
        groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98))
        self.step, self.seconds = 0, 0.0
        self.random = np.random.default_rng(options.seed)
        out.mkdir(parents=True, exist_ok=True)
        if (out / "checkpoint.pt").exists():
            self._load()

    @property
    def progress(self) -> float:
        """0 at the start, 1 at the end of the run."""
        o = self.options
        return min(1.0, self.step / o.steps if o.steps else self.seconds / (60 * o.minutes))

    def _rate(self) -> float:
        o, p = self.options, self.progress
        return o.learning_rate * (
            p / o.warmup if p < o.warmup else 0.5 * (1 + math.cos(math.pi * (p - o.warmup) / (1 - o.warmup)))
        )

    @property
    def alone(self) -> bool:
        """Whether frames are trained by themselves now."""
        return self.progress < self.options.alone

    def _clip(self, piece: Piece, frames: int, views: int) -> list[npt.NDArray[np.float32]]:
        """Views [T, C, H, W] of the same frames of a piece."""
        o, form, random = self.options, self.config.frame, self.random
        every, before = form.every_us, form.window_us - form.every_us
        slack = piece.end_us - piece.begin_us - (frames * every + before)
        begin = piece.begin_us + (random.uniform(0, slack) if slack > 0 else random.uniform(-0.5, 0.5) * every)
        made = []
        skip = before // every if slack > 0 and self.alone else 0
        for _ in range(views):
            speed = 1 + o.augment.speed * random.uniform(-1, 1)
            events = self.data.events(piece, begin, begin + (frames + skip) * every * speed)
            side = (form.height, form.width)
            move = draw_move(o.augment, side, frames + skip, len(events[0]), speed, random)
            clip = frames_of(events, form, frames + skip, begin, move)[skip:]
            erase_values(o.augment, clip, random)
            made.append(clip)
        return made

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Frames [B, T, C, H, W], labels [B, T], and how many frames each label has been there [B, T].

        Of two views the first ones stand before the second ones.
        """
        o = self.options
        clips, frames, views = (2 * o.clips * o.frames, 1, 1) if self.alone else (o.clips, o.frames, 2)
        made, labels, shown = [], [], []
        for i in self.random.integers(len(self.pieces), size=clips):
            made.append(self._clip(self.pieces[i], frames, views))
            labels.append(np.full(frames, self.pieces[i].label))
            shown.append(np.arange(1, frames + 1))
            if o.splice and frames > 1 and self.random.random() < o.splice:
                self._splice(made[-1], labels[-1], shown[-1])
        window = torch.from_numpy(np.stack([clip[view] for view in range(views) for clip in made]))
        label, count = (torch.from_numpy(np.stack(part)).repeat(views, 1) for part in (labels, shown))
        return window.to(o.device), label.to(o.device), count.to(o.device)

    def _splice(
        self, views: list[npt.NDArray[np.float32]], labels: npt.NDArray[np.int64], shown: npt.NDArray[np.int64]
    ) -> None:
        """Puts frames of another piece before those of a clip, in place."""
        frames = len(labels)
        cut = int(self.random.integers(frames // 4, 3 * frames // 4 + 1))
        other = self.pieces[self.random.integers(len(self.pieces))]
        for view, before in zip(views, self._clip(other, cut, len(views)), strict=True):
            view[:cut] = before
        labels[:cut] = other.label
        shown[cut:] -= cut

    def _loss(self) -> Tensor:
        o = self.options
        frames, labels, shown = self._batch()
        embeddings = self.model.embeddings(frames)
        logits = self.model.classify(embeddings)
        losses = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), label_smoothing=o.smoothing, reduction="none"
        ).unflatten(0, labels.shape)
        # A frame or two say little: what is said later counts more.
        loss: Tensor = (losses * shown).sum() / shown.sum()
        if o.contrast and labels.shape[1] > CONTRAST_EVERY:
            first, second = embeddings[:, ::CONTRAST_EVERY].chunk(2)
            loss = loss + o.contrast * event_contrast(first, second)
        return loss

    def train_step(self) -> float:
        """One optimiser step; its loss."""
        start = time.monotonic()
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        loss = self._loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        # A short memory at first, so that the average forgets the random start.
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, p in self.model.state_dict().items():
                if p.is_floating_point():
                    self.average[name].lerp_(p, 1 - decay)
                else:
                    self.average[name].copy_(p)
        self.step += 1
        self.seconds += time.monotonic() - start
        return float(loss.detach())

    def averaged(self) -> EventTransAct:
        """A copy of the model with the averaged weights, in eval mode."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self.average)
        return model.eval()

    def validate(self) -> dict[str, float]:
        """Accuracy on the fold held back; nothing where there is none."""
        pieces = [] if self.options.fold is None else self.data.part("train", self.options.fold, inside=True)
        return score_pieces(self.averaged(), self.data, pieces)["metrics"] if pieces else {}

    def run(self, on_progress: Callable[[EventTrainer, float], None] | None = None, stop: Event | None = None) -> None:
        """Trains to the end or until `stop` is set; a stop writes a checkpoint, so nothing is trained twice."""
        due = self.seconds + self.options.save_every_s
        loss = math.nan
        while self.progress < 1 and not (stop is not None and stop.is_set()):
            loss = self.train_step()
            if on_progress:
                on_progress(self, loss)
            if self.seconds >= due or self.progress >= 1:
                due = self.seconds + self.options.save_every_s
                line = {"step": self.step, "seconds": round(self.seconds), "loss": round(loss, 4), **self.validate()}
                with (self.out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
                self.save()
        self.save()

    def save(self) -> None:
        """Writes the checkpoint so that a crash at any moment leaves the old or the new one."""
        state = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "random": json.dumps(self.random.bit_generator.state),
            "torch_random": torch.get_rng_state(),
        }
        temporary = self.out / "checkpoint.tmp"
        torch.save(state, temporary)
        temporary.replace(self.out / "checkpoint.pt")

    def _load(self) -> None:
        state = torch.load(self.out / "checkpoint.pt", weights_only=True)
        if EventTransActConfig.of(state["config"]) != self.config:
            raise InputError(f"{self.out} holds a training with other sizes: --set resume=false starts anew")
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.random.bit_generator.state = json.loads(state["random"])
        torch.set_rng_state(state["torch_random"])


def _config(data: LabelledEvents, options: EventTrainOptions) -> EventTransActConfig:
    """Sizes for a set: the sensor's, and summed to some 32 pixels a side."""
    sizes = dict(options.model)
    frame = {"height": data.height, "width": data.width, **sizes.pop("frame", {})}
    pool = max(1, max(data.height, data.width) // 32)
    try:
        return EventTransActConfig.of(
            {"classes": data.classes, "frame": frame, "pool": pool, "form": options.form, **sizes}
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"--set model: {error}") from None
