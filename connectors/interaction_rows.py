"""Rows of edge lists in delimited text, read block by block into columns of arrays.

What is kept of a row is two codes, a time and the features; texts are kept once for each node.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import csv as arrow_csv

from stepstream.connectors.base import InputError
from stepstream.connectors.interaction_times import Ticks, TimeUnit, ticks_of_array, ticks_of_texts
from stepstream.connectors.interactions import (
    IdColumn,
    InteractionOptions,
    InteractionRecording,
    build_interactions,
    check_size,
)

__all__ = ["Layout", "first_rows", "read_head", "read_rows"]

MAX_FILE_BYTES = 32 * 2**30
MAX_HEADER_BYTES = 4 * 2**20
_BLOCK = 8 * 2**20  # no row may be longer


@dataclass(frozen=True, slots=True)
class Layout:
    """What the columns are, by index. `names`: what the file calls each column, or what they are. `header`: how many
    rows are in front of the first interaction.
    """

    names: tuple[str, ...]
    source: int
    destination: int
    time: int
    event: int | None = None
    label: int | None = None
    features: tuple[int, ...] = ()
    delimiter: str = ","
    separate_ids: bool = False
    unit: TimeUnit | None = None
    notes: tuple[str, ...] = ()
    header: int = 1

    def types(self) -> dict[int, pa.DataType]:
        """The columns that are read, and as what."""
        texts = [self.source, self.destination, self.time, *([] if self.event is None else [self.event])]
        numbers = [*self.features, *([] if self.label is None else [self.label])]
        return {**dict.fromkeys(texts, pa.string()), **dict.fromkeys(numbers, pa.float32())}


def first_rows(head: bytes, delimiter: str = ",", count: int = 2) -> list[list[str]]:
    """The first rows, or as much of them as `head` shows; [] if it is no text of rows."""
    try:
        # The head may end in the middle of a character or a line.
        text = head.decode("utf-8-sig", "strict" if len(head) < 8 else "ignore")
        lines = text.splitlines()[:count]
        return [] if "\0" in text else list(csv.reader(lines, delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error):
        return []


def read_head(path: Path, lines: int) -> bytes:
    """The first lines of a file, of bounded length."""
    with path.open("rb") as stream:
        return b"".join(stream.readline(MAX_HEADER_BYTES) for _ in range(lines))


@dataclass
class _Codes:
    """Numbers for texts in order of first appearance."""

    known: dict[str, int] = field(default_factory=dict)
    blocks: list[npt.NDArray[np.int64]] = field(default_factory=list)

    def add(self, column: pa.Array) -> None:
        encoded = column.dictionary_encode()
        known = self.known
        codes = [known.setdefault(text, len(known)) for text in encoded.dictionary.to_pylist()]
        self.blocks.append(np.array(codes, np.int64)[encoded.indices.to_numpy()])

    def column(self) -> IdColumn:
        return IdColumn(list(self.known), np.concatenate(self.blocks))


class _Rows:
    """What was read so far."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.layout = layout
        self.count = 0
        self.source, self.destination = _Codes(), _Codes()
        self.times: list[pa.Array] = []
        self.features: list[npt.NDArray[np.float32]] = []
        self.labels: list[npt.NDArray[np.float32]] = []
        self.events: list[str] = []

    def where(self, at: int) -> str:
        """Rows are counted as lines, the first is row 1."""
        return f"{self.path}: row {at + 1 + self.layout.header}"

    def add(self, batch: pa.RecordBatch) -> None:
        layout = self.layout
        check_size(self.path, "rows", self.count + batch.num_rows, len(layout.features))

        def column(at: int, required: bool = True) -> pa.Array:
            found = batch.column(str(at))
            if required and found.null_count:
                row = self.count + int(np.flatnonzero(found.is_null().to_numpy(zero_copy_only=False))[0])
                raise InputError(f"{self.where(row)}: {layout.names[at]}: missing")
            return found

        self.source.add(column(layout.source))
        self.destination.add(column(layout.destination))
        self.times.append(_numbers(column(layout.time)))
        if layout.features:
            values = [column(at).to_numpy(zero_copy_only=False) for at in layout.features]
            self.features.append(np.stack(values, axis=1))
        if layout.label is not None:
            self.labels.append(column(layout.label, required=False).to_numpy(zero_copy_only=False))
        if layout.event is not None:
            self.events += column(layout.event).to_pylist()
        self.count += batch.num_rows

    def ticks(self) -> Ticks:
        def where(at: int) -> str:
            return f"{self.where(at)}: {self.layout.names[self.layout.time]}"

        if all(pa.types.is_int64(block.type) for block in self.times):
            return ticks_of_array(np.concatenate([block.to_numpy() for block in self.times]), where)
        texts: list[str | None] = []
        for block in self.times:
            texts += block.cast(pa.string()).to_pylist()
        return ticks_of_texts(texts, where)


