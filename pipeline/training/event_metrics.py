"""How well a network says what a stream of events shows, and how soon."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stepstream.models.eventtransact import EventTransAct, FrameForm
from stepstream.pipeline.training.event_data import LabelledEvents, Piece, frames_of, identity

__all__ = ["DECIDE_US", "nearest_centroid", "score_pieces"]

DECIDE_US = 100_000
"""In the protocol of time, a decision is scored so often."""
BATCH = 16


def _frames(data: LabelledEvents, piece: Piece, form: FrameForm, frames: int) -> npt.NDArray[np.float32]:
    return frames_of(data.events(piece), form, frames, piece.begin_us, identity(form.height, form.width))


@torch.no_grad()
def _logits(
    model: EventTransAct, data: LabelledEvents, pieces: Sequence[Piece], frames: int
) -> npt.NDArray[np.float32]:
    """[pieces, frames, classes], each piece stepped through from a fresh state."""
    device, form = model.head.weight.device, model.config.frame
    found = []
    for start in range(0, len(pieces), BATCH):
        some = pieces[start : start + BATCH]
        state = model.initial_state(len(some), device)
        window = np.stack([_frames(data, piece, form, frames) for piece in some])
        steps = [model.step(torch.from_numpy(window[:, t]).to(device), state) for t in range(frames)]
        found.append(torch.stack(steps, dim=1).float().cpu().numpy())
    return np.concatenate(found)


def score_pieces(model: EventTransAct, data: LabelledEvents, pieces: Sequence[Piece]) -> dict[str, Any]:
    """`metrics`: `accuracy` and, by protocol, how soon; `curve`: accuracy by milliseconds since the beginning.

    Every piece begins with a fresh state. "recordings": what is said once the last frame of a recording has closed.
    "time": what is said every 100 ms since the piece began, over all of them.
    """
    every = model.config.frame.every_us
    longest = max(piece.end_us - piece.begin_us for piece in pieces)
    frames = max(1, -(-longest // every) if data.protocol == "recordings" else longest // every)
    said = _logits(model, data, pieces, frames).argmax(axis=-1)
    labels = np.array([piece.label for piece in pieces])
    right = said == labels[:, None]
    curve = {str((t + 1) * every // 1000): round(float(right[:, t].mean()), 4) for t in range(frames)}
    if data.protocol == "recordings":
        last = np.array([-(-(piece.end_us - piece.begin_us) // every) - 1 for piece in pieces])
        scored = right[np.arange(len(pieces)), last]
    else:
        ends = range(DECIDE_US // every - 1, frames, DECIDE_US // every)
        lengths = np.array([(piece.end_us - piece.begin_us) // every for piece in pieces])
        scored = np.concatenate([right[lengths > t, t] for t in ends])
    metrics = {"accuracy": round(float(scored.mean()), 4), "decisions": len(scored)}
    return {"metrics": metrics, "curve": curve}


def nearest_centroid(data: LabelledEvents, train: Sequence[Piece], test: Sequence[Piece]) -> dict[str, float]:
    """The class whose mean picture is nearest: pictures of the events by polarity, of length 1.

    "recordings": of a whole recording; "time": of every 100 ms. Columns and rows in at most 32 parts each.
    """
    window = DECIDE_US if data.protocol == "time" else None
    known, labels = _pictures(data, train, window)
    centroids = np.stack([known[labels == k].mean(axis=0) for k in range(len(data.classes))])
    asked, truth = _pictures(data, test, window)
    distance = (centroids**2).sum(axis=1) - 2 * asked @ centroids.T
    return {"accuracy": round(float((distance.argmin(axis=1) == truth).mean()), 4), "decisions": len(truth)}


def _pictures(
    data: LabelledEvents, pieces: Sequence[Piece], window_us: int | None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    pictures, labels = [], []
    side = -(-max(data.height, data.width) // 32)
    across = -(-data.width // side)
    down = -(-data.height // side)
    for piece in pieces:
        t, x, y, p = data.events(piece)
        count = 1 if window_us is None else (piece.end_us - piece.begin_us) // window_us
        for k in range(count):
            begin = piece.begin_us + k * (window_us or 0)
            some = slice(None) if window_us is None else slice(*np.searchsorted(t, (begin, begin + window_us)))
            cell = (p[some].astype(np.int64) * down + y[some] // side) * across + x[some] // side
            picture = np.bincount(cell, minlength=2 * down * across).astype(np.float32)
            pictures.append(picture / max(float(np.linalg.norm(picture)), 1e-9))
            labels.append(piece.label)
    return np.stack(pictures), np.array(labels)
