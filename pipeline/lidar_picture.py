"""Sweeps and what was detected in them, drawn from above: an animation and a still."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from stepstream.connectors.records import Detections, Sweep
from stepstream.operators.grid import Grid
from stepstream.operators.perception import Perception

__all__ = ["Scene", "animation", "class_colour", "corners_of", "points_inside", "still", "track_colour"]

_INK, _MAP, _POINT, _LOOSE = "#16202c", "#d9e0e9", "#6b7888", "#b4bdc9"
_CLASSES = {
    **dict.fromkeys(("road", "parking", "other ground", "other-ground"), "#9aa4b1"),
    **dict.fromkeys(("sidewalk", "terrain"), "#c9a26b"),
    **dict.fromkeys(("building", "fence", "pole", "traffic sign", "traffic-sign"), "#6c7fae"),
    **dict.fromkeys(("vegetation", "trunk"), "#4f9d69"),
}
_OBJECT = "#d1495b"
_TRACKS = [*colormaps["tab10"].colors, *colormaps["Dark2"].colors]  # type: ignore[attr-defined]
_MARGIN = 0.15
_INCHES, _DPI = 7.2, 100


@dataclass(frozen=True, slots=True)
class Scene:
    """One sweep with its map and its detections. `seconds`: since the first one. `masks`: what each point is, if a
    network said so.
    """

    seconds: float
    sweep: Sweep
    grid: Grid
    seen: Detections
    masks: Perception | None = None


def corners_of(seen: Detections) -> npt.NDArray[np.float64]:
    """float64 [K, 4, 2]: x, y of the corners of each box: front left, rear left, rear right, front right."""
    half = seen.sizes[:, None, :2].astype(np.float64) / 2 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]])
    cos, sin = np.cos(seen.yaws)[:, None].astype(np.float64), np.sin(seen.yaws)[:, None].astype(np.float64)
    turned = np.stack([half[..., 0] * cos - half[..., 1] * sin, half[..., 0] * sin + half[..., 1] * cos], axis=-1)
    corners: npt.NDArray[np.float64] = turned + seen.centres[:, None, :2]
    return corners


def points_inside(points: npt.NDArray[np.float32], seen: Detections) -> npt.NDArray[np.int64]:
    """int64 [N]: the box that each point is in, to 15 cm, the first of several; -1 for none: the mask of an object."""
    found = np.full(len(points), -1, np.int64)
    for k in reversed(range(len(seen.scores))):
        off = points - seen.centres[k]
        cos, sin = math.cos(seen.yaws[k]), math.sin(seen.yaws[k])
        along, across = off[:, 0] * cos + off[:, 1] * sin, off[:, 1] * cos - off[:, 0] * sin
        half = seen.sizes[k] / 2 + _MARGIN
        found[(np.abs(along) <= half[0]) & (np.abs(across) <= half[1]) & (np.abs(off[:, 2]) <= half[2])] = k
    return found


def track_colour(track: int) -> Any:
    """Of a track's number, -1 for none: "#rrggbb" or three numbers from 0 to 1."""
    return _TRACKS[track % len(_TRACKS)] if track >= 0 else _LOOSE


def _from_above(x: Any, y: Any) -> tuple[Any, Any]:
    """Forward is up, left is left."""
    return -np.asarray(y), np.asarray(x)


def _draw(axes: Axes, scene: Scene) -> None:
    grid, seen, points = scene.grid, scene.seen, scene.sweep.points
    wide, deep = (count * size for count, size in zip(grid.cells.shape[:2], grid.size[:2], strict=True))
    left, right = -grid.low[1] - deep, -grid.low[1]
    occupied = (grid.cells.reshape(*grid.cells.shape[:2], -1).max(axis=2) > 0)[:, ::-1]
    image = np.where(occupied[..., None], [int(_MAP[i : i + 2], 16) for i in (1, 3, 5)], 255).astype(np.uint8)
    axes.imshow(image, extent=(left, right, grid.low[0], grid.low[0] + wide), origin="lower", interpolation="nearest")
    of = points_inside(points, seen)
    loose = of < 0
    axes.scatter(*_from_above(points[loose, 0], points[loose, 1]), s=1.0, c=_mask_colours(scene, loose), linewidths=0)
    _legend(axes, scene.masks)
    tracks = seen.track_ids.tolist()
    masked = points[of >= 0]
    colours = [track_colour(tracks[k]) for k in of[of >= 0]]
    axes.scatter(*_from_above(masked[:, 0], masked[:, 1]), s=5, c=colours or None, linewidths=0)
    outlines = [
        np.column_stack(_from_above(box[[0, 1, 2, 3, 0], 0], box[[0, 1, 2, 3, 0], 1])) for box in corners_of(seen)
    ]
    widths = [1.3 if track >= 0 else 0.6 for track in tracks]
    axes.add_collection(LineCollection(outlines, colors=[track_colour(track) for track in tracks], linewidths=widths))
    _label(axes, seen)
    axes.set_xlim(left, right)
    axes.set_ylim(grid.low[0], grid.low[0] + wide)


