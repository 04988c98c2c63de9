"""Progress on stderr, only where stderr is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from stepstream.pipeline.cli.common import number, progress_console

__all__ = ["record_progress", "training_progress"]


@contextmanager
def record_progress(text: str) -> Iterator[Callable[[int, int | None], None] | None]:
    """A bar for (records done, all records or None); yields None if nobody would see it."""
    console = progress_console()
    if console is None:
        yield None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("records"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    ) as progress:
        bar = progress.add_task(text, total=None)

        def update(done: int, total: int | None) -> None:
            progress.update(bar, completed=done, total=total)

        yield update


@contextmanager
def training_progress(text: str) -> Iterator[Callable[[Mapping[str, Any]], None] | None]:
    """A bar for {"fraction": 0..1, anything: number}; what is not the fraction is shown beside it.

    Yields None if nobody would see it.
    """
    console = progress_console()
    if console is None:
        yield None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[shown]}"),
        console=console,
        transient=True,
    ) as progress:
        bar = progress.add_task(text, total=None, shown="")

        def update(now: Mapping[str, Any]) -> None:
            fraction = now.get("fraction")
            shown = "  ".join(f"{name} {number(value)}" for name, value in now.items() if name != "fraction")
            progress.update(
                bar,
                completed=0.0 if fraction is None else float(fraction),
                total=None if fraction is None else 1.0,
                shown=shown,
            )

        yield update
