"""How fast events are denoised and limited in slices of 1 ms, one thread; and files of events read and accumulated.

OMP_NUM_THREADS=1 uv run python -m tests.bench.event_filters [FOLDER]

The events of evt2_sample.raw (640 x 480) and evt3_sample.raw (1280 x 720) in ../shared/data/event, else made ones.
A recording is too short to tell, so it goes round TIMES times, its times moved on. "read + accumulate": from the bytes
of the file to frames of two polarities each 10 ms, as a source and an operator do it, opening not included;
`real_time` is how many seconds of the recording are done in a second of CPU time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from events import random_events
from support import DATA, RecordingContext
from tests.bench.common import cpu_seconds, report

from stepstream.connectors.event_columns import Columns
from stepstream.connectors.event_slicer import Slicer
from stepstream.connectors.recording import open_recording
from stepstream.connectors.records import EventSlice, Origin, Record
from stepstream.operators.accumulate import Accumulate
from stepstream.operators.base import Operator
from stepstream.operators.denoise import Denoise
from stepstream.operators.limit_events import LimitEvents

TIMES = 20


def round_and_round(slices: Callable[[], Iterable[EventSlice]]) -> Iterator[Record]:
    """The slices TIMES times, each time later."""
    number, shift, newest = 0, 0, 0
    for _ in range(TIMES):
        first = None
        for s in slices():
            if first is None:
                first = s.start_us
                shift = newest - first if newest else 0
            moved = replace(
                s, t_us=s.t_us + shift, start_us=s.start_us + shift, end_us=s.end_us + shift, sequence=number
            )
            newest = moved.end_us
            yield Record("c", moved.start_us * 1000, moved, Origin("c", 0, number))
            number += 1


def records_of(slices: list[EventSlice]) -> list[Record]:
    return list(round_and_round(lambda: slices))


def run(operator: Operator, records: list[Record], context: RecordingContext) -> None:
    operator.drop("c")
    for record in records:
        operator.process([record], context)


def filters(slices: list[EventSlice], rate: float) -> dict[str, Callable[[], object]]:
    records = records_of(slices)
    made = {
        "denoise": Denoise(Denoise.Options()),
        "denoise without hot pixels": Denoise(Denoise.Options(hot_rate=None)),
        "limit to half": LimitEvents(LimitEvents.Options(rate=round(rate / 2))),
    }
    return {name: partial(run, operator, records, RecordingContext()) for name, operator in made.items()}


def reading(path: Path) -> dict[str, Callable[[], object]]:
    recording = open_recording(path)
    operator = Accumulate(Accumulate.Options.model_validate({"kind": "polarity", "every": "10ms"}))
    cleaned = Denoise(Denoise.Options())

    def read() -> None:
        for _ in round_and_round(recording.slices):
            pass

    def to_frames(*operators: Operator) -> None:
        context = RecordingContext()
        for each in operators:
            each.drop("c")
        for record in round_and_round(recording.slices):
            records = [record]
            for each in operators:
                records = each.process(records, context)

    return {
        "read": read,
        "read + accumulate": partial(to_frames, operator),
        "read + denoise + accumulate": partial(to_frames, cleaned, operator),
    }


def measured(slices: list[EventSlice], path: Path | None) -> dict[str, Any]:
    count, seconds = sum(len(s.t_us) for s in slices), (slices[-1].end_us - slices[0].start_us) / 1e6
    taken = cpu_seconds(filters(slices, count / seconds), rounds=5, warmup=1)
    found: dict[str, Any] = {"events": count, "seconds": seconds, "unit": "million events a second of CPU time"}
    context = RecordingContext()
    run(Denoise(Denoise.Options()), records_of(slices), context)
    found["denoise counts"] = dict(context.counts)
    if path is not None:
        taken |= cpu_seconds(reading(path), rounds=5, warmup=1)
    found |= {name: round(TIMES * count / s / 1e6, 1) for name, s in taken.items()}
    if path is not None:
        found["real_time"] = {
            name: round(TIMES * seconds / taken[name], 2) for name in taken if name.startswith("read")
        }
    return found


def main() -> None:
    result: dict[str, Any] = {}
    for name in ("evt2_sample.raw", "evt3_sample.raw"):
        path = DATA / "event" / name
        if path.exists():
            result[name] = measured(list(open_recording(path).slices()), path)
    if not result:
        t, x, y, on = random_events(500_000, 640, 480, mean_us=0.2)
        slicer = Slicer(1000, 640, 480)
        made = [*slicer.push(Columns(t, x, y, on.view(np.uint8))), *slicer.finish()]
        result["made"] = measured(made, None)
    report("event_filters", result)


if __name__ == "__main__":
    main()
