"""The demo of event cameras: three gestures inside the package, told as they begin and end, and drawn."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepstream.connectors.records import Activity, Record
from stepstream.operators.recognize import Recognize
from stepstream.pipeline.atomic import write_atomic
from stepstream.pipeline.demo import StepTimes, claim_folder, status
from stepstream.pipeline.pipeline import Pipeline

if TYPE_CHECKING:
    from rich.console import Console

    from stepstream.pipeline.event_picture import Moment

__all__ = ["TRUTH", "demo_pipeline", "run_demo"]

RECORDING = "dvs_gestures.bs2"
TRUTH = (("hand clapping", 0.0), ("right hand wave", 0.725), ("air guitar", 1.45))
"""What the recording shows, and since when in seconds: see data/README.md."""
CREDIT = "DVS128 Gesture, IBM Research (Amir et al., CVPR 2017), CC BY 4.0"


def demo_pipeline(out: Path, recording: Path) -> Pipeline:
    """The pipeline of `gestures.yaml` in the package, on that recording, with outputs in `out`."""
    text = (resources.files("stepstream.data") / "gestures.yaml").read_text(encoding="utf-8")
    values = Pipeline.from_yaml(text).to_dict()
    values["source"]["replay"]["path"] = str(recording)
    values["sink"] = {"files": {"path": str(out)}}
    return Pipeline.from_dict(values)


def run_demo(out: Path, *, console: Console) -> dict[str, Any]:
    """Plays the gestures through the shipped weights into `out`, draws them, tells `console`; returns the summary.

    `out` may be new, empty, or hold an earlier demo, whose outputs are replaced; anything else is refused.
    `summary.json` in `out` has the same values, `activities.gif` the frames and the running decision. Raises
    InputError.
    """
    from stepstream.pipeline.event_picture import Moment, write_gif

    with (
        status("recognising gestures"),
        resources.as_file(resources.files("stepstream.data") / RECORDING) as recording,
    ):
        claim_folder(out)
        built = demo_pipeline(out, recording).build()
        operator = next(o for _, o in built.task.operators if isinstance(o, Recognize))
        times = StepTimes()
        moments: list[Moment] = []
        told: list[Record] = []
        operator.on_step = times.add
        operator.on_frame = lambda frame, memory: moments.append(Moment.of(frame, memory))
        result = built.run(on_output=told.extend)
    activities = [record for record in told if isinstance(record.value, Activity)]
    summary = _summarise(out, operator, result, times, activities, moments)
    write_atomic(out / "summary.json", [json.dumps(summary, indent=1, allow_nan=False).encode() + b"\n"])
    with status("drawing"):
        write_gif(out / "activities.gif", moments, operator.classes, summary["truth"], CREDIT)
    _show(summary, out, console)
    return summary


def _summarise(
    out: Path,
    operator: Recognize,
    result: Any,
    times: StepTimes,
    activities: Sequence[Record],
    moments: Sequence[Moment],
) -> dict[str, Any]:
    apart = operator.form.window_us // operator.form.every_us  # frames that share no event
    events = sum(moment.events for moment in moments[apart - 1 :: apart])
    duration_s = len(moments) * operator.form.every_us / 1e6
    truth = [{"label": label, "since_s": since} for label, since in TRUTH]
    right = [moment.label >= 0 and operator.classes[moment.label] == _label_at(moment.end_s) for moment in moments]
    counts = result.totals["operator_events"]
    return {
        "name": "stepstream demo: gestures",
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("stepstream", "torch", "numpy")},
        "recording": RECORDING,
        "credit": CREDIT,
        "weights": operator.weights_hash,
        "duration_s": duration_s,
        "truth": truth,
        "activities": [_told(record) for record in activities],
        "frames_right": sum(right) / max(1, len(right)),
        "step_ms_p50": times.quantile_ms(0.5),
        "step_ms_p99": times.quantile_ms(0.99),
        "real_time_factor": duration_s / result.wall_s,
        "wall_s": result.wall_s,
        "counts": {
            "slices": result.totals["records_in"],
            "events": events,
            "frames": len(moments),
            "activities": counts["recognize"].get("begun", 0),
            "dead_letters": sum(result.totals["dead_letters"].values()),
        },
        "out": str(out),
    }


def _label_at(time_s: float) -> str:
    """What the recording shows just before a time."""
    return [label for label, since in TRUTH if since < time_s][-1]


def _told(record: Record) -> dict[str, Any]:
    activity: Activity = record.value
    return {
        "time_s": record.time_ns / 1e9,
        "label": activity.label,
        "since_s": activity.onset_ns / 1e9,
        "until_s": activity.until_ns / 1e9,
        "ongoing": activity.ongoing,
        "confidence": round(activity.confidence, 4),
    }


def _show(summary: Mapping[str, Any], out: Path, console: Console) -> None:
    from stepstream.pipeline.cli.common import key_values, number

    counts = summary["counts"]
    console.print()
    for told in summary["activities"]:
        what = f"since {told['since_s']:.2f} s [dim](confidence {told['confidence']:.0%})[/]"
        if not told["ongoing"]:
            what = f"ended: from {told['since_s']:.2f} to {told['until_s']:.2f} s"
        console.print(f"[dim]{told['time_s']:5.2f} s[/]  [bold]{told['label']}[/] {what}")
    console.print()
    shown = ", ".join(f"{item['label']} from {item['since_s']:g} s" for item in summary["truth"])
    rows = {
        "shown": shown,
        "stream": f"{number(counts['events'])} events in frames, {counts['slices']} slices, {counts['frames']} frames",
        "frames told right": f"{summary['frames_right']:.0%} (all frames, also those before anything is told)",
        "speed": f"{number(round(summary['real_time_factor'], 1))} x real time",
        "one model step": f"p50 {number(summary['step_ms_p50'])} ms, p99 {number(summary['step_ms_p99'])} ms",
        "picture": str(out / "activities.gif"),
        "on disk": f"{out / 'activities.jsonl'}, {out / 'summary.json'}",
        "recording": summary["credit"],
    }
    console.print(key_values(rows))
