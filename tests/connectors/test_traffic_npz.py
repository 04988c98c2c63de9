from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import DATA

from stepstream.connectors.base import InputError
from stepstream.connectors.recording import open_recording
from stepstream.connectors.times import format_time, parse_time
from stepstream.connectors.traffic import TrafficRecording

VALUES = np.array([[60, 0, 50], [61, 40, np.nan], [62, 41, 52]], np.float32)


def saved(folder: Path, **arrays: Any) -> Path:
    path = folder / "some.bin"  # the name says nothing
    with path.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    return path


def shared(name: str) -> Path:
    path = DATA / "traffic" / name
    if not path.exists():
        pytest.skip(f"{name} is not in ../shared/data/traffic")
    return path


def test_metr_la() -> None:
    recording = open_recording(shared("metr_la.npz"))
    summary = recording.summary()
    assert (
        summary
        | {
            "modality": "traffic",
            "format": "traffic-npz",
            "sensors": 207,
            "frames": 34272,
            "start": "2012-03-01T00:00:00",
            "end": "2012-06-27T23:55:00",
            "step_s": 300,
            "missing_fraction": 0.0811,
            "edges": 1722,
        }
        == summary
    )
    assert recording.name == "metr-la"
    assert recording.sensors[:2] == ("773869", "767541")
    assert recording.values[:3, 0].tolist() == [64.375, np.float32(157920 / 2520), 64.0]
    row, col, weight = recording.graph
    assert len(set(zip(row.tolist(), col.tolist(), strict=True))) == 1722
    assert weight.min() >= 0.1
    assert not recording.values.flags.writeable


def test_pemsd7m_skips_weekends() -> None:
    recording = open_recording(shared("pemsd7m_25of228.npz"))
    assert recording.values.shape == (44 * 288, 25)
    assert recording.summary()["start"] == "2012-05-01T00:00:00"
    assert recording.summary()["end"] == "2012-06-29T23:55:00"
    days = recording.times_ns.astype("datetime64[ns]").astype("datetime64[D]")
    assert len(np.unique(days)) == 44
    assert np.is_busday(days).all()
    assert recording.values[0, 0] == np.float32(71.1)
    row, col, _ = recording.graph
    edges = set(zip(row.tolist(), col.tolist(), strict=True))
    assert all((b, a) in edges for a, b in edges)  # the published distances are symmetric
    assert any("weekdays only" in note for note in recording.notes)


def test_pemsd7m_cannot_start_on_a_sunday() -> None:
    with pytest.raises(InputError, match="2012-05-06 is none"):
        open_recording(shared("pemsd7m_25of228.npz"), options={"start": "2012-05-06"})


def test_general_layout(tmp_path: Path) -> None:
    path = saved(
        tmp_path,
        values=VALUES,
        sensors=np.array(["a", "b", "c"]),
        start=np.array("2020-01-01T00:00:00"),
        step_s=np.array(60),
        adjacency=np.array([[0, 0.5, 0], [0, 0, 0], [1, 0, 0]]),
        name=np.array("mine"),
        unit=np.array("km/h"),
    )
    recording = open_recording(path)
    assert isinstance(recording, TrafficRecording)
    assert (recording.name, recording.unit, recording.sensors) == ("mine", "km/h", ("a", "b", "c"))
    assert np.isnan(recording.values).tolist() == [[False, True, False], [False, False, True], [False] * 3]
    assert [format_time(t) for t in recording.times_ns.tolist()][2] == "2020-01-01T00:02:00Z"
    assert [part.tolist() for part in recording.graph] == [[0, 2], [1, 0], [0.5, 1.0]]
    assert recording.notes == ()
    kept = open_recording(path, options={"zero_is_missing": False})
    assert kept.values[0, 1] == 0


def test_irregular_times(tmp_path: Path) -> None:
    times = np.array([0, 300, 900], np.int64) * 10**9
    recording = open_recording(saved(tmp_path, speed=VALUES, times_ns=times))
    assert recording.times_ns.tolist() == times.tolist()
    assert recording.step_s == 300


