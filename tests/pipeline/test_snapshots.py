from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepstream.pipeline.snapshots import (
    Snapshot,
    SnapshotError,
    SnapshotRef,
    SnapshotStore,
    fingerprint_difference,
    read_snapshot,
    write_snapshot,
)

FINGERPRINT: list[dict[str, Any]] = [{"name": "a", "type": "m:A", "options": {"size": 3}, "weights": None}]
NUMPY = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"]
TORCH = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32,
    torch.uint64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def arrays(draw: st.DrawFn) -> Any:
    """Any bytes as any dtype: every NaN, every denormal, both zeros."""
    shape = draw(shapes())
    count = math.prod(shape)
    if draw(st.booleans()):
        dtype = np.dtype(draw(st.sampled_from(NUMPY)))
        raw = draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
        if dtype.kind == "b":
            raw = bytes(byte & 1 for byte in raw)
        return np.frombuffer(raw, dtype).reshape(shape)
    kind = draw(st.sampled_from(TORCH))
    size = torch.empty((), dtype=kind).element_size()
    raw = draw(st.binary(min_size=count * size, max_size=count * size))
    if kind == torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    if not count:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(bytearray(raw), dtype=kind).reshape(shape)


def nan_with(payload: int) -> float:
    return float(struct.unpack(">d", struct.pack(">Q", 0x7FF8000000000000 | payload))[0])


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.integers(0, (1 << 51) - 1).map(nan_with)
    | st.text(st.characters())
)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3))
TREES = st.dictionaries(
    st.text(max_size=4) | st.sampled_from(["/", "~", "~0", "", "__metadata__", "json", "numpy"]),
    st.recursive(arrays() | JSON, lambda inner: st.dictionaries(st.text("ab/~", max_size=2), inner, max_size=3)),
    max_size=5,
)


def bits(value: Any) -> Any:
    """Equal exactly if two trees are equal bit for bit, types included."""
    if isinstance(value, dict):
        return [(key, bits(item)) for key, item in value.items()]
    if isinstance(value, list):
        return ["list", *map(bits, value)]
    if isinstance(value, np.ndarray):
        return ("numpy", value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, torch.Tensor):
        return ("torch", value.dtype, tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, float):
        return ("float", struct.pack(">d", value))
    return (type(value).__name__, value)


def written(tree: dict[str, Any]) -> tuple[bytes, str]:
    out = io.BytesIO()
    sha256, size = write_snapshot(out.write, Snapshot(tree, {("in", 0): 7, ("a", 1): 2}, FINGERPRINT))
    assert size == len(out.getvalue()) and sha256 == hashlib.sha256(out.getvalue()).hexdigest()
    return out.getvalue(), sha256


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_a_tree_comes_back_bit_for_bit(tree: dict[str, Any]) -> None:
    data, sha256 = written(tree)
    back = read_snapshot(io.BytesIO(data), len(data), sha256)
    assert bits(back.tree) == bits(tree)
    assert back.offsets == {("in", 0): 7, ("a", 1): 2} and back.fingerprint == FINGERPRINT
    assert written(back.tree)[0] == data


@settings(max_examples=40, deadline=None)
@given(TREES)
def test_the_file_is_what_safetensors_reads(tree: dict[str, Any]) -> None:
    data, _ = written(tree)
    loaded = safetensors.torch.load(data)

    def leaves(node: dict[str, Any]) -> list[Any]:
        inner = [leaves(v) if isinstance(v, dict) else [v] for v in node.values()]
        return [leaf for some in inner for leaf in some if isinstance(leaf, np.ndarray | torch.Tensor)]

    theirs = sorted(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in loaded.values())
    ours = sorted(bits(leaf)[3] for leaf in leaves(tree))
    assert theirs == ours


def test_names_are_paths() -> None:
    data, _ = written({"key/1": {"held": np.arange(3)}, "key": {"1": {"held": np.zeros(1)}}})
    assert set(safetensors.numpy.load(data)) == {"key~11/held", "key/1/held"}


def test_views_and_gradients_are_stored_as_they_look() -> None:
    grid = np.arange(12.0).reshape(3, 4)
    weights = torch.arange(6.0).reshape(2, 3).requires_grad_()
    data, sha256 = written({"t": grid.T[::2], "w": weights.t(), "zero": np.array(-0.0)})
    tree = read_snapshot(io.BytesIO(data), len(data), sha256).tree
    np.testing.assert_array_equal(tree["t"], grid.T[::2])
    assert torch.equal(tree["w"], weights.t()) and not tree["w"].requires_grad
    assert tree["zero"].shape == () and math.copysign(1, tree["zero"]) == -1
    tree["t"][0] = 5
    tree["w"][0] = 5


