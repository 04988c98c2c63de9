"""`stepstream topics FILE`: what a pipeline needs on the broker."""

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
    emit_json,
    number,
    use_current_folder,
    verb,
)
from stepstream.pipeline.cli.run import SetOption

__all__ = ["topics"]

EXAMPLES = """\b
Examples:
  stepstream topics la.yaml
  stepstream topics la.yaml --create --partitions 16 --replication 3 --retention 7d
  stepstream topics la.yaml --json | jq '.topics[] | select(.exists | not)'
"""


@verb
def topics(
    file: Annotated[Path, typer.Argument(help="A pipeline file (YAML).", show_default=False)],
    settings: SetOption = None,
    create: Annotated[bool, typer.Option("--create", help="Make the topics that are not there.")] = False,
    partitions: Annotated[int, typer.Option("--partitions", min=1, help="Of topics that are made.")] = 1,
    replication: Annotated[
        int, typer.Option("--replication", min=-1, help="Of topics that are made; -1: the cluster's default.")
    ] = -1,
    retention: Annotated[
        str | None,
        typer.Option("--retention", help="Of topics that are made: 7d, 12h; the cluster's default without it."),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """The topics that a pipeline reads and writes, and whether they are there; with --create, makes those missing."""
    from rich.table import Table

    from stepstream.connectors.base import InputError
    from stepstream.pipeline.pipeline import Pipeline
    from stepstream.pipeline.topics import check_topics, create_topics, needed_topics

    retention_ms = _milliseconds(retention)
    use_current_folder()
    pipeline = Pipeline.from_file(file, settings or [], os.environ)
    needed = needed_topics(pipeline.config)
    if not needed:
        raise InputError(f"{pipeline.name} needs no topics: neither its source nor its sink is kafka")
    made: list[str] = []
    if create:
        made = create_topics(needed, partitions, replication, retention_ms)
    rows = check_topics(needed)
    if as_json:
        emit_json({"pipeline": pipeline.name, "created": made, "topics": rows})
        return
    table = Table(header_style="bold")
    for column in ("topic", "for", "partitions", ""):
        table.add_column(column, no_wrap=True)
    for row in rows:
        state = "created" if row["topic"] in made else "there" if row["exists"] else "missing"
        table.add_row(row["topic"], row["role"], number(row["partitions"]), row["problem"] or state)
    console().print(table)
    if not create and any(not row["exists"] for row in rows):
        console(stderr=True).print("--create makes the missing ones")


def _milliseconds(retention: str | None) -> int | None:
    from stepstream.operators.durations import parse_duration

    if retention is None:
        return None
    try:
        return round(parse_duration(retention).total_seconds() * 1000)
    except ValueError as error:
        raise WrongUse(f"--retention {retention}: {error}") from error
