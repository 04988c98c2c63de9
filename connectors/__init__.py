"""Records and what brings them in and takes them out: codecs, recordings, files, pipes, Kafka."""

from __future__ import annotations

from stepstream.connectors.base import DeadLetter, InputError, Sink, Source, Undecodable
from stepstream.connectors.records import (
    EventSlice,
    Forecast,
    Interaction,
    LinkScores,
    Origin,
    Reading,
    Record,
    Score,
    SensorFrame,
    Sweep,
)

__all__ = [
    "DeadLetter",
    "EventSlice",
    "Forecast",
    "InputError",
    "Interaction",
    "LinkScores",
    "Origin",
    "Reading",
    "Record",
    "Score",
    "SensorFrame",
    "Sink",
    "Source",
    "Sweep",
    "Undecodable",
]
