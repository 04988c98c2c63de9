"""Training and evaluation, by the published protocol of each model's task."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from threading import Event
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from stepstream.connectors.base import InputError

__all__ = ["evaluate", "train"]

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
    found: dict[str, Any] = fit.train(
        model, data, out, resolve_device(device), seed, given, resume, on_progress, stop or Event()
    )
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
    found: dict[str, Any] = task.evaluate(
        model, data, weights, resolve_device(device), dict(options or {}), on_progress
    )
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
