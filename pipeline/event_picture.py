"""A picture that moves: event frames, and what is said of them as it is said."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors.event_frames import EventFrame
from stepstream.pipeline.atomic import write_atomic

__all__ = ["Moment", "write_gif"]

# Colours of the events (darker, brighter) on paper, as in the traffic report: blue, orange.
_PAPER, _INK, _FAINT = (255, 255, 255), (32, 36, 44), (150, 156, 166)
_DARKER, _BRIGHTER, _BAR = (36, 98, 168), (224, 118, 30), (36, 98, 168)
_SIDE, _WIDE, _TALL, _STRIP = 384, 720, 384, 44
SLOWER = 2
"""How many times slower than real time the picture plays: 20 ms a frame is more than some viewers show."""


@dataclass(frozen=True)
class Moment:
    """One frame and what is known after it: `label` is -1 where nothing is told. Times in seconds."""

    values: npt.NDArray[np.float32]
    end_s: float
    events: int
    mean: npt.NDArray[np.float64]
    label: int
    onset_s: float
    confidence: float

    @classmethod
    def of(cls, frame: EventFrame, memory: Mapping[str, Any]) -> Moment:
        """A copy of what `Recognize.on_frame` is told."""
        return cls(
            frame.values,
            frame.end_us / 1e6,
            frame.events,
            memory["mean"].copy(),
            int(memory["label"]),
            memory["onset"] / 1e9,
            memory["confidence"],
        )


@lru_cache
def _font(size: int, bold: bool = False) -> Any:
    """DejaVu Sans, which comes with matplotlib."""
    import matplotlib as mpl
    from PIL import ImageFont  # pillow comes with matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(mpl.get_data_path()) / "fonts" / "ttf" / name), size)


def write_gif(
    path: Path,
    moments: Sequence[Moment],
    classes: Sequence[str],
    truth: Sequence[Mapping[str, Any]],
    credit: str,
) -> None:
    """An animated GIF, `SLOWER` times slower than it was: events on the left, the decision on the right, and below it
    what was shown (`truth`: label and since_s) and what was said, along time.
    """
    pictures = [_draw(moments, at, classes, truth, credit) for at in range(len(moments))]
    every_ms = round(1000 * (moments[-1].end_s - moments[0].end_s) / max(1, len(moments) - 1))
    body = io.BytesIO()
    pictures[0].save(
        body, "GIF", save_all=True, append_images=pictures[1:], duration=SLOWER * every_ms, loop=0, optimize=False
    )
    write_atomic(path, [body.getvalue()])


def _draw(
    moments: Sequence[Moment], at: int, classes: Sequence[str], truth: Sequence[Mapping[str, Any]], credit: str
) -> Any:
    from PIL import Image, ImageDraw

    now = moments[at]
    image = Image.new("RGB", (_WIDE, _TALL + _STRIP + 40), _PAPER)
    image.paste(Image.fromarray(_events(now.values)).resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (0, 0))
    pen = ImageDraw.Draw(image)
    left = _SIDE + 20
    pen.text((left, 14), f"{now.end_s:.2f} s", _FAINT, _font(15))
    if now.label >= 0:
        pen.text((left, 38), classes[now.label], _INK, _font(25, bold=True))
        pen.text((left, 72), f"since {now.onset_s:.2f} s, confidence {now.confidence:.0%}", _INK, _font(15))
    else:
        pen.text((left, 38), "nothing certain yet", _FAINT, _font(25))
    for row, name in enumerate(classes):
        top = 112 + row * 26
        share = float(now.mean[row])
        chosen = row == now.label
        pen.text((left, top), name, _INK if chosen else _FAINT, _font(13, bold=chosen))
        pen.rectangle((left + 160, top + 3, left + 160 + round(140 * share), top + 14), _BAR if chosen else _FAINT)
    _strip(pen, moments, at, classes, truth)
    pen.text((8, _TALL + _STRIP + 20), f"{credit}.  Played {SLOWER} x slower.", _FAINT, _font(11))
    return image.quantize(64)


def _events(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Pixels that became darker and brighter, paler where only once: uint8 [H, W, 3]."""
    darker, brighter = (np.minimum(values[i] / 3, 1)[..., None] for i in (0, 1))
    paper, blue, orange = (np.array(colour, np.float32) for colour in (_PAPER, _DARKER, _BRIGHTER))
    strongest = np.maximum(darker, brighter)
    colour = np.where(darker > brighter, blue, orange)
    return np.asarray(paper + (0.35 + 0.65 * strongest) * (strongest > 0) * (colour - paper), np.uint8)


def _strip(
    pen: Any, moments: Sequence[Moment], at: int, classes: Sequence[str], truth: Sequence[Mapping[str, Any]]
) -> None:
    """What was shown (above) and what was said (below), up to now, along the whole recording."""
    end = moments[-1].end_s
    begin = moments[0].end_s - (moments[1].end_s - moments[0].end_s if len(moments) > 1 else 0)
    room, left = _WIDE - 70, 60

    def across(time_s: float) -> float:
        return left + room * (time_s - begin) / (end - begin)

    top = _TALL + 6
    pen.text((8, top), "shown", _FAINT, _font(12))
    pen.text((8, top + 26), "told", _FAINT, _font(12))
    for i, item in enumerate(truth):
        until = truth[i + 1]["since_s"] if i + 1 < len(truth) else end
        box = (across(item["since_s"]), top, across(until) - 2, top + 17)
        pen.rectangle(box, outline=_FAINT)
        pen.text((box[0] + 5, top + 1), item["label"], _INK, _font(12))
    first = 0
    for i in range(1, at + 2):
        if i <= at and moments[i].label == moments[first].label:
            continue
        if moments[first].label >= 0:
            start, stop = across(moments[first].end_s), across(moments[i - 1].end_s)
            pen.rectangle((start, top + 26, max(stop, start + 1), top + 43), fill=(206, 221, 238))
            name = classes[moments[first].label]
            if stop - start > pen.textlength(name, _font(12)) + 6:
                pen.text((start + 5, top + 27), name, _INK, _font(12))
        first = i
    pen.line((across(moments[at].end_s), top - 3, across(moments[at].end_s), top + 46), fill=_BRIGHTER, width=2)
