"""`stepstream inspect PATH`: what a recording holds."""

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
    console,
    emit_json,
    key_values,
    slice_option,
    sweep_options,
    time_unit_option,
    use_current_folder,
    verb,
)

__all__ = ["inspect"]

EXAMPLES = """\b
Examples:
  stepstream inspect metr_la.npz
  stepstream inspect recordings/            every recording in a folder
  stepstream inspect metr_la.npz --json | jq .missing_fraction
  stepstream inspect edges.csv --time-unit ms
  stepstream inspect kitti/velodyne --poses poses.txt --rate-hz 10
"""


@verb
def inspect(
    path: Annotated[Path, typer.Argument(help="A recording, or a folder of recordings.", show_default=False)],
    form: FormatOption = None,
    time_unit: TimeUnitOption = None,
    rate_hz: RateHzOption = None,
    poses: PosesOption = None,
    topic: TopicOption = None,
    slice_us: SliceUsOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """What a recording holds: its modality and format (found from its content), how much, from when to when."""
    use_current_folder()
    own = time_unit_option(time_unit) | sweep_options(rate_hz, poses, topic) | slice_option(slice_us)
    found, skipped = _summaries(path, form, own)
    if path.is_dir() and not (len(found) == 1 and found[0]["path"] == str(path)):
        if as_json:
            emit_json({"path": str(path), "recordings": found, "skipped": skipped})
            return
        for summary in found:
            _show(summary)
        for item in skipped:
            console(stderr=True).print(f"skipped {item['reason']}", markup=False)
        return
    if as_json:
        emit_json(found[0])
    else:
        _show(found[0])


def _summaries(
    path: Path, form: str | None, options: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """What is in the recording at `path`, or in each recording of that folder, and the files that are none."""
    from stepstream.connectors.base import InputError
    from stepstream.connectors.recording import open_recording

    try:
        return [{"path": str(path), **open_recording(path, form, options).summary()}], []
    except InputError as error:
        if not path.is_dir():
            raise
        not_one = error
    found: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for child in sorted(child for child in path.iterdir() if not child.name.startswith(".")):
        try:
            found.append({"path": str(child), **open_recording(child, form, options).summary()})
        except InputError as error:
            skipped.append({"path": str(child), "reason": str(error)})
    if not found:
        raise not_one
    return found, skipped


def _show(summary: dict[str, Any]) -> None:
    out = console()
    out.print(summary["path"], style="bold cyan", markup=False)
    out.print(key_values({name.replace("_", " "): value for name, value in summary.items() if name != "path"}))
