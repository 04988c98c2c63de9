"""A step of a model, whatever memory its operator hands it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import RecordingContext

from stepstream.connectors.records import Origin, Reading, Record
from stepstream.models.continual.recurrent import GRU
from stepstream.operators.base import Context
from stepstream.operators.infer import Infer, InferOptions

WIDTH = 8
VALUES = np.random.default_rng(0).standard_normal((5, 2, WIDTH)).astype(np.float32)


class Viewing(Infer):
    """Gives its model a view of a message, `first` bytes behind where numpy's and torch's own arrays may begin."""

    first = 0

    def starts_afresh(self, record: Record) -> bool:
        return False

    def fresh_memory(self) -> dict[str, Any]:
        return {}

    def encode(self, records: Sequence[Record], context: Context) -> torch.Tensor:
        values = VALUES[records[0].origin.offset, : len(records)]
        room = np.zeros(values.nbytes + 128, np.uint8)
        begin = -room.ctypes.data % 64 + self.first
        view = room[begin : begin + values.nbytes].view(np.float32).reshape(values.shape)
        view[:] = values
        return torch.from_numpy(view)

    def decode(self, record: Record, output: np.ndarray[Any, Any]) -> list[Any]:
        return [Reading(str(i), float(value)) for i, value in enumerate(output)]


def told(first: int) -> list[Any]:
    torch.manual_seed(0)
    operator = Viewing(InferOptions(), GRU(WIDTH, WIDTH))
    operator.first = first
    records = [
        [Record(key, t, Reading("x", 0.0), Origin("in", i, t)) for i, key in enumerate("ab")]
        for t in range(len(VALUES))
    ]
    return [out.value for some in records for out in operator.process(some, RecordingContext())]


@pytest.mark.parametrize("first", [4, 8, 12, 16, 20, 32, 60])
def test_a_step_does_not_depend_on_where_its_input_lies(first: int) -> None:
    assert told(first) == told(0)
