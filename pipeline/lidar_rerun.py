"""Sweeps, classes and boxes in Rerun (https://rerun.io) while they come: in its viewer, or in a file for it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from stepstream.connectors.base import InputError
from stepstream.connectors.records import Detections, Record
from stepstream.operators.perception import Perception
from stepstream.pipeline.lidar_picture import class_colour, track_colour

__all__ = ["RerunView"]


class RerunView:
    """A recording of Rerun, written as it goes on.

    `to`: "view" opens Rerun's viewer; an address `rerun+http://HOST:PORT/proxy` is that of one that runs; anything else
    is a file (.rrd). Raises InputError if the package is not there or the viewer cannot be reached.
    """

    def __init__(self, to: str) -> None:
        try:
            import rerun
        except ImportError:
            raise InputError('--rerun: needs the package rerun-sdk: pip install "stepstream[rerun]"') from None
        self._rerun: Any = rerun
        self._recording: Any = rerun.RecordingStream("stepstream-lidar")
        try:
            if to == "view":
                self._recording.spawn()
            elif to.startswith("rerun+"):
                self._recording.connect_grpc(to)
            else:
                Path(to).parent.mkdir(parents=True, exist_ok=True)
                self._recording.save(to)
        except (RuntimeError, OSError, ValueError) as error:
            raise InputError(f"--rerun {to}: {str(error).splitlines()[0]}") from None

    def show(self, record: Record, masks: Perception) -> None:
        """One sweep at its event time: points in the colours of their classes, boxes in those of their tracks."""
        seen: Detections = record.value
        self._recording.set_time("event_time", timestamp=np.datetime64(record.time_ns, "ns"))
        palette = np.array([_rgb(class_colour(name)) for name in masks.classes], np.uint8)
        points = self._rerun.Points3D(masks.sweep.points, colors=palette[masks.point_classes], radii=0.05)
        self._recording.log("world/points", points)
        tracks = seen.track_ids.tolist()
        names = [
            seen.classes[at] if t < 0 else f"{seen.classes[at]} {t}"
            for at, t in zip(seen.class_ids, tracks, strict=True)
        ]
        boxes = self._rerun.Boxes3D(
            centers=seen.centres,
            sizes=seen.sizes,
            quaternions=[[0.0, 0.0, math.sin(yaw / 2), math.cos(yaw / 2)] for yaw in seen.yaws.tolist()],
            colors=[_rgb(track_colour(track)) for track in tracks],
            labels=names,
        )
        self._recording.log("world/boxes", boxes)

    def close(self) -> None:
        """What was shown is written out."""
        self._recording.disconnect()


def _rgb(colour: Any) -> tuple[int, int, int]:
    """0 to 255 each, of "#rrggbb" or of three numbers from 0 to 1."""
    if isinstance(colour, str):
        return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
    red, green, blue = (round(255 * part) for part in colour[:3])
    return red, green, blue
