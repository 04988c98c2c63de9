"""`stepstream models`: every model and baseline."""

from __future__ import annotations

from typing import Any

from stepstream.pipeline.cli.common import DebugOption, JsonOption, console, emit_json, verb

__all__ = ["models"]

EXAMPLES = """\b
Examples:
  stepstream models
  stepstream models --json | jq '.models[].name'
"""


@verb
def models(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Every model and baseline: its task, receptive field, exactness of the step form, shipped weights."""
    from stepstream.models.registry import catalogue

    entries: list[dict[str, Any]] = list(catalogue())
    if as_json:
        emit_json({"models": entries})
        return
    from rich.table import Table

    table = Table(header_style="bold")
    for column in ("name", "task", "kind", "receptive field", "exactness", "weights", "what it is"):
        table.add_column(column, overflow="fold", no_wrap=column in ("name", "task", "kind"))
    for entry in entries:
        field = entry.get("receptive_field")
        table.add_row(
            str(entry["name"]),
            str(entry["task"]),
            str(entry["kind"]),
            "unbounded" if field is None else str(field),
            str(entry.get("exactness") or "-"),
            ", ".join(entry.get("weights") or []) or "-",
            str(entry.get("summary") or ""),
        )
    console().print(table)
