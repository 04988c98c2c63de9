"""`stepstream reset FILE`: processing from a time on, or from where another pipeline stands."""

from __future__ import annotations

import os
from datetime import timedelta
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

__all__ = ["reset"]

EXAMPLES = """\b
Examples:
  stepstream reset la.yaml --to-time 2026-03-01T06:00:00Z
  stepstream reset la.yaml --to-time 2026-03-01T06:00:00Z --set name=la-again --set sink.kafka.topic=again --yes
  stepstream reset la-new.yaml --to-group la --yes
"""


@verb
def reset(
    file: Annotated[Path, typer.Argument(help="A pipeline file (YAML).", show_default=False)],
    to_time: Annotated[
        str | None, typer.Option("--to-time", metavar="TIME", help="ISO 8601; of Kafka's timestamps.")
    ] = None,
    to_group: Annotated[
        str | None,
        typer.Option("--to-group", metavar="GROUP", help="Where that group (a pipeline's name) has committed."),
    ] = None,
    settings: SetOption = None,
    warm_up: Annotated[
        str | None,
        typer.Option(
            "--warm-up",
            metavar="DURATION",
            help="Make the state from so much of the log before the time.",
            show_default="all of it, or a snapshot",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without this it is only told what would happen.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Moves a Kafka pipeline, of which nothing runs, to a time, or to where another one stands.

    What comes from there on is processed and published.

    What was published of that already is published again, under the same ids. Give the pipeline another name and
    another output topic (--set), and both stand side by side.
    """
    from rich.table import Table

    from stepstream.pipeline.pipeline import Pipeline
    from stepstream.pipeline.reset import apply, group_of, plan

    if (to_time is None) == (to_group is None):
        raise WrongUse("expected either --to-time or --to-group")
    if warm_up is not None and to_time is None:
        raise WrongUse("--warm-up goes with --to-time")
    time_ns, before = None if to_time is None else _time(to_time), _duration(warm_up)
    use_current_folder()
    checked = Pipeline.from_file(file, settings or [], os.environ).config
    source, group = group_of(checked)
    moves = plan(checked, time_ns, to_group, before)
    if yes:
        apply(checked, moves)
    rows = [move.row() for move in moves]
    again, skipped = (sum(row[what] for row in rows) for what in ("again", "skipped"))
    if as_json:
        about = {
            "pipeline": checked.name,
            "group": group,
            "topic": source.topic,
            "to_time": to_time,
            "to_group": to_group,
        }
        emit_json({**about, "moved": yes, "again": again, "skipped": skipped, "partitions": rows})
        return
    table = Table(header_style="bold")
    for column in ("partition", "log", "committed", "goes to", "to publish", "again", "skipped", "state from"):
        table.add_column(column, no_wrap=True, justify="right")
    for row in rows:
        log = f"{number(row['first'])} to {number(row['end'])}"
        state = "a snapshot, or the log's beginning" if row["warm_from"] is None else number(row["warm_from"])
        shown = [number(row[name]) for name in ("committed", "offset", "to_publish", "again", "skipped")]
        table.add_row(str(row["partition"]), log, *shown, state)
    console().print(table)
    console().print(_meaning(checked.name, again, skipped), markup=False)
    if not yes:
        console(stderr=True).print("nothing was changed: --yes does it")


def _meaning(name: str, again: int, skipped: int) -> str:
    told = []
    if again:
        told.append(
            f"{number(again)} records were processed by {name} before: their outputs will stand twice in its topics, "
            "with the same ids. Another name and output topic (--set) keep them apart"
        )
    if skipped:
        told.append(f"{number(skipped)} records are passed over: no outputs of them are published")
    return "; ".join(told) or "nothing is published twice, and nothing is passed over"


def _time(text: str) -> int:
    from stepstream.connectors.base import InputError
    from stepstream.connectors.times import parse_time

    try:
        return parse_time(text)
    except InputError as error:
        raise WrongUse(f"--to-time {text}: {error}") from error


def _duration(text: str | None) -> timedelta | None:
    from stepstream.operators.durations import parse_duration

    if text is None:
        return None
    try:
        return parse_duration(text)
    except ValueError as error:
        raise WrongUse(f"--warm-up {text}: {error}") from error
