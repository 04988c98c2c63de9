"""Edge lists in npz, csv and JODIE's csv: what is read, how it is told apart, and what is refused."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import DATA

from stepstream.connectors.base import InputError
from stepstream.connectors.interaction_times import ticks_of_array, ticks_of_texts, to_ns
from stepstream.connectors.interactions import InteractionRecording
from stepstream.connectors.recording import find_reader, open_recording

SRC, DST, TS = np.array([1, 3, 1]), np.array([2, 2, 3]), np.array([10, 20, 30])


def saved(folder: Path, **arrays: Any) -> Path:
    path = folder / "some.bin"  # the name says nothing
    with path.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    return path


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "some.bin"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def edges(recording: InteractionRecording) -> list[tuple[Any, Any, int]]:
    columns = (recording.source.tolist(), recording.destination.tolist(), recording.times_ns.tolist())
    return [(recording.nodes[u], recording.nodes[v], t) for u, v, t in zip(*columns, strict=True)]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("wikipedia", {"interactions": 157_474, "sources": 8227, "destinations": 1000, "nodes": 9227, "t_first": 0,
                       "t_last": 2_678_373, "time_ordered": True, "labels": True, "bipartite": True}),
        ("uci_collegemsg", {"interactions": 59_835, "nodes": 1899, "t_first": 1_082_040_961, "t_last": 1_098_777_142,
                            "start": "2004-04-15T14:56:01Z", "time_ordered": True, "bipartite": False}),
        ("bitcoin_alpha_unsorted", {"interactions": 24_186, "time_ordered": False, "out_of_order": 24_174,
                                    "behind_s": 164_246_400, "features": 1, "feature_names": ["rating"]}),
    ],
)  # fmt: skip
def test_the_shared_recordings(file: str, expected: dict[str, Any]) -> None:
    path = DATA / "dyngraph" / f"{file}.npz"
    if not path.exists():
        pytest.skip(f"{file}.npz is not in ../shared/data/dyngraph")
    recording = open_recording(path)
    summary = recording.summary()
    assert {name: summary[name] for name in expected} == expected
    assert (summary["modality"], summary["format"], summary["time_unit"]) == ("graph", "interactions-npz", "s")
    arrays = np.load(path, allow_pickle=False)
    nodes = np.array(recording.nodes)
    assert (nodes[recording.source] == arrays["src"]).all()
    assert (nodes[recording.destination] == arrays["dst"]).all()
    assert (recording.times_ns == arrays["ts"].astype(np.int64) * 10**9).all()
    ordered = recording.in_time_order()
    assert ordered.time_ordered and (ordered is recording) == recording.time_ordered
    assert sorted(edges(ordered)) == sorted(edges(recording))


def test_npz_with_all_there_can_be(tmp_path: Path) -> None:
    path = saved(
        tmp_path, src=SRC, dst=DST, ts=TS, features=np.arange(6).reshape(3, 2), rating=np.array([-1, 0, 1], np.int8),
        label=np.array([0, 1, 0]), event_id=np.array(["a", "b", "a"]), idx=np.arange(3), note=np.array("mine"),
    )  # fmt: skip
    recording = open_recording(path)
    assert edges(recording) == [(1, 2, 10 * 10**9), (3, 2, 20 * 10**9), (1, 3, 30 * 10**9)]
    assert recording.feature_names == ("features_0", "features_1", "rating")
    assert recording.features.tolist() == [[0, 1, -1], [2, 3, 0], [4, 5, 1]]
    assert recording.labels.tolist() == [0, 1, 0]
    assert recording.event_ids == ("a", "b", "a")
    assert recording.notes == ("arrays that are not read: note",)
    assert recording.summary()["event_ids"] == 2
    assert not recording.source.flags.writeable and not recording.features.flags.writeable


def test_large_ids_and_microseconds_are_exact(tmp_path: Path) -> None:
    src = np.array([2**24 + 1, 2**53 + 1, 2**63 - 1, -(2**63)], np.int64)
    ts = np.array([1_082_040_961_000_001, 1_082_040_961_000_003, 1_082_040_961_000_002, 1_082_040_961_000_002])
    recording = open_recording(saved(tmp_path, src=src, dst=src[::-1], t=ts))
    assert [u for u, _, _ in edges(recording)] == src.tolist()
    assert recording.times_ns.tolist() == (ts * 1000).tolist()
    assert recording.time_unit == "us"
    assert recording.notes == ("times are taken to be in us, by the size of the largest (option time_unit)",)
    summary = recording.summary()
    assert (summary["t_first"], summary["t_last"]) == (1082040961.000001, 1082040961.000003)
    assert (summary["out_of_order"], summary["behind_s"], summary["ties"]) == (2, 1e-6, 1)


def test_texts_are_ids_too_and_keep_what_they_are(tmp_path: Path) -> None:
    recording = open_recording(saved(tmp_path, u=np.array(["a", "7"]), v=np.array([b"b", b"\xc3\xa9"]), t=[1, 2]))
    assert [(u, v) for u, v, _ in edges(recording)] == [("a", "b"), ("7", "é")]
    mixed = open_recording(saved(tmp_path, u=np.array(["7", "8"]), v=np.array([7, 9]), t=[1, 2]))
    assert edges(mixed)[0][:2] == (7, 7)  # all of both are integers in their plain form
    text = open_recording(written(tmp_path, "source,target,time\n7,007,1\n8,x,2\n"))
    assert [(u, v) for u, v, _ in edges(text)] == [("7", "007"), ("8", "x")]


def test_self_loops_ties_and_repeats_are_kept_and_counted(tmp_path: Path) -> None:
    recording = open_recording(saved(tmp_path, src=[1, 1, 1, 2], dst=[1, 2, 2, 1], ts=[5, 5, 5, 6]))
    summary = recording.summary()
    assert len(recording) == 4
    names = ("self_loops", "ties", "repeats", "same_pair_and_time")
    assert [summary[name] for name in names] == [1, 2, 1, 1]


@pytest.mark.parametrize("delimiter", [",", "\t", ";", " "])
@pytest.mark.parametrize(
    ("names", "separate"),
    [
        (("source", "destination", "time"), False),
        (("src", "dst", "ts"), False),
        (("u", "v", "timestamp"), False),
        (("u", "i", "ts"), False),
        (("User", "Item", "Time"), True),
        (("user_id", "item_id", "timestamp"), True),
    ],
)
def test_csv_headers(tmp_path: Path, delimiter: str, names: tuple[str, str, str], separate: bool) -> None:
    for order in itertools.permutations(range(3)):
        rows = [names, ("7", "8", "36.0"), ("9", "7", "36.5")]
        text = "".join(delimiter.join(row[at] for at in order) + "\n" for row in rows)
        recording = open_recording(written(tmp_path, text))
        assert recording.format == "interactions-csv"
        nodes = [("user:7", "item:8"), ("user:9", "item:7")] if separate else [(7, 8), (9, 7)]
        assert [(u, v) for u, v, _ in edges(recording)] == nodes
        assert recording.times_ns.tolist() == [36 * 10**9, 36_500_000_000]
    assert open_recording(tmp_path / "some.bin", options={"separate_ids": False}).nodes == (7, 8, 9)


def test_csv_with_all_there_can_be(tmp_path: Path) -> None:
    text = "\ufeff,event_id,time,source,destination,amount,comment,label,w\n"
    text += '0,e1,2004-04-15T14:56:01.000001Z,7,8,-2.5,"hello, you",1,3\n1,e2,2004-04-15T14:56:00Z,7,7,1e3,,,4\n'
    recording = open_recording(written(tmp_path, text))
    assert edges(recording) == [(7, 8, 1_082_040_961_000_001_000), (7, 7, 1_082_040_960_000_000_000)]
    assert recording.feature_names == ("amount", "w")
    assert recording.features.tolist() == [[-2.5, 3], [1000, 4]]
    assert recording.event_ids == ("e1", "e2")
    assert recording.labels[0] == 1 and np.isnan(recording.labels[1])
    assert recording.notes == ("columns that are not read: (no name), comment",)
    assert not recording.time_ordered


def test_jodie(tmp_path: Path) -> None:
    header = "user_id,item_id,timestamp,state_label,comma_separated_list_of_features\n"
    path = written(tmp_path, header + "0,0,0.0,0,-0.5,0.25,1\n0,1,36.0,1,1,2,3\n1,0,77.0,0,4,5,6\n")
    recording = open_recording(path)
    assert recording.format == "interactions-jodie"
    assert recording.nodes == ("user:0", "user:1", "item:0", "item:1")
    assert edges(recording)[1] == ("user:0", "item:1", 36 * 10**9)
    assert recording.features.tolist() == [[-0.5, 0.25, 1], [1, 2, 3], [4, 5, 6]]
    assert recording.labels.tolist() == [0, 1, 0]
    assert recording.summary()["bipartite"] and recording.summary()["separate_ids"]
    bare = open_recording(written(tmp_path, header + "0,0,0.0,0\n0,1,36.0,1\n"))
    assert bare.features is None
    changed = written(tmp_path, header + "0,0,0.0,0,1,2\n0,1,36.0,1,1\n")
    with pytest.raises(InputError, match=r"some\.bin: row 3: expected 6 fields, got 5 \(do the features change"):
        open_recording(changed)
    with pytest.raises(InputError, match="row 2: expected at least 4 fields, got 0"):
        open_recording(written(tmp_path, header))


def test_a_wind_is_no_graph(tmp_path: Path) -> None:
    path = written(tmp_path, "time,u,v\n2020-01-01T00:00:00,1.5,-0.5\n2020-01-01T01:00:00,1.5,0.5\n")
    assert find_reader(path).name == "traffic-csv"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("src,dst,ts\n", "expected rows below the header"),
        ("src,dst,ts\n1,2,-5\n", r"row 2: ts: expected a time of 0 to 2\^63, got -5"),
        ("src,dst,ts\n1,2,5\n1,2,nan\n", "row 3: ts: expected a finite time, got 'nan'"),
        ("src,dst,ts\n1,2,5\n1,2,inf\n", "row 3: ts: expected a finite time, got 'inf'"),
        ("src,dst,ts\n1,2,5\n1,2,noon\n", "row 3: ts: expected a finite time, got 'noon'"),
        ("src,dst,ts\n1,2,-0.5\n", "row 2: ts: expected a time of 0"),
        ("src,dst,ts\n1,2,99999999999999999999\n", r"row 2: ts: expected a time of 0 to 2\^63"),
        ("src,dst,ts\n1,2,2020-01-01T00:00:00Z\n1,2,5\n", "row 3: ts: expected ISO 8601"),
        ("src,dst,ts\n1,2,1960-01-01T00:00:00Z\n", "row 2: ts: expected a time of 0"),
        ("src,dst,ts\n1,2,5\n1,2,\n", "row 3: ts: missing"),
        ("src,dst,ts\n1,2,5\n,2,5\n", "row 3: src: missing"),
        ("src,dst,ts\n1,2,5\n1,2\n", "row 3: expected 3 fields, got 2"),
        ("src,dst,ts,w\n1,2,5,1\n1,2,5,x\n", "row 3: w: expected a number, got 'x'"),
        ("src,dst,ts,w\n1,2,5,1\n1,2,5,\n", "row 3: w: missing"),
        ("src,dst,ts,w\n1,2,5,1\n1,2,5,1e300\n", "row 3: w: expected a finite number of float32, got inf"),
        ("src,source,dst,ts\n1,1,2,5\n", "header: expected one of source, src, .* got src and source"),
        (f"src,dst,ts\n1,{'x' * 1025},5\n", "row 2: dst: expected .* text of 1 to 1024 characters"),
        (b"src,dst,ts\n1,2,5\n\xff\xfe,2,5\n", "no UTF-8 text"),
    ],
)
def test_bad_csv_names_row_and_column(tmp_path: Path, text: str | bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as error:
        open_recording(written(tmp_path, text))
    assert "some.bin" in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"ts": np.array([1, -2, 3])}, r"ts\[1\]: expected a time of 0 to 2\^63, got -2"),
        ({"ts": np.array([1, np.nan, 3])}, r"ts\[1\]: expected a finite time, got nan"),
        ({"ts": np.array([1, np.inf, 3])}, r"ts\[1\]: expected a finite time, got inf"),
        ({"ts": np.array([1, 2**64 - 1, 3], np.uint64)}, r"ts\[1\]: expected a time"),
        ({"ts": np.array([1, 1082040961, 3], np.float32)}, r"ts\[1\]: .* in float32, .*16777216 only"),
        ({"ts": np.array(["a", "b", "c"])}, "ts.*expected integers, floats or datetime64"),
        ({"ts": np.array([1, 2])}, r"ts: expected one value an interaction, \[3\], got \[2\]"),
        ({"src": SRC.astype(float)}, "src: expected ids, integers or texts, got float64"),
        ({"src": np.array([True, False, True])}, "src: expected ids, integers or texts, got bool"),
        ({"src": np.array([1, 2**63, 3], np.uint64)}, r"src\[1\]: expected an integer of 64 bits with sign"),
        ({"src": SRC.astype(object)}, "Python objects|cut off or damaged"),
        ({"src": np.array(["a", "", "b"])}, "interaction 1: src: expected .*, got ''"),
        ({"dst": np.zeros((3, 2), int)}, r"dst: expected one value an interaction"),
        ({"features": np.zeros((2, 4))}, r"features: expected numbers \[3, F\], got float64 \[2, 4\]"),
        ({"features": np.full((3, 2), np.nan)}, "interaction 0: features_0: expected a finite number"),
        ({"features": np.zeros((3, 70_000), np.int8)}, "at most 65536 features"),
        ({"event_id": np.array([1.5, 2, 3])}, "event_id: expected integers or texts"),
        ({"source": SRC}, "expected one of source, src, .* got"),
        ({"src": SRC[:0], "dst": DST[:0], "ts": TS[:0]}, "expected at least one interaction"),
    ],
)
def test_bad_npz_names_array_and_place(tmp_path: Path, arrays: dict[str, Any], reason: str) -> None:
    path = saved(tmp_path, **({"src": SRC, "dst": DST, "ts": TS} | arrays))
    with pytest.raises(InputError, match=reason) as error:
        open_recording(path)
    assert str(path) in str(error.value)


def test_every_truncation_is_an_input_error_or_fewer_rows(tmp_path: Path) -> None:
    whole = saved(tmp_path, src=SRC, dst=DST, ts=TS).read_bytes()
    for length in range(0, len(whole), 11):
        with pytest.raises(InputError, match=r"some\.bin"):
            open_recording(written(tmp_path, whole[:length]))


@pytest.mark.parametrize(
    ("largest", "unit"),
    [(10**11 - 1, "s"), (10**11, "ms"), (10**14 - 1, "ms"), (10**14, "us"), (10**17 - 1, "us"), (10**17, "ns")],
)
def test_the_unit_is_judged_from_the_largest_time(largest: int, unit: str) -> None:
    ticks = ticks_of_array(np.array([1, largest]), str)
    if unit == "s":  # the year 5138 has no place in 64 bits of nanoseconds
        with pytest.raises(InputError, match="does not fit 64-bit nanoseconds"):
            to_ns(ticks, None, str)
    elif largest in (10**14 - 1, 10**17 - 1):
        with pytest.raises(InputError, match="does not fit"):
            to_ns(ticks, None, str)
    else:
        assert to_ns(ticks, None, str)[1] == unit


def test_the_unit_may_be_told(tmp_path: Path) -> None:
    path = saved(tmp_path, src=SRC, dst=DST, ts=TS)
    assert open_recording(path, options={"time_unit": "ms"}).times_ns.tolist() == [10**7, 2 * 10**7, 3 * 10**7]
    named = saved(tmp_path, src=SRC, dst=DST, time_ns=TS)
    assert open_recording(named).times_ns.tolist() == TS.tolist()
    moments = np.array(["2004-04-15T14:56:01.000001"] * 3, "datetime64[us]")
    dated = open_recording(saved(tmp_path, src=SRC, dst=DST, ts=moments))
    assert set(dated.times_ns.tolist()) == {1_082_040_961_000_001_000}
    with pytest.raises(InputError, match="time_unit: .*got 'h'"):
        open_recording(path, options={"time_unit": "h"})


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1), st.sampled_from(["s", "ms", "us", "ns"]))
def test_times_are_exact_as_integers_and_as_text(ns: list[int], unit: Any) -> None:
    tick = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}[unit]
    digits = len(str(tick)) - 1
    texts = [f"{n // tick}.{n % tick:0{digits}d}" if digits else str(n) for n in ns]
    if max(ns) < (2**63 - 1) - 2 * tick:
        assert to_ns(ticks_of_texts(texts, str), unit, str)[0].tolist() == ns
    whole = [n // tick for n in ns]
    if max(whole) < (2**63 - 1) // tick - 1:
        expected = [n * tick for n in whole]
        assert to_ns(ticks_of_array(np.array(whole, np.int64), str), unit, str)[0].tolist() == expected
        assert to_ns(ticks_of_texts(list(map(str, whole)), str), unit, str)[0].tolist() == expected


@given(st.lists(st.floats(0, 4e9), min_size=1))
def test_float_seconds_are_rounded_once(seconds: list[float]) -> None:
    times, _ = to_ns(ticks_of_array(np.array(seconds), str), "s", str)
    for got, value in zip(times.tolist(), seconds, strict=True):
        assert abs(got - Fraction(value) * 10**9) <= Fraction("0.500001")
