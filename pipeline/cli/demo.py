"""`stepstream demo`: what is inside the package, played through the shipped weights."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from stepstream.pipeline.cli.common import DebugOption, JsonOption, WrongUse, console, emit_json, verb

__all__ = ["demo"]

EXAMPLES = """\b
Examples:
  stepstream demo                           a week of Los Angeles traffic, forecast live
  stepstream demo --out la --days 2
  stepstream demo --json | jq .models
  stepstream demo lidar --out street        three seconds of a street: objects, tracks, a picture
  stepstream demo events                    gestures before an event camera, told as they begin and end
"""
DEMOS = {
    "traffic": "stepstream.pipeline.demo",
    "lidar": "stepstream.pipeline.demo_lidar",
    "events": "stepstream.pipeline.demo_events",
}
"""Name -> the module whose `run_demo(out, console=...)` it is; the first one is the default."""


@verb
def demo(
    name: Annotated[str, typer.Argument(help=f"Which demo: {', '.join(DEMOS)}.")] = "traffic",
    out: Annotated[
        Path, typer.Option("--out", help="The folder for summary.json, the report or picture, and the outputs.")
    ] = Path("demo-out"),
    days: Annotated[
        float | None,
        typer.Option("--days", min=0.05, help="Only so many days of the traffic recording.", show_default="all"),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Replays the recording inside the package through the shipped weights and says what came of it."""
    if name not in DEMOS:
        from stepstream.pipeline.registry import suggestion

        raise WrongUse(f"demo {name!r}: no such demo{suggestion(name, list(DEMOS))} (demos: {', '.join(DEMOS)})")
    if days is not None and name != "traffic":
        raise WrongUse(f"--days: is for the demo of traffic, not of {name}")
    options = {} if days is None else {"days": days}
    summary: dict[str, Any] = import_module(DEMOS[name]).run_demo(out, console=console(stderr=as_json), **options)
    if as_json:
        emit_json(summary)
