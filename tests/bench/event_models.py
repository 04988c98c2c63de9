"""EventTransAct: a step against its clip of 16 frames, and recordings to activities end to end, one thread.

OMP_NUM_THREADS=1 uv run python -m tests.bench.event_models [FOLDER]

"clip" embeds 16 frames and runs the temporal encoder once over them, for the newest output; "step" is one step of the
same network, batch 1, CPU time. `shipped`: the sizes of the weights for gestures (128 x 128, summed to 32 x 32);
`larger`: 128 x 128 as they are, 256 tokens (ViT-B at 224 x 224 has 196) of width 128, four layers. Latencies are wall
times of a step, on a machine that may be busy. End to end (../shared/data/event): the ten gesture clips by the pipeline
of the demo, and the burst of 25 million events a second at 1280 x 720, which lasts 8.8 ms: decoded, and played over
and over to the operators for 0.9 s; the real-time factor is the recording's duration by CPU seconds, decoding included,
after a warm-up. Opening a file counts its events first ("count"), which a camera has no use for.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from support import DATA, RecordingContext
from tests.bench.common import cpu_seconds, report
from torch import Tensor

from stepstream.connectors.recording import open_recording
from stepstream.connectors.records import Origin, Record
from stepstream.models.eventtransact import EventTransAct, EventTransActConfig, FrameForm
from stepstream.operators.accumulate import Accumulate
from stepstream.operators.recognize import Recognize, RecognizeOptions
from stepstream.pipeline.pipeline import Pipeline

CLIP = 16
FRAME = FrameForm(height=128, width=128, every_us=20_000, window_us=40_000)
SIZES: dict[str, dict[str, Any]] = {
    "shipped": {"pool": 4},
    "larger": {"pool": 1, "width": 128, "hidden": 256, "spatial_layers": 4},
}
FORMS: tuple[Literal["continual", "exact"], ...] = ("continual", "exact")


def clip_of(model: EventTransAct, window: Tensor) -> Callable[[], Tensor]:
    age = torch.arange(CLIP - 1, -1, -1)[None]

    def exact() -> Tensor:
        assert model.ring is not None
        result: Tensor = model.head(model.ring(model.embeddings(window), age))
        return result

    return exact if model.ring is not None else lambda: model(window)[:, -1]


@torch.no_grad()
def steps(rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    window = torch.poisson(torch.full((1, CLIP, 2, 128, 128), 0.1))
    rows = torch.tensor([0])
    for size, options in SIZES.items():
        for form in FORMS:
            config = EventTransActConfig(tuple("abcdefghij"), FRAME, memory=CLIP, form=form, **options)
            model = EventTransAct(config).to(memory_format=torch.channels_last).eval().requires_grad_(False)
            state = model.initial_state(1)
            clip = clip_of(model, window)
            for t in range(CLIP):
                output = model.step(window[:, t], state, rows)
            assert torch.allclose(output, clip(), atol=1e-4)
            one = window[:, 0]
            seconds = cpu_seconds(
                {
                    "step": partial(model.step, one, state, rows),
                    "clip": clip,
                    "embed": partial(model.embed, one),
                },
                rounds,
            )
            wall = []
            for _ in range(8 * rounds):
                start = time.perf_counter()
                model.step(one, state, rows)
                wall.append(time.perf_counter() - start)
            found[f"{size} {form}"] = {
                "parameters": sum(p.numel() for p in model.parameters()),
                "cpu_ms": {name: round(1e3 * value, 3) for name, value in seconds.items()},
                "clip_by_step": round(seconds["clip"] / seconds["step"], 2),
                "step_wall_ms_p50": round(1e3 * float(np.quantile(wall, 0.5)), 3),
                "step_wall_ms_p99": round(1e3 * float(np.quantile(wall, 0.99)), 3),
            }
    return found


def gestures() -> dict[str, Any]:
    """Every clip by its own run of the pipeline, the first one twice."""
    spent, lasted, events = 0.0, 0.0, 0
    paths = sorted((DATA / "event" / "dvs_gesture_bs2").glob("*.bs2"))
    for number, path in enumerate([paths[0], *paths]):
        built = Pipeline.from_dict(
            {
                "name": "bench",
                "source": {"replay": {"path": str(path)}},
                "operators": [
                    {"accumulate": {"kind": "polarity", "every": "20ms", "window": "40ms"}},
                    {"recognize": {"weights": "eventtransact-gestures"}},
                ],
                "sink": "null",
            }
        ).build()
        start = time.process_time()
        built.run()
        if number:
            recording = open_recording(path)
            spent += time.process_time() - start
            lasted += (recording.t_last_us - recording.t_first_us) / 1e6
            events += recording.events
    return {"clips": len(paths), "events": events, "duration_s": round(lasted, 3), "real_time_factor": lasted / spent}


def burst(times: int = 100) -> dict[str, Any]:
    path = DATA / "event" / "evt3_sample.raw"
    list(open_recording(path).slices())
    start = time.process_time()
    recording = open_recording(path)
    opened = time.process_time()
    slices = list(recording.slices())
    decode, counting = time.process_time() - opened, opened - start
    span = slices[-1].end_us - slices[0].start_us
    records = []
    for number in range(times * len(slices)):
        turn, at = divmod(number, len(slices))
        one, later = slices[at], turn * span
        value = dataclasses.replace(
            one, t_us=one.t_us + later, start_us=one.start_us + later, end_us=one.end_us + later, sequence=number
        )
        records.append(Record("camera", value.start_us * 1000, value, Origin("burst", 0, number)))
    accumulate = Accumulate(Accumulate.Options(kind="polarity", every="20ms", window="40ms"))
    recognize = Recognize(RecognizeOptions(weights=Path("eventtransact-gestures")))
    context = RecordingContext()
    spent = {"accumulate": 0.0, "recognize": 0.0}
    warm = 10 * len(slices)
    for first in range(0, len(records), 64):
        start = time.process_time()
        frames = accumulate.process(records[first : first + 64], context)
        middle = time.process_time()
        recognize.process(frames, context)
        if first >= warm:
            spent["accumulate"] += middle - start
            spent["recognize"] += time.process_time() - middle
    lasted = (len(records) - warm) * span / len(slices) / 1e6
    counted = sum(len(one.t_us) for one in slices)
    cpu = decode * lasted * 1e6 / span + sum(spent.values())
    return {
        "events_per_second": round(counted / span * 1e6),
        "frames": context.counts["frames"],
        "cpu_ms_per_ms": {
            "count": round(counting * 1e6 / span, 3),
            "decode": round(decode * 1e6 / span, 3),
            **{name: round(value / lasted, 3) for name, value in spent.items()},
        },
        "real_time_factor": lasted / cpu,
        "real_time_factor_with_count": lasted / (cpu + counting * lasted * 1e6 / span),
    }


def main() -> None:
    torch.set_num_threads(1)
    result: dict[str, Any] = {"clip_frames": CLIP, "steps": steps(rounds=40)}
    if (DATA / "event").is_dir():
        result |= {"gestures": gestures(), "burst": burst()}
    report("event_models", result)


if __name__ == "__main__":
    main()
