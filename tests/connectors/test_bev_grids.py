from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from strategies import same

from stepstream.connectors import bev_grids
from stepstream.connectors.base import InputError
from stepstream.connectors.bev_grids import Grid, decode_grid, encode_grid
from stepstream.connectors.codecs import decode, encode

sides = st.integers(1, 9)
binary = st.tuples(sides, sides) | st.tuples(sides, sides, sides)
cells = st.one_of(
    binary.flatmap(lambda shape: npst.arrays(np.uint8, shape, elements=st.integers(0, 1))),
    st.tuples(sides, sides).flatmap(lambda shape: npst.arrays(np.float32, shape, elements=st.floats(0, 9, width=32))),
)
places = st.tuples(*[st.floats(-1e5, 1e5)] * 3)


def a_grid(**changes: Any) -> Grid:
    made = Grid(np.eye(8, dtype=np.uint8), (-1, -2, 0.5), (0.4, 0.4, 3.9), 12, "lidar", np.eye(4))
    return dataclasses.replace(made, **changes)


@settings(max_examples=25)
@given(cells, places, st.none() | st.just(np.eye(4)))
def test_every_bit_comes_back(made: Any, low: Any, pose: Any) -> None:
    grid = a_grid(cells=made, low=low, pose=pose, size=(0.5, 0.25, 2.0))
    encoded = encode(grid)
    assert encoded.content_type == "application/vnd.stepstream.grid+arrow; v=1"
    read = decode(encoded.content_type, encoded.body)
    assert same(read, grid) and not read.cells.flags.writeable


def test_a_map_of_a_street_is_small() -> None:
    rng = np.random.default_rng(0)
    volume = (rng.random((256, 256, 13)) < 0.01).astype(np.uint8)
    assert len(encode_grid(a_grid(cells=volume))) < volume.size / 8


@settings(max_examples=40)
@given(st.data())
def test_a_damaged_body_is_an_input_error_or_a_grid(data: st.DataObject) -> None:
    body = bytearray(encode_grid(a_grid()))
    at = data.draw(st.integers(0, len(body) - 1))
    if data.draw(st.booleans()):
        del body[at:]
    else:
        body[at] ^= data.draw(st.integers(1, 255))
    try:
        read = decode("application/vnd.stepstream.grid+arrow; v=1", bytes(body))
    except InputError:
        return
    assert encode_grid(read)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cells": np.zeros((2, 2))}, "cells: expected float32, or uint8 of 0 and 1, got float64"),
        ({"cells": np.full((2, 2), 7, np.uint8)}, "uint8 of 0 and 1"),
        ({"cells": np.zeros((2, 0), np.uint8)}, r"cells: expected 2 or 3 sides above 0, got \[2, 0\]"),
        ({"cells": np.zeros((2, 2, 2), np.float32)}, "cells: expected 2 sides"),
        ({"low": (0, np.nan, 0)}, "low: expected three finite"),
        ({"size": (0.4, 0.0, 1)}, "size: expected three finite"),
        ({"points": -1}, "points: expected an integer"),
        ({"frame": ""}, "frame: expected a text"),
        ({"pose": np.zeros((4, 4))}, "pose: expected the last row"),
    ],
)
def test_what_is_no_grid_is_not_written(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        encode_grid(a_grid(**changes))


def test_more_cells_than_are_taken_are_refused_before_they_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    body = encode_grid(a_grid())
    monkeypatch.setattr(bev_grids, "MAX_WIRE_CELLS", 63)
    with pytest.raises(InputError, match="cells: expected at most 63, got 64"):
        decode_grid(body)
