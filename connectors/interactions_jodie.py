"""The csv layout of JODIE (Kumar et al., KDD 2019; https://snap.stanford.edu/jodie): Wikipedia, Reddit, MOOC, LastFM.

The header has five names, `user_id,item_id,timestamp,state_label,comma_separated_list_of_features`; a row has four
fields and then its features, as many as it likes, the same number in every row. Users and items are both counted from
0 and are two id spaces: nodes are called "user:0" and "item:0". Times are seconds from the first event, `state_label`
is what is to be predicted (a ban, a dropout) and no feature.
"""

from __future__ import annotations

from pathlib import Path

from stepstream.connectors.base import InputError
from stepstream.connectors.interaction_rows import Layout, first_rows, read_head, read_rows
from stepstream.connectors.interactions import InteractionOptions, InteractionRecording

__all__ = ["InteractionsJodie"]

_FIRST = ("user_id", "item_id", "timestamp", "state_label")


def _is_header(cells: list[str]) -> bool:
    names = [cell.strip().lower() for cell in cells]
    return len(names) == 5 and tuple(names[:4]) == _FIRST and "list_of_features" in names[4]


class InteractionsJodie:
    """Reader of JODIE's csv files."""

    name = "interactions-jodie"
    modality = "graph"
    Options = InteractionOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether it starts with JODIE's header."""
        rows = first_rows(head, count=1)
        return bool(rows) and _is_header(rows[0])

    @staticmethod
    def read(path: Path, options: InteractionOptions | None = None) -> InteractionRecording:
        """The recording; raises InputError naming the file, the row or column, and what was expected."""
        rows = first_rows(read_head(path, 2))
        if not rows or not _is_header(rows[0]):
            raise InputError(f"{path}: header: expected {','.join(_FIRST)},comma_separated_list_of_features")
        row = rows[1] if len(rows) > 1 else []
        if len(row) < len(_FIRST):
            raise InputError(f"{path}: row 2: expected at least {len(_FIRST)} fields, got {len(row)}")
        width = len(row) - len(_FIRST)
        names = [f"feature_{i}" for i in range(width)]
        layout = Layout(
            names=(*_FIRST, *names),
            source=0,
            destination=1,
            time=2,
            label=3,
            features=tuple(range(len(_FIRST), len(row))),
            separate_ids=True,
        )
        return read_rows(path, layout, InteractionsJodie.name, options or InteractionOptions(), names)
