"""`stepstream train MODEL`: fits a model to a recording; resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stepstream.pipeline.cli.common import (
    DebugOption,
    JsonOption,
    console,
    emit_json,
    key_values,
    known_model,
    options_from,
    verb,
    wrong_use_of,
)
from stepstream.pipeline.cli.progress import training_progress

__all__ = ["train"]

EXAMPLES = """\b
Examples:
  stepstream train sttn --data metr_la.npz --out weights/my-la
  stepstream train sttn --data pems-bay.h5 --out weights/bay --device cuda --minutes 30
  stepstream train sttn --data metr_la.npz --out weights/my-la       goes on where it was stopped
"""


@verb
def train(
    model: Annotated[str, typer.Argument(help="A model: see `stepstream models`.", show_default=False)],
    data: Annotated[Path, typer.Option("--data", help="A recording to train on.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The folder for weights and checkpoints.", show_default=False)],
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    minutes: Annotated[
        float | None, typer.Option("--minutes", min=0.0, help="Stop after so long.", show_default="until it is done")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Go on from the checkpoint in --out, or start anew.")
    ] = True,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the model or its training.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Fits a model to a recording. Stop it (Ctrl-C) and run it again: it goes on where it was."""
    known_model(model)
    from stepstream.pipeline.signals import stop_on_signals
    from stepstream.pipeline.training import train as fit

    options: dict[str, Any] = {**options_from(settings or []), "resume": resume}
    with wrong_use_of("--set"), stop_on_signals() as stop, training_progress(f"train {model}") as on_progress:
        summary = fit(
            model,
            data,
            out,
            device=device,
            minutes=minutes,
            seed=seed,
            options=options,
            on_progress=on_progress,
            stop=stop,
        )
    if as_json:
        emit_json(summary)
        return
    console().print(key_values({name.replace("_", " "): value for name, value in summary.items()}))