def class_colour(name: str) -> str:
    """Of a class of points: "#rrggbb"."""
    return _POINT if name == "none" else _CLASSES.get(name, _OBJECT)


def _mask_colours(scene: Scene, which: npt.NDArray[np.bool_]) -> Any:
    """Of the points that are in no box, by the class that the network gave them."""
    if scene.masks is None:
        return _POINT
    palette = np.array([class_colour(name) for name in scene.masks.classes])
    return palette[scene.masks.point_classes[which]].tolist()


def _legend(axes: Axes, masks: Perception | None) -> None:
    """Names of the classes that are there, in their colours."""
    there = [] if masks is None else [masks.classes[at] for at in np.unique(masks.point_classes) if at]
    for row, name in enumerate(there):
        at = (0.012, 0.985 - 0.026 * row)
        axes.text(*at, name, fontsize=7, color=class_colour(name), va="top", transform=axes.transAxes)


def _label(axes: Axes, seen: Detections) -> None:
    """Ids beside the boxes, and where each object goes in the next half second."""
    for track, centre, velocity in zip(seen.track_ids.tolist(), seen.centres, seen.velocities, strict=True):
        if track < 0:
            continue
        x, y = _from_above(centre[0], centre[1])
        axes.text(float(x) + 1.5, float(y) + 1.0, str(track), fontsize=8, color=track_colour(track), clip_on=True)
        if np.isfinite(velocity).all() and math.hypot(velocity[0], velocity[1]) > 1:
            to = _from_above(centre[0] + velocity[0] / 2, centre[1] + velocity[1] / 2)
            axes.plot([x, to[0]], [y, to[1]], color=track_colour(track), linewidth=1.0)


def _frame(scene: Scene, title: str) -> Image.Image:
    figure = Figure(figsize=(_INCHES, _INCHES), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.07, 0.06, 0.91, 0.86))
    _draw(axes, scene)
    tracked = int(np.count_nonzero(scene.seen.track_ids >= 0))
    axes.set_title(
        f"{title}   {scene.seconds:5.2f} s   {len(scene.sweep.points):,} points, {len(scene.seen.scores)} objects, "
        f"{tracked} tracks",
        loc="left",
        fontsize=9,
        color=_INK,
    )
    axes.set_xlabel("metres to the right", fontsize=8, color=_INK)
    axes.set_ylabel("metres ahead", fontsize=8, color=_INK)
    axes.tick_params(labelsize=7, colors=_INK)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return Image.fromarray(pixels[..., :3].copy())


def still(scene: Scene, title: str) -> bytes:
    """One sweep as PNG."""
    buffer = io.BytesIO()
    _frame(scene, title).save(buffer, "PNG")
    return buffer.getvalue()


def animation(scenes: Sequence[Scene], title: str, on_frame: Callable[[int, int], None] | None = None) -> bytes:
    """All sweeps as a GIF that repeats, each shown as long as the next one took to come. At least one scene."""
    frames: list[Image.Image] = []
    for at, scene in enumerate(scenes):
        frames.append(_frame(scene, title).quantize(96, dither=Image.Dither.NONE))
        if on_frame is not None:
            on_frame(at + 1, len(scenes))
    times = [scene.seconds for scene in scenes]
    shown = [max(20, round((b - a) * 1000)) for a, b in itertools.pairwise(times)] + [600]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=shown, loop=0)
    return buffer.getvalue()
