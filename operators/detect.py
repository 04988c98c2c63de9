"""Sweeps -> boxes, each by itself: a detection network on a stream."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from stepstream.connectors.detection_checks import no_detections
from stepstream.connectors.records import Detections, Record, Sweep
from stepstream.connectors.sweep_checks import sweep_fault
from stepstream.models.detection.detector import Seen, load_detector
from stepstream.operators import base
from stepstream.operators.base import Context, Operator

__all__ = ["Detect", "DetectOptions"]


class DetectOptions(base.Options):
    """`model`: a registered backbone or `package.module:Name`. `weights`: a shipped name or a folder.

    `ground`: height of the ground in the sensor's frame, metres (None: that of the weights). `score`: boxes below it
    are left out. `device`: where the model runs.
    """

    model: str = "dsvt"
    weights: Path
    ground: float | None = Field(None, ge=-100_000, le=100_000)
    score: float = Field(0.3, ge=0, le=1)
    device: str = "cpu"


class Detect(Operator):
    """One `Detections` for each `Sweep`, at its event time. Keeps no state; the order of the points does not matter, to
    the bit on one machine with as many threads. Every sweep goes through the network alone, so outputs are the same
    however the stream is cut.

    Boxes are the peaks of the heatmaps with at least `score`, best first; the score is the network's own, 0 to 1. A
    sweep without intensity is taken as one of 0 everywhere, and an intensity that is not finite as 0.

    Counted: "objects"; "empty" (sweeps without a return, which have no boxes), "no_return" (points that are NaN or
    infinite), "outside" (points out of the network's range), "dropped_pillars" (cells with points beyond the network's
    `max_pillars`, the farthest ones), "no_intensity" (sweeps without), "over_limit" (sweeps in which the last of
    the network's `most` boxes still had `score`, so that there may be more). Dead-lettered: sweeps that break the
    bounds of `sweep_checks`.
    """

    Options: ClassVar[type[base.Options]] = DetectOptions
    consumes: ClassVar[tuple[type, ...]] = (Sweep,)
    emits: ClassVar[tuple[type, ...]] = (Detections,)
    reach = 0

    options: DetectOptions

    def __init__(self, options: DetectOptions) -> None:
        loaded = load_detector(options.model, options.weights)
        self.options, self.weights_hash, self.parameters = options, loaded.weights_hash, loaded.parameters
        self.model = loaded.model.to(options.device)
        self._up = 0.0 if options.ground is None else options.ground - loaded.model.config.ground

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        """The boxes of each sweep, at its event time."""
        out: list[Record] = []
        for record in records:
            if (fault := sweep_fault(record.value)) is not None:
                context.dead_letter(record, fault)
                continue
            found = self._detect(record.value, context)
            context.count("objects", len(found.scores))
            out.append(record.derive(0, found))
        return out

    def _detect(self, sweep: Sweep, context: Context) -> Detections:
        returned = np.asarray(np.isfinite(sweep.points).all(1))
        returns = int(np.count_nonzero(returned))
        if returns < len(returned):
            context.count("no_return", len(returned) - returns)
        if not returns:
            context.count("empty")
            classes = self.model.config.classes
            return no_detections(classes, sweep.frame, self.options.model, self.weights_hash, sweep.pose)
        if sweep.intensity is None:
            context.count("no_intensity")
        boxes, scores, classes_of, seen = self._seen(sweep, returned)
        if seen.outside:
            context.count("outside", seen.outside)
        if seen.dropped:
            context.count("dropped_pillars", seen.dropped)
        sure = scores >= self.options.score
        if len(scores) == self.model.config.most and sure.all():
            context.count("over_limit")
        return self._detections(sweep, boxes[sure], scores[sure], classes_of[sure])

    def _seen(
        self, sweep: Sweep, returned: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64], Seen]:
        """(Boxes, their scores, their classes, what the network saw)."""
        points = np.zeros((int(np.count_nonzero(returned)), 4), np.float32)
        points[:, :3] = sweep.points[returned]
        points[:, 2] -= np.float32(self._up)
        if sweep.intensity is not None:
            points[:, 3] = np.nan_to_num(sweep.intensity[returned], nan=0.0, posinf=0.0, neginf=0.0)
        found, seen = self.model.detect(torch.from_numpy(points).to(self.options.device))
        boxes = found.boxes.cpu().numpy()
        boxes[:, 2] += np.float32(self._up)
        return boxes, found.scores.cpu().numpy(), found.classes.cpu().numpy(), seen

    def _detections(
        self,
        sweep: Sweep,
        boxes: npt.NDArray[np.float32],
        scores: npt.NDArray[np.float32],
        classes: npt.NDArray[np.int64],
    ) -> Detections:
        count = len(scores)
        return Detections(
            _fixed(np.ascontiguousarray(boxes[:, :3])),
            _fixed(np.ascontiguousarray(boxes[:, 3:6])),
            _fixed(np.ascontiguousarray(boxes[:, 6])),
            _fixed(scores),
            self.model.config.classes,
            _fixed(classes.astype(np.uint8)),
            _fixed(np.full(count, -1, np.int64)),
            _fixed(np.full((count, 3), np.nan, np.float32)),
            sweep.frame,
            self.options.model,
            self.weights_hash,
            sweep.pose,
        )

    def describe(self) -> dict[str, Any]:
        """What is served."""
        config = self.model.config
        return {
            "model": self.options.model,
            "weights": self.weights_hash[:12],
            "classes": list(config.classes),
            "map": list(config.cells),
            "cell": config.size,
            "max_pillars": config.max_pillars,
            "score": self.options.score,
            "parameters": self.parameters,
        }


def _fixed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    array.setflags(write=False)
    return array
