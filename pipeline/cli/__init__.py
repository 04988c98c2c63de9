"""The command `stepstream`: one verb a module, and nothing heavy imported before a verb runs."""

from __future__ import annotations

from typing import Annotated

import typer

from stepstream.pipeline.cli import (
    compare,
    dedupe,
    demo,
    describe,
    evaluate,
    inspect,
    models,
    replay,
    reset,
    run,
    topics,
    train,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="stepstream",
    help="Spatio-temporal models on live streams, one step at a time.",
    epilog="Exit codes: 0 done or stopped when asked to, 1 failed, 2 wrong use. Results: stdout. Logs: stderr.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help: rich's takes longer to import than everything else together.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"stepstream {version('stepstream')}")
        raise typer.Exit


@app.callback()
def _stepstream(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Spatio-temporal models on live streams, one step at a time."""


for _module in (demo, run, describe, inspect, replay, topics, reset, dedupe, compare, train, evaluate, models):
    _name = _module.__name__.rpartition(".")[2]
    app.command(_name, epilog=_module.EXAMPLES)(getattr(_module, _name))


def main() -> None:
    """The console script."""
    app()