@pytest.mark.parametrize(
    ("tree", "says"),
    [
        ({"a": {"b": {1, 2}}}, "state 'a/b': a builtins.set cannot be stored"),
        ({"a": np.float64(1)}, "state 'a': a numpy.float64 cannot be stored"),
        ({"a": (1, 2)}, "state 'a': a builtins.tuple cannot be stored"),
        ({"a": np.array(["x"])}, "state 'a': numpy dtype <U1 cannot be stored"),
        ({"a": np.array([1.0], ">f8")}, "state 'a': numpy dtype >f8 cannot be stored"),
        ({"a": torch.eye(2).to_sparse()}, "state 'a': a torch tensor of torch.float32, torch.sparse_coo"),
        ({"a": {3: 1}}, "state 'a': key 3 is a int, not a string"),
        ([], "state must be a dict, not list"),
    ],
)
def test_what_cannot_come_back_is_refused_by_name(tree: Any, says: str) -> None:
    with pytest.raises(SnapshotError) as caught:
        write_snapshot(io.BytesIO().write, Snapshot(tree, {}, FINGERPRINT))
    assert says in str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_is_noticed_and_costs_no_memory(data: st.DataObject) -> None:
    good, sha256 = written({"a": np.arange(5), "b": {"c": torch.ones(2), "d": [1, "x"]}})
    kind = data.draw(st.sampled_from(["flip", "cut", "longer"]))
    at = data.draw(st.integers(0, len(good) - 1))
    if kind == "flip":
        bad = good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    else:
        bad = good[:at] if kind == "cut" else good + b"\0" * (at + 1)
    with pytest.raises(SnapshotError, match=f"snapshot {sha256} is damaged"):
        read_snapshot(io.BytesIO(bad), len(bad), sha256)
    # Even where the sha256 is that of the damaged bytes, nothing but a snapshot or a SnapshotError comes out.
    with contextlib.suppress(SnapshotError):
        read_snapshot(io.BytesIO(bad), len(bad), hashlib.sha256(bad).hexdigest())


def test_a_header_cannot_ask_for_more_than_the_file_has() -> None:
    tensor = {"dtype": "F64", "shape": [1 << 40], "data_offsets": [0, 8 << 40]}
    header = {"__metadata__": {"stepstream": "{}"}, "a": tensor}
    text = json.dumps(header).encode()
    for data in (struct.pack("<Q", len(text)) + text, struct.pack("<Q", 1 << 60) + b"{}"):
        with pytest.raises(SnapshotError, match="damaged"):
            read_snapshot(io.BytesIO(data), len(data), "0" * 64)


def test_another_schema_is_refused_by_number() -> None:
    document = json.dumps({"schema": 99})
    text = json.dumps({"__metadata__": {"stepstream": document}}).encode()
    data = struct.pack("<Q", len(text)) + text
    with pytest.raises(SnapshotError, match="its schema is 99, and this version reads schema 1"):
        read_snapshot(io.BytesIO(data), len(data), hashlib.sha256(data).hexdigest())


def test_the_size_is_bounded_before_anything_is_written() -> None:
    pieces: list[Any] = []
    with pytest.raises(SnapshotError, match="the state has 8000 bytes, more than the 100 that are allowed"):
        write_snapshot(pieces.append, Snapshot({"a": np.zeros(1000)}, {}, FINGERPRINT), 100)
    assert pieces == []


def test_the_store_keeps_what_it_is_told_to(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path / "deep" / "snapshots")
    refs = [store.save({"n": n, "a": np.full(3, n)}, {("in", 0): n}, FINGERPRINT) for n in range(3)]
    assert store.save({"n": 0, "a": np.full(3, 0)}, {("in", 0): 0}, FINGERPRINT) == refs[0]
    assert store.path(refs[0].sha256).stat().st_size == refs[0].bytes
    assert store.load(refs[2], FINGERPRINT).tree["n"] == 2
    assert store.collect({refs[2].sha256}) == 2
    with pytest.raises(SnapshotError, match=r"cannot be read: .*No such file"):
        store.load(refs[0], FINGERPRINT)
    with pytest.raises(SnapshotError, match="is not a sha256"):
        store.path("../../etc/passwd")


def test_the_store_refuses_other_pipelines_offsets_and_contents(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    ref = store.save({"n": 1}, {("in", 0): 4}, FINGERPRINT)
    other = [{**FINGERPRINT[0], "options": {"size": 4}}]
    with pytest.raises(SnapshotError, match=r"of another pipeline: operator 'a': options.size was 3 and now is 4"):
        store.load(ref, other)
    with pytest.raises(SnapshotError, match="stands at"):
        store.load(SnapshotRef(ref.sha256, ref.bytes, {("in", 0): 5}), FINGERPRINT)
    path = store.path(ref.sha256)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(SnapshotError, match="is damaged: "):
        store.load(ref, FINGERPRINT)
    path.write_bytes(b"")
    with pytest.raises(SnapshotError, match=f"it has 0 bytes, not {ref.bytes}"):
        store.load(ref, FINGERPRINT)


def test_a_killed_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / ".123-abc.tmp").write_bytes(b"half")
    SnapshotStore(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path) -> None:
    store = SnapshotStore(tmp_path)
    with pytest.raises(SnapshotError):
        store.save({"a": object()}, {}, FINGERPRINT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"name": "b"}, "its operators were a, and now are b"),
        ({"weights": "ff"}, "operator 'a': weights was null and now is \"ff\""),
        ({"type": "m:B"}, 'operator \'a\': type was "m:A" and now is "m:B"'),
    ],
)
def test_what_differs_is_named(change: dict[str, Any], says: str | None) -> None:
    assert fingerprint_difference(FINGERPRINT, [{**FINGERPRINT[0], **change}]) == says
