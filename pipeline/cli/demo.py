"""`stepstream demo`: the main job, on what is inside the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepstream.pipeline.cli.common import DebugOption, JsonOption, WrongUse, console, emit_json, verb

__all__ = ["demo"]

EXAMPLES = """\b
Examples:
  stepstream demo                           a week of Los Angeles traffic, forecast live
  stepstream demo --out la --days 2
  stepstream demo --json | jq .models
"""
DEMOS = ("traffic",)


@verb
def demo(
    name: Annotated[str, typer.Argument(help=f"Which demo: {', '.join(DEMOS)}.")] = "traffic",
    out: Annotated[
        Path, typer.Option("--out", help="The folder for summary.json, report.html and forecasts.parquet.")
    ] = Path("demo-out"),
    days: Annotated[
        float | None, typer.Option("--days", min=0.05, help="Only so many days of the recording.", show_default="all")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Replays the recording inside the package through the shipped weights and scores every forecast."""
    if name not in DEMOS:
        from stepstream.pipeline.registry import suggestion

        raise WrongUse(f"demo {name!r}: no such demo{suggestion(name, list(DEMOS))} (demos: {', '.join(DEMOS)})")
    from stepstream.pipeline.demo import run_demo

    summary = run_demo(out, days=days, console=console(stderr=as_json))
    if as_json:
        emit_json(summary)
