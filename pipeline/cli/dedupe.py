"""`stepstream dedupe SRC DEST`: a topic without its repeats."""

from __future__ import annotations

from typing import Annotated

import typer

from stepstream.pipeline.cli.common import (
    DebugOption,
    JsonOption,
    WrongUse,
    console,
    emit_json,
    key_values,
    verb,
)
from stepstream.pipeline.cli.progress import record_progress
from stepstream.pipeline.cli.replay import kafka_options

__all__ = ["dedupe"]

EXAMPLES = """\b
Examples:
  stepstream dedupe traffic.forecasts traffic.forecasts.once --servers broker:9092
  stepstream dedupe traffic.forecasts traffic.forecasts.once --until-end --json | jq .repeats
"""


@verb
def dedupe(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A topic that was written at least once.")],
    to: Annotated[str, typer.Argument(metavar="DEST", help="The topic to write to, once each.")],
    servers: Annotated[
        str, typer.Option("--servers", envvar="STEPSTREAM_SERVERS", help="The brokers: host:port,...")
    ] = "127.0.0.1:9092",
    window: Annotated[
        int, typer.Option("--window", min=1, help="How many offsets of an input partition are remembered.")
    ] = 100_000,
    group: Annotated[
        str | None, typer.Option("--group", help="Where it goes on is kept under this name.", show_default="dedupe.*")
    ] = None,
    until_end: Annotated[bool, typer.Option("--until-end", help="Stop at the end that SRC has now.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Of the connection, such as security.protocol=SSL."),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Copies a topic without its repeats, exactly once: what `engine: faust` publishes after a crash comes again.

    Ctrl-C or SIGTERM stops it cleanly; run it again and it goes on where it was.
    """
    from pydantic import ValidationError

    from stepstream.connectors.kafka_client import Connection
    from stepstream.pipeline.dedupe import Deduper
    from stepstream.pipeline.signals import stop_on_signals

    try:
        connection = Connection.model_validate(kafka_options(servers, settings or []))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "security"
        raise WrongUse(f"{where}: {first['msg']}") from None
    copier = Deduper(connection, source, to, window=window, group=group)
    with stop_on_signals() as stop, record_progress(f"dedupe {source}") as on_progress:
        summary = copier.run(stop, until_end=until_end, on_progress=on_progress)
    if as_json:
        emit_json(summary)
    else:
        console().print(key_values(summary))
