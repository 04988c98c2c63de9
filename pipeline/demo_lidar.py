"""The LiDAR demo, on what is inside the package: three seconds of a street, to objects, tracks and a picture."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from stepstream.connectors.base import InputError
from stepstream.connectors.recording import open_recording
from stepstream.connectors.records import Detections, Record
from stepstream.connectors.sweeps import SweepRecording
from stepstream.connectors.times import format_time
from stepstream.operators.voxelize import Voxelize
from stepstream.pipeline.atomic import write_atomic
from stepstream.pipeline.demo import claim_folder, status
from stepstream.pipeline.pipeline import Pipeline

if TYPE_CHECKING:
    from rich.console import Console

    from stepstream.pipeline.lidar_picture import Scene

__all__ = ["detection_table", "lidar_pipeline", "run_demo"]

_RECORDING = "ika_vlp32"
_TITLE = "ika VLP-32C"


def _recording_path() -> Path:
    path = Path(str(resources.files("stepstream.data") / _RECORDING))
    if not path.is_dir():
        raise InputError(f"the sweeps {_RECORDING} are missing from this installation")
    return path


def lidar_pipeline(out: Path) -> Pipeline:
    """The pipeline of `ika-lidar.yaml` in the package, on the sweeps there, with outputs in `out`."""
    text = (resources.files("stepstream.data") / "ika-lidar.yaml").read_text(encoding="utf-8")
    values = Pipeline.from_yaml(text).to_dict()
    values["source"]["replay"]["path"] = str(_recording_path())
    values["sink"] = {"files": {"path": str(out)}}
    return Pipeline.from_dict(values)


@dataclass
class _Seen:
    """Detections passing by, in order."""

    records: list[Record]

    def see(self, records: Sequence[Record]) -> None:
        self.records += [record for record in records if isinstance(record.value, Detections)]


def run_demo(out: Path, *, console: Console) -> dict[str, Any]:
    """Replays the sweeps inside the package into `out`, draws what came out, tells `console`; returns the summary.

    `out` may be new, empty, or hold an earlier demo, whose outputs are replaced; anything else is refused. It gets
    detections.jsonl, detections.parquet, bev.gif, bev.png and summary.json. Raises InputError.
    """
    claim_folder(out)
    built = lidar_pipeline(out).build()
    seen = _Seen([])
    from stepstream.pipeline.cli.progress import record_progress

    with record_progress("objects in three seconds of a street") as on_progress:
        result = built.run(None, on_progress, seen.see)
    with status("writing the tables"):
        parquet.write_table(detection_table(seen.records), out / "detections.parquet", compression="zstd")
    summary = _summary(out, seen.records, result, built.task.metrics.summary())
    write_atomic(out / "summary.json", [json.dumps(summary, indent=1, allow_nan=False).encode() + b"\n"])
    with status("drawing the picture"):
        from stepstream.pipeline.lidar_picture import animation, still

        scenes = list(_scenes(open_recording(_recording_path()), seen.records, built.task.operators))
        write_atomic(out / "bev.gif", [animation(scenes, _TITLE)])
        write_atomic(out / "bev.png", [still(scenes[-1], _TITLE)])
    _show(summary, out, console)
    return summary


def _scenes(recording: SweepRecording, records: Sequence[Record], operators: Any) -> Iterator[Scene]:
    from stepstream.operators.cluster import Cluster
    from stepstream.pipeline.lidar_picture import Scene

    cluster = next(operator.options for _, operator in operators if isinstance(operator, Cluster))
    options = {
        "x": cluster.x,
        "y": cluster.y,
        "ground": cluster.ground,
        "cell": 0.5,
        "z": (cluster.above, cluster.below),
    }
    voxelize = Voxelize(Voxelize.Options.model_validate(options))
    first = records[0].time_ns
    for record in records:
        sweep = recording.load(record.origin.offset)
        yield Scene((record.time_ns - first) / 1e9, sweep, voxelize.grid(sweep), record.value)


def detection_table(records: Sequence[Record]) -> pa.Table:
    """One row a box: key, time (UTC), offset of its sweep, class, score, track_id (null: none), x, y, z, length, width,
    height (metres), yaw (radians), vx, vy, vz (m/s, null: not known).
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("key", "time", "offset", "class", "score", "track_id")}
    values: list[np.ndarray[Any, Any]] = [np.zeros((0, 10), np.float32)]
    for record in records:
        seen: Detections = record.value
        count = len(seen.scores)
        columns["key"] += [record.key] * count
        columns["time"] += [record.time_ns] * count
        columns["offset"] += [record.origin.offset] * count
        columns["class"] += [seen.classes[at] for at in seen.class_ids]
        columns["score"] += seen.scores.tolist()
        columns["track_id"] += [None if track < 0 else track for track in seen.track_ids.tolist()]
        values.append(np.column_stack([seen.centres, seen.sizes, seen.yaws, seen.velocities]))
    types = (pa.string(), pa.timestamp("ns", "UTC"), pa.int64(), pa.string(), pa.float32(), pa.int64())
    arrays = {name: pa.array(column, kind) for (name, column), kind in zip(columns.items(), types, strict=True)}
    names = ("x", "y", "z", "length", "width", "height", "yaw", "vx", "vy", "vz")
    whole = np.concatenate(values)
    arrays |= {name: pa.array(np.ascontiguousarray(whole[:, i]), from_pandas=True) for i, name in enumerate(names)}
    return pa.table(arrays)


def _summary(out: Path, records: Sequence[Record], result: Any, measured: dict[str, Any]) -> dict[str, Any]:
    boxes = sum(len(record.value.scores) for record in records)
    tracked = sum(int(np.count_nonzero(record.value.track_ids >= 0)) for record in records)
    events = result.totals["operator_events"]
    times = [record.time_ns for record in records]
    return {
        "name": "stepstream demo: ika-lidar",
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("stepstream", "numpy", "scipy")},
        "dataset": "ika-vlp32",
        "period": {"start": format_time(min(times)), "end": format_time(max(times))},
        "counts": {
            "sweeps": result.totals["records_in"],
            "detections": boxes,
            "tracked": tracked,
            "tracks": events["track"].get("tracks", 0),
            "no_pose": events["track"].get("no_pose", 0),
            "gaps": events["track"].get("gaps", 0),
            "dead_letters": sum(result.totals["dead_letters"].values()),
        },
        # No p99: the first of 32 sweeps compiles.
        "operator_ms_p50": {name: timing["p50_ms"] for name, timing in measured["operators"].items()},
        "wall_s": result.wall_s,
        "out": str(out),
    }


def _show(summary: dict[str, Any], out: Path, console: Console) -> None:
    from stepstream.pipeline.cli.common import duration, key_values, number

    counts = summary["counts"]
    rows = {
        "stream": f"{counts['sweeps']} sweeps, {summary['period']['start']} to {summary['period']['end']}",
        "objects": f"{number(counts['detections'])} boxes, {number(counts['tracked'])} in {counts['tracks']} tracks",
        "velocities": "relative to the sensor: this recording has no poses",
        "speed": ", ".join(f"{name} {number(ms)} ms" for name, ms in summary["operator_ms_p50"].items())
        + f" a sweep (median), {duration(summary['wall_s'])} in all",
        "picture": f"{out / 'bev.gif'}, its last sweep {out / 'bev.png'}",
        "on disk": f"{out / 'detections.parquet'}, {out / 'detections.jsonl'}, {out / 'summary.json'}",
    }
    console.print(key_values(rows))
