"""The last score of each model at each horizon, seen passing by or read from what a run wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepstream.connectors.records import Record, Score

__all__ = ["LastScores"]

_TAIL = 1 << 18


class LastScores:
    """Keeps the newest `Score` of each (key, model, weights, horizon), as dicts of its fields and the key."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str, str, int], dict[str, Any]] = {}

    def see(self, records: Sequence[Record]) -> None:
        """Takes outputs, in order."""
        for record in records:
            score = record.value
            if isinstance(score, Score):
                fields = {name: getattr(score, name) for name in Score.__slots__}
                self._last[record.key, score.model, score.weights, score.horizon_s] = {"key": record.key, **fields}

    def fill_from(self, path: Path) -> None:
        """If nothing was seen (the run was complete already): the newest ones in the last 256 kB of a scores file."""
        if self._last or not path.is_file():
            return
        with path.open("rb") as file:
            start = max(0, path.stat().st_size - _TAIL)
            file.seek(start)
            lines = file.read(_TAIL).splitlines()
        for line in lines[1 if start else 0 :]:
            try:
                fields = json.loads(line)
                key = (fields["key"], fields["model"], fields["weights"], fields["horizon_s"])
                values = {name: fields[name] for name in Score.__slots__}
            except (ValueError, KeyError, TypeError):
                continue
            for name in ("mae", "rmse", "mape", "window_mae", "window_rmse", "window_mape"):
                values[name] = float("nan") if values[name] is None else values[name]
            self._last[key] = {"key": fields["key"], **values}

    def rows(self) -> list[dict[str, Any]]:
        """By key, model, weights and horizon."""
        return [self._last[known] for known in sorted(self._last)]
