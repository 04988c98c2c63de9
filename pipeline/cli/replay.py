"""`stepstream replay PATH --to DEST`: publishes a recording."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stepstream.pipeline.cli.common import (
    DebugOption,
    FormatOption,
    JsonOption,
    PosesOption,
    RateHzOption,
    SliceUsOption,
    TimeUnitOption,
    TopicOption,
    WrongUse,
    console,
    emit_json,
    number,
    options_from,
    slice_option,
    sweep_options,
    time_unit_option,
    use_current_folder,
    verb,
)
from stepstream.pipeline.cli.progress import record_progress

__all__ = ["kafka_options", "replay"]

EXAMPLES = """\b
Examples:
  stepstream replay metr_la.npz --to readings/          writes readings/readings.jsonl
  stepstream replay metr_la.npz --to - --rate 20 | head
  stepstream replay metr_la.npz --to kafka:traffic.readings --rate 1 --servers broker:9092
  stepstream replay metr_la.npz --to kafka:traffic.frames --emit frames --set security.protocol=SSL
  stepstream replay kitti/velodyne --to sweeps/ --rate 1    writes sweeps/sweeps.jsonl
  stepstream replay drive.mcap --to sweeps/ --topic /lidar_top
  stepstream replay recording.raw --to slices/ --slice-us 5000    writes slices/event_slices.jsonl
  stepstream replay bitcoin_alpha.csv --to edges/ --sort    writes edges/interactions.jsonl, by time
"""


@verb
def replay(
    path: Annotated[Path, typer.Argument(help="A recording.", show_default=False)],
    to: Annotated[
        str, typer.Option("--to", metavar="DEST", help="A folder, - for stdout, or kafka:TOPIC.", show_default=False)
    ],
    rate: Annotated[
        str, typer.Option("--rate", help="max, or how many times faster than it was recorded: 1, 20, ...")
    ] = "max",
    form: FormatOption = None,
    emit: Annotated[
        str | None,
        typer.Option(
            "--emit",
            help="readings, or frames: all readings of a moment in one record.",
            show_default="readings; interactions of a graph; sweeps of a LiDAR; slices of events",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--key", help="Of all records: which network, graph, vehicle, camera.", show_default="its name"),
    ] = None,
    in_time_order: Annotated[
        bool, typer.Option("--sort", help="Interactions by time, not in the order of the file.")
    ] = False,
    time_unit: TimeUnitOption = None,
    rate_hz: RateHzOption = None,
    poses: PosesOption = None,
    topic: TopicOption = None,
    servers: Annotated[
        str, typer.Option("--servers", envvar="STEPSTREAM_SERVERS", help="The brokers of kafka:TOPIC, host:port,...")
    ] = "127.0.0.1:9092",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the kafka sink, such as security.protocol=SSL."),
    ] = None,
    slice_us: SliceUsOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Publishes a recording as live records: into a folder, to stdout as JSON lines, or to a Kafka topic."""
    use_current_folder()
    speed = _speed(rate)
    if to == "-" and as_json:
        raise WrongUse("--json: the readings themselves go to stdout with --to -")
    if emit not in (None, "readings", "frames", "interactions", "sweeps", "slices"):
        raise WrongUse(f"--emit {emit}: expected readings, frames, interactions, sweeps or slices")
    own: dict[str, Any] = ({"order": "time"} if in_time_order else {}) | time_unit_option(time_unit)
    own |= sweep_options(rate_hz, poses, topic)
    own |= slice_option(slice_us)
    if key is not None:
        own["key"] = key
    from stepstream.pipeline.publish import publish
    from stepstream.pipeline.signals import stop_on_signals

    with stop_on_signals() as stop, record_progress(f"replay {path.name}") as update:
        summary = publish(path, to, speed, form, emit, kafka_options(servers, settings or []), stop, update, own)
    if as_json:
        emit_json(summary)
    else:
        said = "stopped after" if summary["stopped"] else "published"
        console(stderr=True).print(
            f"{said} {number(summary['records'])} records in {summary['seconds']:.1f} s to {summary['to']}"
        )
        if "unreadable" in summary:
            console(stderr=True).print(f"left out {summary['unreadable']}: {summary['reason']}", markup=False)


def kafka_options(servers: str, settings: list[str]) -> dict[str, Any]:
    """`--set a.b=c` as nested options."""
    options: dict[str, Any] = {"servers": servers}
    for name, value in options_from(settings).items():
        *folders, last = name.split(".")
        place = options
        for folder in folders:
            place = place.setdefault(folder, {})
            if not isinstance(place, dict):
                raise WrongUse(f"--set {name}: {folder} has a value already")
        place[last] = value
    return options


def _speed(rate: str) -> float | None:
    if rate == "max":
        return None
    try:
        speed = float(rate)
    except ValueError:
        speed = -1.0
    if not 0 < speed < float("inf"):
        raise WrongUse(f"--rate {rate}: expected max or a number above 0, such as 20")
    return speed
