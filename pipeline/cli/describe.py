"""`stepstream describe FILE`: a pipeline as a drawing."""

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
    use_current_folder,
    verb,
)
from stepstream.pipeline.cli.run import SetOption

__all__ = ["describe"]

EXAMPLES = """\b
Examples:
  stepstream describe la.yaml
  stepstream describe la.yaml --out la.svg          or .png
  stepstream describe la.yaml --json | jq '.operators[].receptive_field'
"""


@verb
def describe(
    file: Annotated[Path, typer.Argument(help="A pipeline file (YAML).", show_default=False)],
    settings: SetOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Draw into this file: .svg or .png.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Shows a pipeline: its parts and options, what flows between them, their state and receptive fields."""
    from stepstream.pipeline.drawing import draw, text
    from stepstream.pipeline.pipeline import Pipeline

    if out is not None and out.suffix.lower() not in (".svg", ".png"):
        raise WrongUse(f"--out {out}: expected a name that ends in .svg or .png")
    use_current_folder()
    description = Pipeline.from_file(file, settings or [], os.environ).describe()
    if out is not None:
        draw(description, out)
        description = {**description, "drawing": str(out)}
    if as_json:
        emit_json(description)
        return
    console().print(text(description))
    if out is not None:
        console(stderr=True).print(f"drawn in {out}", markup=False)
