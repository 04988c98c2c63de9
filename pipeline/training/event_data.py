"""Labelled recordings of events: read, split, and made into clips of frames."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.event_slices import MAX_SIDE
from stepstream.connectors.events import EventRecording
from stepstream.connectors.recording import open_recording
from stepstream.models.eventtransact import FrameForm
from stepstream.pipeline.training.event_kernels import add_events

__all__ = ["FOLDS", "LabelledEvents", "Move", "Piece", "frames_of", "identity", "read_labelled"]

MAX_EVENTS = 2**28
TEST_EVERY = 5
"""Of a set of many recordings, every fifth of each class, in the order of the file, is held back as the test part."""
FOLDS = {"recordings": 4, "time": 2}
"""Parts that the training part is cut into to compare settings without a look at the test part."""

Split = Literal["train", "test"]
Columns: TypeAlias = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]


@dataclass(frozen=True)
class Piece:
    """A stretch of one recording, `begin_us` to `end_us`, which shows class number `label`."""

    recording: int
    label: int
    begin_us: int
    end_us: int
    split: Split
    fold: int


@dataclass(frozen=True)
class LabelledEvents:
    """Events of R recordings: `t_us` int64, `x`, `y` uint16, `polarity` uint8, `offsets` int64 [R + 1].

    Times count from the beginning of each recording. `protocol`: "recordings" (held-back recordings, scored at their
    end) or "time" (the later half of every recording, scored every 100 ms).
    """

    name: str
    protocol: Literal["recordings", "time"]
    classes: tuple[str, ...]
    width: int
    height: int
    t_us: npt.NDArray[np.int64]
    x: npt.NDArray[np.uint16]
    y: npt.NDArray[np.uint16]
    polarity: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    pieces: tuple[Piece, ...]

    def part(self, split: Split, fold: int | None = None, *, inside: bool = False) -> list[Piece]:
        """The pieces of a part, as long as they can be; with a fold, those outside it, or inside."""
        found: list[Piece] = []
        for piece in self.pieces:
            if piece.split != split or (fold is not None and (piece.fold == fold) != inside):
                continue
            if found and found[-1].recording == piece.recording and found[-1].end_us == piece.begin_us:
                found[-1] = replace(found[-1], end_us=piece.end_us)
            else:
                found.append(piece)
        return found

    def events(self, piece: Piece, begin_us: float | None = None, end_us: float | None = None) -> Columns:
        """Times, columns, rows and polarities of a piece, or a stretch of it, and nothing from outside the piece."""
        first, last = self.offsets[piece.recording : piece.recording + 2]
        begin = piece.begin_us if begin_us is None else max(begin_us, piece.begin_us)
        end = piece.end_us if end_us is None else min(end_us, piece.end_us)
        low, high = first + np.searchsorted(self.t_us[first:last], (math.ceil(begin), math.ceil(end)))
        some = slice(low, max(low, high))
        return self.t_us[some], self.x[some], self.y[some], self.polarity[some]


@dataclass(frozen=True)
class Move:
    """How the events of a clip are changed: see `event_kernels.add_events`. `speed`: time runs so much faster."""

    where: npt.NDArray[np.float32]
    random: npt.NDArray[np.float32]
    keep: npt.NDArray[np.float32]
    speed: float = 1.0


def identity(height: int, width: int) -> Move:
    """Nothing is changed."""
    where = np.stack(np.meshgrid(np.arange(width), np.arange(height))).astype(np.float32)
    return Move(where, np.zeros((0, 3), np.float32), np.zeros(0, np.float32))


def frames_of(events: Columns, form: FrameForm, frames: int, begin_us: float, move: Move) -> npt.NDArray[np.float32]:
    """Frames [T, C, H, W] as `accumulate` makes them, the first one ending `every_us` after `begin_us`.

    `events`: what a stream gives that begins at `begin_us`, or some of it and more.
    """
    steps = form.window_us // form.every_us
    panes = np.zeros((frames, form.channels, form.height, form.width), np.float32)
    every = form.every_us * move.speed
    add_events(*events, every, begin_us, move.where, move.random, move.keep, panes)
    if steps == 1:
        return panes
    sums = panes.copy()
    for back in range(1, min(steps, frames)):
        sums[back:] += panes[:-back]
    return sums


def read_labelled(path: Path) -> LabelledEvents:
    """Reads one of three layouts; raises InputError for anything else.

    A file .npz with t, x, y, p, offsets and labels (recordings); a folder with a folder of recordings for each class
    (recordings); a folder of recordings called NUMBER_CLASS, one for each class (time).
    """
    if path.is_file():
        return _from_npz(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    folders = sorted(p for p in path.iterdir() if p.is_dir())
    if folders:
        files = [(file, i) for i, folder in enumerate(folders) for file in sorted(folder.iterdir()) if file.is_file()]
        return _from_files(path, "recordings", tuple(folder.name for folder in folders), files)
    named = [(file, re.fullmatch(r"\d+_(\w+)", file.stem)) for file in sorted(path.iterdir()) if file.is_file()]
    clips = [(file, match.group(1).replace("_", " ")) for file, match in named if match]
    if len(clips) < 2:
        raise InputError(
            f"{path}: expected a folder for each class, or recordings called NUMBER_CLASS, such as 01_clap"
        )
    classes = tuple(dict.fromkeys(name for _, name in clips))
    return _from_files(path, "time", classes, [(file, classes.index(name)) for file, name in clips])


def _from_npz(path: Path) -> LabelledEvents:
    wanted = {"t": "u", "x": "u", "y": "u", "p": "u", "offsets": "i", "labels": "u"}
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = sorted(set(wanted) - set(file.files))
            if missing:
                raise InputError(f"{path}: {missing[0]}: missing; expected {', '.join(wanted)}")
            with zipfile.ZipFile(path) as archive:
                if sum(item.file_size for item in archive.infolist()) > 16 * MAX_EVENTS:
                    raise InputError(f"{path}: larger than {16 * MAX_EVENTS} bytes")
            parts = {name: file[name] for name in wanted}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: not a file of labelled events: {error}") from None
    for name, part in parts.items():
        if part.ndim != 1 or part.dtype.kind not in "ui":
            raise InputError(f"{path}: {name}: expected a list of integers, got {part.dtype} {list(part.shape)}")
    offsets, labels, count = parts["offsets"].astype(np.int64), parts["labels"].astype(np.int64), len(parts["t"])
    if len(offsets) != len(labels) + 1 or offsets[0] != 0 or offsets[-1] != count or (np.diff(offsets) < 0).any():
        raise InputError(f"{path}: offsets: expected {len(labels) + 1} ascending numbers from 0 to {count}")
    if not len(labels) or any(len(parts[name]) != count for name in ("x", "y", "p")):
        raise InputError(f"{path}: x, y, p: expected {count} of each, and at least one label")
    t, x, y = parts["t"].astype(np.int64), parts["x"].astype(np.uint16), parts["y"].astype(np.uint16)
    names = tuple(str(i) for i in range(int(labels.max()) + 1))
    return _recordings(path, names, labels, offsets, (t, x, y, (parts["p"] > 0).astype(np.uint8)))


def _from_files(
    path: Path, protocol: Literal["recordings", "time"], classes: tuple[str, ...], files: list[tuple[Path, int]]
) -> LabelledEvents:
    columns: list[list[npt.NDArray[Any]]] = [[], [], [], []]
    offsets, total = [0], 0
    for file, _ in files:
        recording = open_recording(file)
        if not isinstance(recording, EventRecording):
            raise InputError(f"{file}: expected a recording of events")
        total += recording.events
        if total > MAX_EVENTS:
            raise InputError(f"{path}: more than {MAX_EVENTS} events")
        for column, values in zip(columns, _columns(recording), strict=True):
            column.append(values)
        offsets.append(offsets[-1] + len(columns[0][-1]))
    t, x, y, polarity = (np.concatenate(column) for column in columns)
    whole = (t, x, y, polarity)
    labels, ends = np.array([label for _, label in files]), np.array(offsets, np.int64)
    if protocol == "recordings":
        return _recordings(path, classes, labels, ends, whole)
    return _halves(path, classes, labels, ends, whole)


def _columns(recording: EventRecording) -> Iterator[npt.NDArray[Any]]:
    """Times from the recording's first event on, columns, rows, polarities."""
    slices = [s for s in recording.slices() if len(s.t_us)]
    if not slices:
        raise InputError(f"{recording.name}: there are no events")
    t = np.concatenate([s.t_us for s in slices])
    yield t - t[0]
    yield np.concatenate([s.x for s in slices])
    yield np.concatenate([s.y for s in slices])
    yield np.concatenate([s.polarity for s in slices]).astype(np.uint8)


