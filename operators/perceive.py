"""Sweeps -> what each point is and what the next map will be: a Parallel Perception Network on a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from stepstream.connectors.records import Record, Sweep
from stepstream.connectors.sweep_checks import sweep_fault
from stepstream.models.base import Tree, state_bytes_per_stream
from stepstream.models.ppn import PPN
from stepstream.models.ppn_parallel import runner_for
from stepstream.models.registry import load_model
from stepstream.models.weights import WeightsError
from stepstream.operators import base
from stepstream.operators.base import Context, Operator, OptionError, State
from stepstream.operators.bev import EncodedSweep, Placement, encode, placement
from stepstream.operators.durations import Duration, format_duration, to_ns
from stepstream.operators.grid import Grid
from stepstream.operators.infer import StateRows
from stepstream.operators.perception import Perception

__all__ = ["Perceive", "PerceiveOptions"]

_MAX_METRES = 100_000.0


class PerceiveOptions(base.Options):
    """`model`: a registered name or `package.module:Name`. `weights`: a shipped name or a folder.

    `ground`: height of the ground in the sensor's frame, metres (None: that of the weights). `max_gap`: a longer time
    without a sweep begins the history anew. `parallel`: `sequential`, `processes` (two, of a CPU) or `streams` (CUDA);
    outputs do not depend on it. `device`: where the model runs; `second_device`: where reconstruction does. `priors`:
    how many times as common classes are as where the weights were trained, or how many times as costly to miss; the
    probabilities of points are those of the network with it (Saerens et al., "Adjusting the outputs of a classifier to
    new a priori probabilities", Neural Computation 14, 2002, eq. 2.4).
    """

    model: str = "ppn"
    weights: Path
    ground: float | None = Field(None, ge=-_MAX_METRES, le=_MAX_METRES)
    max_gap: Duration = Field(timedelta(seconds=1), gt=timedelta(0))
    parallel: Literal["sequential", "processes", "streams"] = "sequential"
    device: str = "cpu"
    second_device: str | None = None
    priors: dict[str, Annotated[float, Field(gt=0, le=1000)]] = Field(default_factory=dict)


class Perceive(Operator):
    """One `Perception` for each `Sweep`, at its event time; the history of maps is state, by key.

    Streams are stepped one at a time, so that outputs are the same to the bit however the stream is cut. Where the
    weights align maps in the world, what is kept moves by whole strides of the network as the sensor drives on, and
    every sweep needs a pose.

    Counted: "steps", "empty" (sweeps without a return, which are steps: nothing was seen), "no_return" (points that are
    NaN or infinite), "outside" (points out of the range of the map, which are class "none"), "duplicate" (a sweep at
    the time of the last one: thrown away), "restarts" (of the history, after `max_gap`), "worker_restarts" (the second
    process died and was replaced). Dead-lettered: sweeps that are not valid, from the past, or without a needed pose.
    """

    Options: ClassVar[type[base.Options]] = PerceiveOptions
    consumes: ClassVar[tuple[type, ...]] = (Sweep,)
    emits: ClassVar[tuple[type, ...]] = (Perception,)

    options: PerceiveOptions

    def __init__(self, options: PerceiveOptions) -> None:
        loaded = load_model(options.model, options.weights)
        model = loaded.model
        if not isinstance(model, PPN):
            task = loaded.card.task
            raise WeightsError(f"model {options.model!r} is for {task}: a perception network was expected")
        self.options, self.model, self.weights_hash = options, model, loaded.weights_hash
        self.runner = runner_for(model, options.parallel, options.device, options.second_device)
        self._config = model.config
        names = self._config.classes[1:]
        for name in options.priors:
            if name not in names:
                reason = f"no class of {options.weights}: one of {', '.join(names)} was expected"
                raise OptionError("priors", name, reason)
        priors = torch.tensor([options.priors.get(name, 1.0) for name in names])
        self._priors = priors.log().to(options.device) if options.priors else None
        self._ground = self._config.ground if options.ground is None else options.ground
        self._max_gap = to_ns(options.max_gap)
        self._rows = StateRows(self.runner, options.device)
        self._times: dict[str, int] = {}
        self._corners: dict[str, tuple[int, int]] = {}
        self.on_perception: Callable[[Perception], None] | None = None
        """Sees what is made, as it is made."""

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        """One perception a sweep that can be used."""
        return [
            record.derive(0, self._perceived(record, context)) for record in records if self._usable(record, context)
        ]

    def _usable(self, record: Record, context: Context) -> bool:
        sweep: Sweep = record.value
        fault = sweep_fault(sweep)
        last = self._times.get(record.key)
        if fault is None and last is not None and record.time_ns < last:
            fault = f"time: expected a sweep after {last}, the last one of {record.key!r}, got {record.time_ns}"
        if fault is None and sweep.pose is None and self._config.aligned:
            fault = f"pose: expected one, as {self.options.weights} aligns maps in the world, there is none"
        if fault is not None:
            context.dead_letter(record, fault)
            return False
        if last == record.time_ns:
            context.count("duplicate")
            return False
        return True

    def _perceived(self, record: Record, context: Context) -> Perception:
        sweep: Sweep = record.value
        place = self._placed(record, context)
        coded = encode(self._config, sweep.points, sweep.intensity, self._ground, place)
        if not coded.returns:
            context.count("empty")
        if coded.returns < len(sweep.points):
            context.count("no_return", len(sweep.points) - coded.returns)
        if coded.inside < coded.returns:
            context.count("outside", coded.returns - coded.inside)
        before = self.runner.restarts
        y = self._step(record.key, coded)
        if self.runner.restarts > before:
            context.count("worker_restarts", self.runner.restarts - before)
        context.count("steps")
        logits = y["classes"][0]
        classes, scores = _decided(logits if self._priors is None else logits + self._priors, coded.cell)
        seen = Perception(
            sweep,
            self._config.classes,
            classes,
            scores,
            self.options.model,
            self.weights_hash,
            self._expected(y["occupied"][0, 1], coded, sweep, place),
        )
        if self.on_perception is not None:
            self.on_perception(seen)
        return seen

    def _placed(self, record: Record, context: Context) -> Placement:
        """Where the sweep lies; the key's history is made ready for it."""
        key, pose = record.key, record.value.pose
        last = self._times.get(key)
        self._times[key] = record.time_ns
        place = placement(self._config, pose) if self._config.aligned else Placement()
        if last is None:
            self._rows.row(key)
        elif record.time_ns - last > self._max_gap:
            self._rows.reset(key)
            context.count("restarts")
        elif place.corner != (corner := self._corners[key]):
            # The map goes on by so many cells, so what is in it goes back.
            by = (corner[0] - place.corner[0], corner[1] - place.corner[1])
            self.model.move(self._rows.state, self._rows.row(key), by)
        self._corners[key] = place.corner
        return place

    def _step(self, key: str, coded: EncodedSweep) -> Tree:
        device = self.options.device
        x = {
            "map": torch.from_numpy(coded.cells)[None].to(device),
            "cell": torch.from_numpy(coded.cell)[None].to(device),
            "points": torch.from_numpy(coded.points)[None].to(device),
        }
        row = torch.tensor([self._rows.row(key)], device=device)
        return self.runner.step(x, self._rows.state, row)

    def _expected(self, logits: torch.Tensor, coded: EncodedSweep, sweep: Sweep, place: Placement) -> Grid:
        """The next map, in the frame of the sweep, or in the world's where maps are aligned."""
        c = self._config
        cells = logits.sigmoid().cpu().numpy()
        cells.setflags(write=False)
        bottom = c.low[2] + c.above * c.size[2]
        size = (c.size[0], c.size[1], c.low[2] + c.cells[2] * c.size[2] - bottom)
        if not c.aligned:
            return Grid(cells, (c.low[0], c.low[1], bottom + self._ground), size, coded.inside, sweep.frame, sweep.pose)
        assert sweep.pose is not None
        low = tuple(c.low[axis] + place.corner[axis] * c.size[axis] for axis in range(2))
        height = bottom + self._ground + float(sweep.pose[2, 3])
        return Grid(cells, (low[0], low[1], height), size, coded.inside, "world", np.eye(4))

    def keys(self) -> Iterable[str]:
        """The keys that a sweep was used of."""
        return list(self._times)

    def snapshot(self, key: str) -> State:
        """The last maps, or what the networks made of them; the time of the last sweep, and where its map lies."""
        return {
            "model": self._rows.read(key),
            "time_ns": self._times[key],
            "corner": list(self._corners[key]),
        }

    def restore(self, key: str, state: State) -> None:
        """The inverse of `snapshot`. Raises ValueError naming what does not fit."""
        if set(state) != {"model", "time_ns", "corner"}:
            raise ValueError(f"the saved state of {key!r} holds {sorted(state)}: it is not one of perceive")
        self._rows.write(key, state["model"])
        self._times[key] = int(state["time_ns"])
        self._corners[key] = (int(state["corner"][0]), int(state["corner"][1]))

    def drop(self, key: str) -> None:
        """Frees the state of a key."""
        self._rows.close(key)
        self._times.pop(key, None)
        self._corners.pop(key, None)

    def describe(self) -> dict[str, Any]:
        """What is served, and how."""
        c = self._config
        return {
            "model": self.options.model,
            "architecture": c.architecture,
            "weights": self.weights_hash[:12],
            "classes": len(c.classes) - 1,
            "map": list(c.cells),
            "cell": list(c.size),
            "aligned": c.aligned,
            "receptive_field": self.model.receptive_field,
            "max_gap": format_duration(self.options.max_gap),
            "parallel": self.options.parallel,
            "state_bytes_per_stream": state_bytes_per_stream(self._rows.state),
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }


def _decided(
    logits: torch.Tensor, cell: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """The likeliest class of each point and its probability; class 0 for points out of the map."""
    best = logits.softmax(1).max(1)
    inside = cell >= 0
    classes = np.where(inside, best.indices.cpu().numpy() + 1, 0).astype(np.uint8)
    scores = np.where(inside, best.values.cpu().numpy(), 0).astype(np.float32)
    for array in (classes, scores):
        array.setflags(write=False)
    return classes, scores
