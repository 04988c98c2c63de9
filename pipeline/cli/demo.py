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
  stepstream demo lidar --out street        three seconds of a street: objects, tracks, a picture
"""
DEMOS = ("traffic", "lidar")


@verb
def demo(
    name: Annotated[str, typer.Argument(help=f"Which demo: {', '.join(DEMOS)}.")] = "traffic",
    out: Annotated[Path, typer.Option("--out", help="The folder for the outputs and summary.json.")] = Path("demo-out"),
    days: Annotated[
        float | None, typer.Option("--days", min=0.05, help="Only so many days of traffic.", show_default="all")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Replays a recording inside the package: a week of traffic, forecast live and scored, or a street in LiDAR."""
    if name not in DEMOS:
        from stepstream.pipeline.registry import suggestion

        raise WrongUse(f"demo {name!r}: no such demo{suggestion(name, list(DEMOS))} (demos: {', '.join(DEMOS)})")
    if name == "lidar":
        if days is not None:
            raise WrongUse(f"--days {days:g}: is for the demo traffic")
        from stepstream.pipeline.lidar_demo import run_lidar_demo

        summary = run_lidar_demo(out, console=console(stderr=as_json))
    else:
        from stepstream.pipeline.demo import run_demo

        summary = run_demo(out, days=days, console=console(stderr=as_json))
    if as_json:
        emit_json(summary)
