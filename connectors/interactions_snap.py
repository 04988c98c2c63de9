"""Edge lists as SNAP publishes them: delimited text without a header, in one of two layouts.

"source destination time": temporal networks (https://snap.stanford.edu/data/CollegeMsg.html: "SRC DST UNIXTS", and
sx-mathoverflow, email-Eu-core-temporal, wiki-talk-temporal alike), whole numbers.
"source,target,rating,time": signed networks (https://snap.stanford.edu/data/soc-sign-bitcoin-otc.html), whose rating
from -10 to 10 becomes the one feature; times may be decimal there.
"""

from __future__ import annotations

import re
from pathlib import Path

from stepstream.connectors.base import InputError
from stepstream.connectors.interaction_rows import Layout, first_rows, read_head, read_rows
from stepstream.connectors.interactions import InteractionOptions, InteractionRecording

__all__ = ["InteractionsSnap"]

_DELIMITERS = (" ", "\t", ",")
_LOOKED_AT = 20
_WHOLE = re.compile(r"0|-?[1-9]\d{0,18}", re.ASCII)
_TIME = re.compile(r"\d{9,19}(\.\d+)?", re.ASCII)


def _is_temporal(row: list[str]) -> bool:
    """Three whole numbers, the last of which is no time before the beginning."""
    return len(row) == 3 and all(map(_WHOLE.fullmatch, row)) and not row[2].startswith("-")


def _is_signed(row: list[str]) -> bool:
    """Two whole numbers, a rating, and a time of this century in seconds: four small numbers may be anything."""
    return (
        len(row) == 4
        and all(map(_WHOLE.fullmatch, row[:3]))
        and -10 <= int(row[2]) <= 10
        and _TIME.fullmatch(row[3]) is not None
    )


def _layout(head: bytes) -> Layout | None:
    """What all of the first rows are; None if they are neither."""
    whole = head.endswith((b"\n", b"\r"))
    for delimiter in _DELIMITERS:
        rows = first_rows(head, delimiter, _LOOKED_AT)
        # The last row that the head shows may be cut off.
        rows = rows if whole or len(rows) < 2 else rows[:-1]
        if rows and all(map(_is_temporal, rows)):
            return Layout(("source", "destination", "time"), 0, 1, 2, delimiter=delimiter, header=0)
        if rows and all(map(_is_signed, rows)):
            names = ("source", "destination", "rating", "time")
            return Layout(names, 0, 1, 3, features=(2,), delimiter=delimiter, header=0)
    return None


class InteractionsSnap:
    """Reader of SNAP's edge lists."""

    name = "interactions-snap"
    modality = "graph"
    Options = InteractionOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether the first rows are of one of the two layouts."""
        return _layout(head) is not None

    @staticmethod
    def read(path: Path, options: InteractionOptions | None = None) -> InteractionRecording:
        """The recording; raises InputError naming the file, the row or column, and what was expected."""
        layout = _layout(read_head(path, _LOOKED_AT))
        if layout is None:
            raise InputError(
                f"{path}: row 1: expected whole numbers: source, destination, time, or with a rating third"
            )
        names = [layout.names[at] for at in layout.features]
        return read_rows(path, layout, InteractionsSnap.name, options or InteractionOptions(), names)
