"""`stepstream compare ONE TWO`: the scores of two pipelines, side by side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from stepstream.pipeline.cli.common import (
    DebugOption,
    JsonOption,
    WrongUse,
    console,
    duration,
    emit_json,
    number,
    use_current_folder,
    verb,
)

__all__ = ["compare"]

EXAMPLES = """\b
Examples:
  stepstream compare la.yaml la-shadow.yaml
  stepstream compare la.yaml la-shadow.yaml --since 2026-03-01T06:00:00Z --json | jq '.rows[].difference'
"""


@verb
def compare(
    one: Annotated[Path, typer.Argument(help="The pipeline that is live.", show_default=False)],
    two: Annotated[Path, typer.Argument(help="The one beside it.", show_default=False)],
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="Only scores of this event time and later.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Which of two pipelines over the same input forecasts better, from the scores that both have published."""
    from rich.table import Table

    from stepstream.connectors.base import InputError
    from stepstream.connectors.times import parse_time
    from stepstream.pipeline.compare import compare as rows_of
    from stepstream.pipeline.pipeline import Pipeline

    try:
        since_ns = None if since is None else parse_time(since)
    except InputError as error:
        raise WrongUse(f"--since {since}: {error}") from error
    use_current_folder()
    first, second = (Pipeline.from_file(path, [], os.environ).config for path in (one, two))
    rows = rows_of(first, second, since_ns)
    if as_json:
        emit_json({"one": first.name, "two": second.name, "rows": rows})
        return
    table = Table(header_style="bold")
    for column in ("network", "horizon", "models", "scores", "MAE", "", "difference", "lower", "covered", ""):
        table.add_column(column, no_wrap=True, justify="left" if column in ("network", "models") else "right")
    for row in rows:
        percent = "-" if row["difference"] is None else f"{row['difference']:+.1%}"
        covered = ["-" if value is None else f"{value:.1%}" for value in row["covered"]]
        models = " / ".join(row["models"])
        table.add_row(
            row["key"],
            duration(row["horizon_s"]),
            models,
            number(row["scores"]),
            *(number(value) for value in row["mae"]),
            percent,
            f"{row['better']} times",
            *covered,
        )
    console().print(f"{first.name} / {second.name}, {rows[0]['from']} to {rows[0]['to']}", markup=False)
    console().print(table)