def _numbers(column: pa.Array) -> pa.Array:
    """Whole numbers as int64, anything else as it is."""
    try:
        return column.cast(pa.int64())
    except pa.ArrowInvalid:
        return column


def _batches(path: Path, layout: Layout) -> Any:
    types = {str(at): type_ for at, type_ in layout.types().items()}
    return arrow_csv.open_csv(
        path,
        read_options=arrow_csv.ReadOptions(
            column_names=[str(at) for at in range(len(layout.names))],
            skip_rows=layout.header,
            block_size=_BLOCK,
            use_threads=False,
        ),
        parse_options=arrow_csv.ParseOptions(delimiter=layout.delimiter, newlines_in_values=False),
        convert_options=arrow_csv.ConvertOptions(
            column_types=types, include_columns=list(types), null_values=[""], strings_can_be_null=True
        ),
    )


def _name_the_row(path: Path, layout: Layout) -> None:
    """Slowly looks for the row that Arrow stumbled over, to name it to the user."""
    numbers = [at for at, type_ in layout.types().items() if pa.types.is_float32(type_)]
    with path.open(newline="", encoding="utf-8-sig", errors="strict") as text:
        reader = csv.reader(text, delimiter=layout.delimiter)
        try:
            for _ in range(layout.header):
                next(reader)
            for cells in reader:
                where = f"{path}: row {reader.line_num}"
                if cells and len(cells) != len(layout.names):
                    width = len(layout.names)
                    raise InputError(
                        f"{where}: expected {width} fields, got {len(cells)} (do the features change, is it cut off?)"
                    )
                for at in numbers if cells else ():
                    cell = cells[at].strip()
                    if not _is_number(cell) and (cell or at != layout.label):
                        raise InputError(f"{where}: {layout.names[at]}: expected a number, got {cell[:40]!r}")
        except csv.Error as error:
            raise InputError(f"{path}: row {reader.line_num}: {error}") from None
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: row {reader.line_num + 1} or behind it: no UTF-8 text ({error.reason})"
            ) from None


def _is_number(cell: str) -> bool:
    try:
        return not math.isnan(float(cell)) or cell.lower() == "nan"
    except ValueError:
        return False


def read_rows(
    path: Path, layout: Layout, format: str, options: InteractionOptions, feature_names: Sequence[str]
) -> InteractionRecording:
    """The recording of all rows below the header. Raises InputError naming the file, the row and the column."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InputError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
    rows = _Rows(path, layout)
    try:
        with _batches(path, layout) as reader:
            for batch in reader:
                if batch.num_rows:
                    rows.add(batch)
    except (pa.ArrowException, OSError) as error:
        _name_the_row(path, layout)
        raise InputError(f"{path}: {error}") from None
    if not rows.count:
        where = " below the header" if layout.header else ""
        raise InputError(f"{path}: expected rows{where}, there are none: an empty recording")
    return build_interactions(
        path,
        format=format,
        options=options,
        source=rows.source.column(),
        destination=rows.destination.column(),
        ticks=rows.ticks(),
        where=rows.where,
        fields=(layout.names[layout.source], layout.names[layout.destination], layout.names[layout.time]),
        separate_ids=layout.separate_ids,
        unit=layout.unit,
        features=np.concatenate(rows.features) if rows.features else None,
        feature_names=feature_names,
        labels=np.concatenate(rows.labels) if rows.labels else None,
        event_ids=rows.events if layout.event is not None else None,
        notes=layout.notes,
    )
