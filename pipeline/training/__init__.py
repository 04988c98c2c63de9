"""Training and evaluation, by the published protocol of each model's task."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from stepstream.connectors.base import InputError

__all__ = ["EvaluationRun", "TrainingRun", "evaluate", "train"]

EVENT_CLASSIFIERS = ("sltt", "convs5-events")
"""Models of event frames that `event_classifiers` trains and evaluates."""

T = TypeVar("T")
Progress = Callable[[Mapping[str, Any]], None]

_TASKS = {
    "traffic": ("traffic", "traffic"),
    "graph": ("graph_fit", "graph"),
    "events": ("event_fit", "events"),
    "lidar": ("lidar", "lidar"),
    "detection": ("lidar_detector", "detector_scores"),
}
"""Task -> the module beside this one that trains its models, and the one that evaluates them."""


def resolve_device(device: str) -> str:
    """The device to use; "auto" is CUDA where there is one. Raises InputError for a device that is not there."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device}: {str(error).splitlines()[0]}") from None
    return device


def checked(kind: type[T], options: Mapping[str, Any]) -> T:
    """The dataclass `kind` made from `options`; raises InputError naming an unknown option or a wrong value."""
    known = [field.name for field in fields(cast("Any", kind))]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise InputError(f"--set {name}: there is no such option; {hint}")
    try:
        return TypeAdapter(kind).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InputError(f"--set {name}={first.get('input')!r:.40}: {first['msg']}") from None


@dataclass(frozen=True)
class TrainingRun:
    """What `train` was asked for, its device found, as the module of a task trains it.

    `options`: what is set, "resume" taken out. `resume`: whether it goes on with what stands in `out`.
    """

    model: str
    data: Path
    out: Path
    device: str
    seed: int
    options: Mapping[str, Any]
    resume: bool
    on_progress: Progress | None
    stop: Event

    def checked(self, kind: type[T], options: Mapping[str, Any]) -> T:
        """The training options `kind` on this device and with this seed; raises InputError as `checked` does."""
        return checked(kind, {"device": self.device, "seed": self.seed, **options})

    def clear(self) -> None:
        """Removes what an earlier training left, unless this one goes on with it."""
        if not self.resume:
            for name in ("checkpoint.pt", "best.pt", "log.jsonl"):
                (self.out / name).unlink(missing_ok=True)

    def report(self, progress: Mapping[str, Any]) -> None:
        """Tells whoever wants to know."""
        if self.on_progress is not None:
            self.on_progress(progress)


@dataclass(frozen=True)
class EvaluationRun:
    """What `evaluate` was asked for, its device found, as the module of a task evaluates it."""

    model: str
    data: Path
    weights: str | Path | None
    device: str
    options: Mapping[str, Any]
    on_progress: Progress | None

    def chosen(self, **defaults: Any) -> list[Any]:
        """The options that there are, in this order. Raises InputError if another one is set."""
        for name in self.options:
            if name not in defaults:
                known = f"known {'is' if len(defaults) == 1 else 'are'} {', '.join(defaults)}"
                raise InputError(f"--set {name}: there is no such option; {known}")
        return [self.options.get(name, default) for name, default in defaults.items()]

    def report(self, progress: Mapping[str, Any]) -> None:
        """Tells whoever wants to know."""
        if self.on_progress is not None:
            self.on_progress(progress)


def train(
    model: str,
    data: Path,
    out: Path,
    *,
    device: str = "auto",
    minutes: float | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
    stop: Event | None = None,
) -> dict[str, Any]:
    """Trains `model` on a recording into the folder `out`, or goes on with the training that stands there.

    `options`: fields of the model's training options; "resume": False starts anew. Returns the card's scores and
    where things are. Raises InputError for what cannot be trained.
    """
    given = dict(options or {})
    resume = bool(given.pop("resume", True))
    if minutes is not None:
        given["minutes"] = minutes
    fit = import_module(f"{__name__}.{_modules(model)[0]}")
    run = TrainingRun(model, data, out, resolve_device(device), seed, given, resume, on_progress, stop or Event())
    found: dict[str, Any] = fit.train(run)
    return found


def evaluate(
    model: str,
    data: Path,
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    options: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores a model or baseline on a recording: {model, task, split, metrics, baselines, ...}.

    `options`: "split" (test), and of traffic "graph_file", of graphs "window" and "time_unit", of lidar "poses" and
    "taxonomy", of detectors "score" and "ground". Raises InputError or WeightsError for what cannot be evaluated.
    """
    task = import_module(f"{__name__}.{_modules(model)[1]}")
    run = EvaluationRun(model, data, weights, resolve_device(device), options or {}, on_progress)
    found: dict[str, Any] = task.evaluate(run)
    return found


def _modules(model: str) -> tuple[str, str]:
    return ("event_classifiers",) * 2 if model in EVENT_CLASSIFIERS else _TASKS[_task(model)]


def _task(model: str) -> str:
    """What a model is for; what is not registered (ridge) is fitted to traffic."""
    from stepstream.models.registry import model_class
    from stepstream.models.weights import WeightsError

    try:
        return model_class(model).task
    except WeightsError:
        return "traffic"
