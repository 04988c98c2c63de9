from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from stepstream.connectors.base import InputError
from stepstream.connectors.recording import open_recording

START = 1_330_560_000_000_000_000
STEP = 300_000_000_000


def pandas_fixed(
    path: Path,
    sensors: Any,
    values: Any,
    times: Any = None,
    kind: str = "datetime64",
    group: str = "df",
    without: str = "",
    second_block: int = 0,
) -> Path:
    """The layout that pandas' to_hdf(format="fixed") writes, of one block or two."""
    values = np.asarray(values)
    times = START + np.arange(len(values), dtype=np.int64) * STEP if times is None else np.asarray(times, np.int64)
    first = len(sensors) - second_block
    parts = {
        "axis0": np.asarray(sensors),
        "axis1": times,
        "block0_items": np.asarray(sensors[:first]),
        "block0_values": values[:, :first],
    }
    if second_block:
        parts |= {"block1_items": np.asarray(sensors[first:]), "block1_values": values[:, first:].astype(np.int64)}
    with h5py.File(path, "w") as file:
        node = file.create_group(group)
        node.attrs["pandas_type"] = np.bytes_("frame")
        # pandas pickles this one; a reader must get along without it.
        node.attrs["freq"] = np.bytes_(b"cpandas._libs.tslibs.offsets\n")
        for name, data in parts.items():
            if name != without:
                node[name] = data
        if without != "axis1":
            node["axis1"].attrs["kind"] = np.bytes_(kind)
    return path


def test_metr_la_layout_bytes_and_float64(tmp_path: Path) -> None:
    path = pandas_fixed(tmp_path / "x", [b"773869", b"767541"], [[64.375, 0.0], [62.0, 48.25]])
    recording = open_recording(path)
    assert recording.format == "traffic-h5"
    assert recording.sensors == ("773869", "767541")
    assert recording.times_ns.tolist() == [START, START + STEP]
    np.testing.assert_array_equal(recording.values, np.array([[64.375, np.nan], [62, 48.25]], np.float32))


def test_pems_bay_layout_integers_in_two_blocks(tmp_path: Path) -> None:
    path = pandas_fixed(
        tmp_path / "x", [400001, 400017, 400030], [[1.5, 2, 3], [4.5, 5, 6]], group="speed", second_block=1
    )
    recording = open_recording(path)
    assert recording.sensors == ("400001", "400017", "400030")
    assert recording.values.tolist() == [[1.5, 2, 3], [4.5, 5, 6]]


def test_newer_pandas_writes_the_unit_of_time(tmp_path: Path) -> None:
    seconds = [START // 10**9, START // 10**9 + 300]
    path = pandas_fixed(tmp_path / "x", [1], [[1.0], [2.0]], seconds, kind="datetime64[s]")
    assert open_recording(path).times_ns.tolist() == [START, START + STEP]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kind": "integer"}, "/df/axis1: expected times .* got kind 'integer'"),
        ({"times": [START, START - STEP]}, "times: frame 1 .* is not after frame 0"),
        ({"times": [START]}, r"/df/block0_values: expected \[1, 2\] .* got \[2, 2\]"),
        ({"sensors": [b"a", b"a"]}, "sensors: 'a' is named twice"),
        ({"values": np.zeros((0, 2))}, "got 0 x 2"),
        ({"values": np.array([[b"x", b"y"], [b"x", b"y"]])}, "block0_values: expected 2 dimension"),
        ({"kind": "datetime64[s]"}, "do not fit 64-bit nanoseconds"),
        ({"without": "axis1"}, "of a layout that no reader knows"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    given = {"sensors": [b"a", b"b"], "values": [[1.0, 2.0], [3.0, 4.0]]} | changes
    path = pandas_fixed(tmp_path / "bad.bin", **given)
    with pytest.raises(InputError, match=reason) as error:
        open_recording(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("axis", "said"), [("axis1", "there are no frames"), ("axis0", "there are no sensors")])
def test_what_pandas_writes_for_an_empty_frame_is_an_empty_recording(tmp_path: Path, axis: str, said: str) -> None:
    path = pandas_fixed(tmp_path / "empty.h5", [b"a", b"b"], np.ones((1, 2)), without=axis)
    with h5py.File(path, "a") as file:
        # As BlockManagerFixed.write_array_empty: a float64 of shape [1], whose attributes say what it stands for.
        placeholder = file["df"].create_dataset(axis, data=np.empty(1))
        placeholder.attrs["value_type"], placeholder.attrs["shape"] = np.bytes_("int64"), np.bytes_(b"(I0\ntp0\n.")
    with pytest.raises(InputError, match=rf"empty\.h5: /df/{axis}: {said}: an empty recording"):
        open_recording(path)


def test_truncations_are_input_errors(tmp_path: Path) -> None:
    whole = pandas_fixed(tmp_path / "x", [b"a", b"b"], np.ones((500, 2))).read_bytes()
    cut = tmp_path / "cut.h5"
    for length in range(8, len(whole), len(whole) // 20):
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cut\.h5"):
            open_recording(cut)
