"""Edge lists as delimited text with a header that names a source, a destination and a time, in any order.

Comma, tab, semicolon and blank are taken as delimiters. A column `event_id` names the events, `label` what is to be
predicted; every other column whose first value is a number is a feature. Columns of text and row numbers (idx) are not
read.
"""

from __future__ import annotations

import re
from pathlib import Path

from stepstream.connectors.base import InputError
from stepstream.connectors.interaction_columns import Roles, find_roles, looks_like_edges
from stepstream.connectors.interaction_rows import Layout, first_rows, read_head, read_rows
from stepstream.connectors.interactions import InteractionOptions, InteractionRecording
from stepstream.connectors.times import parse_time

__all__ = ["InteractionsCsv"]

_DELIMITERS = (",", "\t", ";", " ")
_LOOKED_AT = 100  # rows that say whether a column holds numbers
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?inf(inity)?|nan", re.ASCII | re.IGNORECASE)


def _delimiter(head: bytes) -> str | None:
    """The delimiter that makes a header of edges of the first line."""
    for delimiter in _DELIMITERS:
        rows = first_rows(head, delimiter, 1)
        if rows and looks_like_edges(rows[0]):
            return delimiter
    return None


def _is_time(cell: str) -> bool:
    cell = cell.strip()
    if _NUMBER.fullmatch(cell):
        return True
    try:
        parse_time(cell)
    except InputError:
        return False
    return True


def _plausible(header: list[str], row: list[str]) -> bool:
    """Whether a row could be an edge: u and v of a wind are names of two columns too, and hold fractions."""
    try:
        roles = find_roles(header)
    except InputError:
        return True  # it names them, if not in a way that can be used: `read` says why
    if len(row) != len(header):
        return True
    ids = (row[roles.source].strip(), row[roles.destination].strip())
    return _is_time(row[roles.time]) and not any(_NUMBER.fullmatch(i) and "." in i for i in ids)


def _numeric(rows: list[list[str]], at: int) -> bool:
    """Whether the first value of a column is a number: then all of them have to be."""
    first = next((row[at].strip() for row in rows if at < len(row) and row[at].strip()), "")
    return _NUMBER.fullmatch(first) is not None


def _layout(header: list[str], rows: list[list[str]], roles: Roles, delimiter: str) -> Layout:
    features = tuple(at for at in roles.others if _numeric(rows, at))
    label = roles.label if roles.label is not None and _numeric(rows, roles.label) else None
    read = {*roles.needed, roles.event, label, *features}
    left = [name.strip() or "(no name)" for at, name in enumerate(header) if at not in read]
    notes = [f"columns that are not read: {', '.join(left)[:200]}"] if left else []
    return Layout(
        names=tuple(name.strip() for name in header),
        source=roles.source,
        destination=roles.destination,
        time=roles.time,
        event=roles.event,
        label=label,
        features=features,
        delimiter=delimiter,
        separate_ids=roles.separate_ids,
        unit=roles.unit,
        notes=tuple(notes),
    )


class InteractionsCsv:
    """Reader of edge lists in csv."""

    name = "interactions-csv"
    modality = "graph"
    Options = InteractionOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether the header names a source, a destination and a time, and the first row could be an edge."""
        delimiter = _delimiter(head)
        if delimiter is None:
            return False
        rows = first_rows(head, delimiter)
        return len(rows) < 2 or _plausible(rows[0], rows[1])

    @staticmethod
    def read(path: Path, options: InteractionOptions | None = None) -> InteractionRecording:
        """The recording; raises InputError naming the file, the row or column, and what was expected."""
        head = read_head(path, 1 + _LOOKED_AT)
        delimiter = _delimiter(head) or ","
        rows = first_rows(head, delimiter, 1 + _LOOKED_AT)
        if not rows:
            raise InputError(f"{path}: expected a header and rows, the file is empty or no text")
        header = rows[0]
        try:
            roles = find_roles(header)
        except InputError as error:
            raise InputError(f"{path}: header: {error}") from None
        layout = _layout(header, rows[1:], roles, delimiter)
        names = [layout.names[at] for at in layout.features]
        return read_rows(path, layout, InteractionsCsv.name, options or InteractionOptions(), names)
