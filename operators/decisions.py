"""From probabilities frame by frame to activities with a beginning and an end."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from stepstream.operators import base
from stepstream.operators.durations import Duration, to_ns

__all__ = ["BEGUN", "ENDED", "GOES_ON", "DecisionOptions", "Decisions"]

BEGUN, GOES_ON, ENDED = "begun", "goes_on", "ended"
NONE = -1


class DecisionOptions(base.Options):
    """`begin`, `end`: an activity begins once its confidence is at least `begin` for `hold`, and ends once it is below
    `end` for `hold`, or another one begins.

    Confidence is the class's probability, averaged over the past with weights exp(-age / `smooth`). `report`: how often
    an activity that goes on is told again (None: never). `min_events`: a frame with fewer shows nothing: all classes
    are alike in it.
    """

    begin: float = Field(0.6, gt=0, le=1)
    end: float = Field(0.35, ge=0, lt=1)
    hold: Duration = Field(timedelta(milliseconds=60), ge=timedelta(0))
    smooth: Duration = Field(timedelta(milliseconds=100), ge=timedelta(0))
    report: Duration | None = Field(timedelta(seconds=1), gt=timedelta(0))
    min_events: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _hysteresis(self) -> DecisionOptions:
        if self.end >= self.begin:
            raise ValueError(f"end: expected below begin ({self.begin}), got {self.end}")
        return self


class Decisions:
    """The rules of `DecisionOptions` on one stream's memory, a dict of numpy arrays and JSON values.

    Times are nanoseconds. The onset of an activity is when the first frame began of the unbroken run of frames, up to
    the one in which its average became the largest, whose own probability was the largest: the average lags behind.
    """

    def __init__(self, options: DecisionOptions, classes: int) -> None:
        self._options, self._classes = options, classes
        self._hold, self._smooth = to_ns(options.hold), to_ns(options.smooth)
        self._report = None if options.report is None else to_ns(options.report)

    def fresh(self) -> dict[str, Any]:
        """Nothing is known.

        `mean`: the averages. `raw`, `lead`: the class that is largest in the last frame, and on average, each with
        since when. `above`, `below`: since when the leader is sure, and the activity is not. `label`: of the activity
        that goes on, -1 if none does; with its `onset`, when it was last `seen`, its last `confidence`, when it was
        last `told`.
        """
        return {
            "mean": np.full(self._classes, 1 / self._classes),
            "raw": NONE,
            "raw_since": 0,
            "lead": NONE,
            "lead_since": 0,
            "above": None,
            "below": None,
            "label": NONE,
            "onset": 0,
            "seen": 0,
            "confidence": 0.0,
            "told": 0,
        }

    def take(
        self, memory: dict[str, Any], probabilities: npt.NDArray[np.float64], events: int, start: int, end: int
    ) -> list[tuple[str, dict[str, Any]]]:
        """One frame, which adds what came from `start` to `end` -> what to tell, with the activity's fields."""
        if events < self._options.min_events:
            probabilities = np.full(self._classes, 1 / self._classes)
        share = 1.0 if not self._smooth else 1 - float(np.exp(-(end - start) / self._smooth))
        memory["mean"] = mean = memory["mean"] + share * (probabilities - memory["mean"])
        self._lead(memory, probabilities, mean, start)
        told: list[tuple[str, dict[str, Any]]] = []
        lead, label = memory["lead"], memory["label"]
        sure = mean[lead] >= self._options.begin
        memory["above"] = None if not sure else start if memory["above"] is None else memory["above"]
        if sure and lead != label and end - memory["above"] >= self._hold:
            if label != NONE:
                told.append((ENDED, self._activity(memory)))
            self._begin(memory, lead, float(mean[lead]), end)
            told.append((BEGUN, self._activity(memory)))
            return told
        if label == NONE:
            return told
        memory["confidence"] = float(mean[label])
        if mean[label] >= self._options.end:
            memory["below"], memory["seen"] = None, end
        elif memory["below"] is None:
            memory["below"] = start
        if memory["below"] is not None and end - memory["below"] >= self._hold:
            told.append((ENDED, self._activity(memory)))
            memory["label"] = NONE
        elif self._report is not None and end - memory["told"] >= self._report:
            memory["told"] = end
            told.append((GOES_ON, self._activity(memory)))
        return told

    def _lead(
        self, memory: dict[str, Any], probabilities: npt.NDArray[np.float64], mean: npt.NDArray[np.float64], start: int
    ) -> None:
        """Which class is the largest now, and since when."""
        raw, lead = int(probabilities.argmax()), int(mean.argmax())
        if raw != memory["raw"]:
            memory["raw"], memory["raw_since"] = raw, start
        if lead != memory["lead"]:
            memory["lead"] = lead
            memory["lead_since"] = memory["raw_since"] if raw == lead else start
            memory["above"] = None

    @staticmethod
    def _begin(memory: dict[str, Any], label: int, confidence: float, end: int) -> None:
        memory.update(label=label, onset=memory["lead_since"], seen=end, confidence=confidence, told=end, below=None)

    @staticmethod
    def _activity(memory: dict[str, Any]) -> dict[str, Any]:
        return {name: memory[name] for name in ("label", "onset", "seen", "confidence")}