def _side(path: Path, columns: Columns) -> tuple[int, int]:
    """Width and height of a square sensor, as both sets have, that holds all events."""
    if not len(columns[0]):
        raise InputError(f"{path}: there are no events")
    largest = max(int(columns[1].max()), int(columns[2].max())) + 1
    if largest > MAX_SIDE:
        raise InputError(f"{path}: expected events below {MAX_SIDE}, got {largest - 1}")
    for known in (34, 128, 304, 346, 640, 1280):
        if largest <= known:
            return known, known
    return largest, largest


def _recordings(path: Path, classes: tuple[str, ...], labels: Any, offsets: Any, columns: Columns) -> LabelledEvents:
    seen = [0] * len(classes)
    pieces = []
    for i, label in enumerate(labels):
        number = seen[label]
        seen[label] += 1
        split: Split = "test" if number % TEST_EVERY == TEST_EVERY - 1 else "train"
        t = columns[0][offsets[i] : offsets[i + 1]]
        if len(t) and (np.diff(t) < 0).any():
            raise InputError(f"{path}: recording {i}: expected ascending times")
        pieces.append(
            Piece(i, int(label), 0, int(t[-1]) + 1 if len(t) else 1, split, number % TEST_EVERY % FOLDS["recordings"])
        )
    width, height = _side(path, columns)
    return LabelledEvents(
        path.stem, "recordings", classes, width, height, *columns, offsets=offsets, pieces=tuple(pieces)
    )


def _halves(path: Path, classes: tuple[str, ...], labels: Any, offsets: Any, columns: Columns) -> LabelledEvents:
    """The first half of each recording is for training, in folds of time; the later one is the test part."""
    pieces = []
    for i, label in enumerate(labels):
        end = int(columns[0][offsets[i + 1] - 1]) + 1
        half = end // 2
        folds = FOLDS["time"]
        bounds = [half * k // folds for k in range(folds + 1)]
        pieces += [Piece(i, int(label), bounds[k], bounds[k + 1], "train", k) for k in range(folds)]
        pieces.append(Piece(i, int(label), half, end, "test", -1))
    width, height = _side(path, columns)
    return LabelledEvents(path.stem, "time", classes, width, height, *columns, offsets=offsets, pieces=tuple(pieces))
