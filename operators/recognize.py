"""What a camera sees happening: `infer` for models of event frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
import torch

from stepstream.connectors.event_frames import EventFrame
from stepstream.connectors.records import Activity, Record
from stepstream.models.base import Tree
from stepstream.models.eventtransact import FrameForm
from stepstream.models.registry import load_model
from stepstream.operators.accumulate import Accumulate
from stepstream.operators.base import Context, Operator, OptionError
from stepstream.operators.decisions import BEGUN, ENDED, DecisionOptions, Decisions
from stepstream.operators.durations import format_duration, to_ns
from stepstream.operators.infer import Infer, InferOptions

__all__ = ["Recognize", "RecognizeOptions", "summed"]


class RecognizeOptions(InferOptions, DecisionOptions):
    """`model`: a registered name or `package.module:Name`. `weights`: a shipped name or a folder.

    The rest: see `DecisionOptions` and `InferOptions`.
    """

    model: str = "eventtransact"
    weights: Path


def summed(values: npt.NDArray[np.float32], height: int, width: int) -> npt.NDArray[np.float32]:
    """A frame [C, H, W] on a smaller sensor [C, height, width]: each pixel's counts go to the one it lies in."""
    rows, columns = (
        np.searchsorted(np.arange(have) * want // have, np.arange(want))
        for have, want in ((values.shape[1], height), (values.shape[2], width))
    )
    narrow = np.add.reduceat(values, columns, axis=2)
    return np.add.reduceat(narrow, rows, axis=1)


class Recognize(Infer):
    """Frames of events -> activities: one when it begins, one when it ends, and every `report` in between.

    Frames must be made as the weights' card says (`kind`, `every`, `window`): a frame of another kind or length is a
    dead letter. A sensor larger than the weights' is summed down to it (counted as "scaled"), a smaller one is a dead
    letter.

    A stream starts afresh, counted as "restarts" and by its reason, after a restart of the camera ("rebooted": another
    boot id), at a sensor of another size ("resized"), after a stretch without frames ("gap"), and when time goes back
    ("backwards"): an activity that went on ends with the last frame before it. Counted besides: "begun" and "ended".
    """

    Options = RecognizeOptions
    consumes: ClassVar[tuple[type, ...]] = (EventFrame,)
    emits: ClassVar[tuple[type, ...]] = (Activity,)

    options: RecognizeOptions

    def __init__(self, options: RecognizeOptions) -> None:
        loaded = load_model(options.model, options.weights)
        if loaded.model.task != "events":
            raise ValueError(f"model {options.model!r} is for {loaded.model.task}: one for events was expected")
        super().__init__(options, loaded.model)
        config: Any = loaded.model.config
        self.form = cast("FrameForm", config.frame)
        self.classes: tuple[str, ...] = tuple(config.classes)
        self.weights_hash = loaded.weights_hash
        self._decisions = Decisions(options, len(self.classes))
        self._context: Context | None = None  # of the call that is going on
        self.on_frame: Callable[[EventFrame, Mapping[str, Any]], None] | None = None
        """Told of each frame, with the memory of its stream after it (see `Decisions.fresh`): for a picture."""

    def connect(self, before: Sequence[Operator], behind: Sequence[Operator]) -> None:
        """Refuses weights that were trained on frames that `accumulate` does not make."""
        for operator in before:
            if isinstance(operator, Accumulate):
                made, form = operator.options, self.form
                every = 0 if made.every is None else to_ns(made.every) // 1000
                window = every if made.window is None else to_ns(made.window) // 1000
                if (made.kind, every, window) != (form.kind, form.every_us, form.window_us):
                    wanted = f"kind: {form.kind}, every: {form.every_us // 1000}ms, window: {form.window_us // 1000}ms"
                    raise OptionError("weights", str(self.options.weights), f"accumulate must have {{{wanted}}}")

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        """One step of the model for each frame; see the class for what is told."""
        self._context = context
        fit = []
        for record in records:
            fault = self._fault(record.value)
            if fault is None:
                fit.append(record)
            else:
                context.dead_letter(record, fault)
        return super().process(fit, context)

    def _fault(self, frame: EventFrame) -> str | None:
        form = self.form
        if frame.kind != form.kind or len(frame.values) != form.channels:
            return (
                f"kind: expected {form.kind} with {form.channels} channels, got {frame.kind} with {len(frame.values)}"
            )
        if frame.end_us - frame.start_us != form.window_us:
            return f"start_us, end_us: expected {form.window_us} us, got {frame.end_us - frame.start_us}"
        height, width = frame.values.shape[1:]
        if height < form.height or width < form.width:
            return f"values: expected a sensor of at least {form.width} x {form.height}, got {width} x {height}"
        return None

    def starts_afresh(self, record: Record) -> bool:
        """Whether what was seen before this frame has nothing to do with it."""
        frame: EventFrame = record.value
        memory = self.memory[record.key]
        step = frame.end_us - memory["end_us"]
        reason = None
        if frame.boot_id != memory["boot"]:
            reason = "rebooted"
        elif list(frame.values.shape) != memory["shape"]:
            reason = "resized"
        elif step != self.form.every_us:
            reason = "gap" if step > self.form.every_us else "backwards"
        if reason is not None and self._context is not None:
            self._context.count(reason)
        return reason is not None

    def fresh_memory(self) -> dict[str, Any]:
        """The last frame's boot id, shape and end; an activity that was cut off; the memory of `Decisions`."""
        return {"boot": 0, "shape": [], "end_us": 0, "cut": None, **self._decisions.fresh()}

    def lasting(self, memory: dict[str, Any]) -> dict[str, Any]:
        """An activity that went on has ended, which the next frame tells."""
        names = ("label", "onset", "seen", "confidence")
        return {"cut": {name: memory[name] for name in names} if memory["label"] >= 0 else None}

    def encode(self, records: Sequence[Record], context: Context) -> Tree:
        """The frames' values, [B, C, height, width]."""
        form = self.form
        values = []
        for record in records:
            frame: EventFrame = record.value
            memory = self.memory[record.key]
            memory["boot"], memory["shape"] = frame.boot_id, list(frame.values.shape)
            memory["end_us"] = frame.end_us
            if frame.values.shape[1:] == (form.height, form.width):
                values.append(frame.values)
            else:
                context.count("scaled")
                values.append(summed(frame.values, form.height, form.width))
        return torch.from_numpy(np.stack(values))

    def decode(self, record: Record, output: np.ndarray[Any, Any]) -> list[Any]:
        """What there is to tell after a frame."""
        frame: EventFrame = record.value
        memory = self.memory[record.key]
        logits = output.astype(np.float64)
        weights = np.exp(logits - logits.max())
        end = frame.end_us * 1000
        start = end - self.form.every_us * 1000
        told = self._decisions.take(memory, weights / weights.sum(), frame.events, start, end)
        if memory["cut"] is not None:
            told.insert(0, (ENDED, memory["cut"]))
            memory["cut"] = None
        for what, _ in told:
            if what in (BEGUN, ENDED) and self._context is not None:
                self._context.count(what)
        if self.on_frame is not None:
            self.on_frame(frame, memory)
        return [self._activity(memory, what, fields) for what, fields in told]

    def _activity(self, memory: dict[str, Any], what: str, fields: dict[str, Any]) -> Activity:
        probabilities = memory["mean"].astype(np.float32)
        probabilities.setflags(write=False)
        return Activity(
            label=self.classes[fields["label"]],
            confidence=fields["confidence"],
            onset_ns=fields["onset"],
            until_ns=fields["seen"],
            ongoing=what != ENDED,
            classes=self.classes,
            probabilities=probabilities,
            model=self.options.model,
            weights=self.weights_hash,
        )

    def describe(self) -> dict[str, Any]:
        """What is served, and on which frames."""
        form = self.form
        return {
            "model": self.options.model,
            "weights": self.weights_hash[:12],
            "classes": len(self.classes),
            "sensor": f"{form.width} x {form.height}",
            "frames": f"{form.kind}, every {form.every_us // 1000} ms, over {form.window_us // 1000} ms",
            "begin, end": f"{self.options.begin:g}, {self.options.end:g}, held {format_duration(self.options.hold)}",
            **super().describe(),
        }
