"""Copies of nodes' memories as bytes: every bit comes back, and what does not fit is named, not guessed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import node_memories, same

from stepstream.connectors import codec_arrow_memory
from stepstream.connectors.base import InputError
from stepstream.connectors.codec_arrow import write_batch
from stepstream.connectors.codec_arrow_memory import MAX_LEAF_BYTES, MAX_LEAVES
from stepstream.connectors.codecs import decode, encode
from stepstream.connectors.records import NodeMemory

KIND = "application/vnd.stepstream.node_memory+arrow; v=1"
ONES = np.ones(2, np.float32)


def memory(**changes: Any) -> NodeMemory:
    fields = {"node": 7, "owner": 0, "version": 1, "destination": True, "model": "m", "weights": ""}
    return NodeMemory(**{**fields, "leaves": {"own": ONES}, **changes})


@settings(deadline=None)
@given(node_memories)
def test_every_bit_comes_back(value: NodeMemory) -> None:
    encoded = encode(value)
    assert encoded.content_type == KIND
    read = decode(encoded.content_type, encoded.body)
    assert same(read, value)
    assert not any(leaf.flags.writeable for leaf in read.leaves.values())


@settings(deadline=None)
@given(node_memories, st.data())
def test_a_damaged_body_is_an_input_error_or_a_valid_copy(value: NodeMemory, data: st.DataObject) -> None:
    body = bytearray(encode(value).body)
    at = data.draw(st.integers(0, len(body) - 1))
    if data.draw(st.booleans()):
        del body[at:]
    else:
        body[at] ^= data.draw(st.integers(1, 255))
    try:
        read = decode(KIND, bytes(body))
    except InputError:
        return
    assert same(decode(KIND, encode(read).body), read)


@given(st.binary())
def test_garbage_is_an_input_error(body: bytes) -> None:
    with pytest.raises(InputError):
        decode(KIND, body)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"node": True}, "node: expected an integer of 64 bits"),
    ({"owner": -1}, "owner: expected a whole number from 0, got -1"),
    ({"version": 0}, "version: expected a whole number from 1, got 0"),
    ({"leaves": {}}, f"leaves: expected 1 to {MAX_LEAVES}, got 0"),
    ({"leaves": {str(i): ONES for i in range(MAX_LEAVES + 1)}}, f"got {MAX_LEAVES + 1}"),
    ({"leaves": {"own": np.ones(2)}}, "own: expected int64 or float32"),
    ({"leaves": {"own": np.array([1, np.nan], np.float32)}}, "own: expected finite numbers"),
    ({"leaves": {"own": np.zeros(MAX_LEAF_BYTES, np.float32)}}, f"at most {MAX_LEAF_BYTES} are taken"),
]


@pytest.mark.parametrize(("changes", "reason"), WRONG)
def test_what_is_no_copy_is_not_written(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        encode(memory(**changes))


META = {"node": 7, "owner": 0, "version": 1, "destination": True, "model": "m", "weights": ""}
ROW = {"name": ["own"], "kind": ["float32"], "shape": [[2]], "data": [ONES.tobytes()]}
BODIES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"shape": [[3]]}, {}, r"8 bytes are not float32 of the shape \[3\]"),
    ({"shape": [[-1, -2]]}, {}, "is no shape"),
    ({"shape": [[2, 1, 1, 1, 1]]}, {}, "is no shape"),
    ({"shape": [[None]]}, {}, "null values"),
    ({"kind": ["object"]}, {}, "expected int64 or float32, got 'object'"),
    (
        {"name": ["a", "a"], "kind": ["float32"] * 2, "shape": [[2]] * 2, "data": ROW["data"] * 2},
        {},
        "'a' is there twice",
    ),
    ({name: [] for name in ROW}, {}, "expected 1 to 64, got 0"),
    ({}, {"version": 1.5}, "version: expected a whole number"),
    ({}, {"version": 1 << 63}, "version: expected a whole number"),
    ({}, {"destination": 1}, "destination: expected true or false"),
    ({}, {"model": None}, "model, weights: expected texts"),
    ({}, {"node": None}, "node: expected an integer"),
]


@pytest.mark.parametrize(("changed", "meta", "reason"), BODIES)
def test_what_a_body_gets_wrong_is_named(changed: dict[str, Any], meta: dict[str, Any], reason: str) -> None:
    schema = codec_arrow_memory._COLUMNS
    columns = [pa.array(values, schema.field(name).type) for name, values in {**ROW, **changed}.items()]
    body = write_batch(columns, schema, {**META, **meta})
    with pytest.raises(InputError, match=reason):
        decode(KIND, body)


def test_other_columns_and_versions_are_refused() -> None:
    body = write_batch([pa.array([1])], pa.schema([("x", pa.int64())]), META)
    with pytest.raises(InputError, match="expected the columns name, kind, shape and data; got x: int64"):
        decode(KIND, body)
    with pytest.raises(InputError, match=r"node_memory\+arrow v=2 is unknown; known versions: \[1\]"):
        decode(KIND.replace("v=1", "v=2"), encode(memory()).body)