def test_pems_features_have_no_time_axis(tmp_path: Path) -> None:
    data = np.arange(2 * 3 * 2).reshape(2, 3, 2) + 1.0
    path = saved(tmp_path, data=data)
    recording = open_recording(path)
    assert recording.values.tolist() == data[:, :, 0].tolist()
    assert recording.summary()["start"] == "1970-01-05T00:00:00"
    assert recording.step_s == 300
    assert len(recording.notes) == 3
    told = open_recording(path, options={"feature": 1, "start": "2018-01-01", "step_s": 60})
    assert told.values.tolist() == data[:, :, 1].tolist()
    assert told.start_ns == parse_time("2018-01-01")
    assert told.notes == ("feature 1 of 2 (option feature)",)
    with pytest.raises(InputError, match=r"has 2 \(0 to 1\), got 2"):
        open_recording(path, options={"feature": 2})


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"values": np.zeros((0, 3))}, "values: expected at least one frame and one sensor, got 0 x 3"),
        ({"values": np.zeros(3)}, r"values: expected numbers \[frames, sensors\], got float64 \[3\]"),
        ({"values": np.array([["a"]])}, "values: expected numbers"),
        ({"values": VALUES, "sensors": np.array(["a"])}, "sensors: expected 3 names"),
        ({"values": VALUES, "sensors": np.array(["a", "b", "a"])}, "sensors: 'a' is named twice"),
        ({"values": VALUES, "step_s": np.array(0)}, "step_s: expected at least 1, got 0"),
        ({"values": VALUES, "step_s": np.array("x")}, "step_s: expected one integer"),
        ({"values": VALUES, "start": np.array("noon")}, "start: time: expected ISO 8601"),
        ({"values": VALUES, "times_ns": np.array([3, 2, 4])}, "times: frame 1 .* is not after frame 0"),
        ({"values": VALUES, "times_ns": np.array([3])}, "times: expected 3, one a frame"),
        ({"values": VALUES, "adjacency": np.eye(4)}, r"adjacency: expected \[3, 3\], got \[4, 4\]"),
        ({"values": VALUES, "adj_row": np.array([0])}, "adj_col: missing"),
        (
            {"values": VALUES, "adj_row": np.array([0]), "adj_col": np.array([7]), "adj_w": np.array([1.0])},
            "names sensor 7 .* expected 0 to 2",
        ),
        ({"values": VALUES, "latlon": np.zeros((2, 2))}, r"positions: expected \[3, 2\]"),
        ({"speed_num": np.ones((3, 2), np.int32)}, "denom: missing"),
        ({"values": np.array([[1, 2]], dtype=object)}, "values: .*(Python objects|expected numbers)"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, arrays: dict[str, Any], reason: str) -> None:
    path = saved(tmp_path, **arrays)
    with pytest.raises(InputError, match=reason) as error:
        open_recording(path)
    assert str(path) in str(error.value)


def test_every_truncation_is_an_input_error(tmp_path: Path) -> None:
    whole = saved(tmp_path, values=VALUES, sensors=np.array(["a", "b", "c"])).read_bytes()
    cut = tmp_path / "cut.npz"
    for length in range(0, len(whole), 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.npz"):
            open_recording(cut)


def test_a_header_that_promises_more_than_there_is_allocates_nothing(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (400000000000, 4), }"
    header = header.ljust(117) + b"\n"
    path = tmp_path / "huge.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("values.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(InputError, match="values"):
        open_recording(path)
    small = header.replace(b"400000000000", b"4           ")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("values.npy", b"\x93NUMPY\x01\x00" + len(small).to_bytes(2, "little") + small)
    with pytest.raises(InputError, match=r"the header promises 64 bytes .* it has 0"):
        open_recording(path)


def test_infinite_values_are_missing_and_noted(tmp_path: Path) -> None:
    recording = open_recording(saved(tmp_path, values=np.array([[1.0, np.inf], [2.0, -np.inf]])))
    assert np.isnan(recording.values[:, 1]).all()
    assert "2 infinite values are taken as missing" in recording.notes
