"""A small package of a user's own parts, on the Python path, that pipelines in these tests name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PARTS = '''
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from stepstream.connectors.base import InputError, Options, Sink, Source
from stepstream.connectors.records import Origin, Reading, Record, Score, SensorFrame
from stepstream.operators import base


class Count(Source):
    """n readings; offsets are their numbers."""

    class Options(Options):
        n: int = Field(default=3, ge=0)
        speed: float | Literal["max"] = "max"
        password: str | None = None
        tags: list[int] = []

    emits: ClassVar = (Reading,)

    def __init__(self, options):
        if options.n == 13:
            raise InputError("13 readings: expected any other number")
        self.options, self.at = options, 0

    def partitions(self):
        return [("count", 0)]

    def seek(self, offsets):
        self.at = offsets.get(("count", 0), self.at)

    def poll(self, max_records, timeout_s):
        start, self.at = self.at, min(self.at + max_records, self.options.n)
        return [
            Record("toy", i * 10**9, Reading("s", float(i)), Origin("count", 0, i)) for i in range(start, self.at)
        ]

    @property
    def ended(self):
        return self.at >= self.options.n

    def progress(self):
        return self.at, self.options.n


class Keep(Sink):
    class Options(Options):
        path: str = "x"

    kept: ClassVar = []

    def open(self, position):
        del type(self).kept[0 if position is None else position["n"] :]

    def __init__(self, options):
        self.options = options

    def write(self, records, dead):
        type(self).kept.extend(records)

    def prepare(self):
        return {"n": len(type(self).kept)}


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    alpha: float = 1.0


class Scale(base.Operator):
    """value * by."""

    class Options(base.Options):
        by: float = 2.0
        horizons: int | list[int] = 12
        inner: Inner = Inner()
        every: str = "5min"

        @field_validator("every")
        @classmethod
        def is_duration(cls, value):
            if not value.endswith("min"):
                raise ValueError("expected a duration such as 5min")
            return value

    consumes: ClassVar = (Reading,)
    emits: ClassVar = (Reading,)

    def __init__(self, options):
        self.options = options

    def process(self, records, context):
        return [r.derive(0, Reading(r.value.sensor, r.value.value * self.options.by)) for r in records]

    def describe(self):
        return {"receptive_field": 1, "state_bytes": 0}


class Needs(base.Operator):
    class Options(base.Options):
        model: str

    consumes: ClassVar = (SensorFrame,)
    emits: ClassVar = (Score,)

    def __init__(self, options):
        self.options = options

    def process(self, records, context):
        return []


class Fails(Scale):
    def process(self, records, context):
        raise ZeroDivisionError("one divided by none")


class NotAnOperator:
    pass
'''


@pytest.fixture
def parts(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the module `my_parts`: classes Count, Keep, Scale, Needs, Fails, NotAnOperator."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my_parts.py").write_text(PARTS)
    (folder / "my_broken.py").write_text("def f(:\n")
    (folder / "my_needy.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in ("my_parts", "my_broken", "my_needy"):
        sys.modules.pop(name, None)
