"""Whether a slice of events goes on from what is known of its camera: what operators on events share."""

from __future__ import annotations

from typing import Literal, Protocol

from stepstream.connectors.event_slices import slice_fault
from stepstream.connectors.records import EventSlice, Record
from stepstream.operators.base import Context

__all__ = ["Known", "judge"]


class Known(Protocol):
    """What is known of a camera: `sequence` and `boot` of its last slice; nothing before `newest` comes any more."""

    width: int
    height: int
    boot: int
    sequence: int
    newest: int


def judge(record: Record, known: Known | None, context: Context) -> Literal["skip", "fresh", "next"]:
    """Says "next": the slice goes on from what is known; "fresh": that is to be forgotten; "skip": the slice is no use.

    Counted: "duplicate" (a sequence number that was there; skipped), "lost" (numbers that are missing), "restart" (a
    new boot id) and "resized" (another size of the sensor). Dead-lettered: slices that are not valid, and time that
    goes back.
    """
    events: EventSlice = record.value
    fault = slice_fault(events)
    if fault is not None:
        context.dead_letter(record, fault)
        return "skip"
    if known is None:
        return "fresh"
    if events.boot_id != known.boot:
        context.count("restart")
        return "fresh"
    if events.sequence <= known.sequence:
        context.count("duplicate")
        return "skip"
    if (events.width, events.height) != (known.width, known.height):
        context.count("resized")
        return "fresh"
    if events.start_us < known.newest:
        context.dead_letter(record, f"start_us: expected at least {known.newest}, got {events.start_us}")
        return "skip"
    if events.sequence > known.sequence + 1:
        context.count("lost", events.sequence - known.sequence - 1)
    return "next"
