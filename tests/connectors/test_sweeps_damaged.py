"""Whatever is done to the bytes of a recording: it is refused with a reason, or gives valid sweeps."""

from __future__ import annotations

import contextlib
import io
import lzma
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lidar_files import av2, cloud, kitti, nuscenes, pcd
from test_sweeps_ros import MESSAGES, bag, mcap_file

from stepstream.connectors.base import InputError
from stepstream.connectors.recording import find_reader, open_recording
from stepstream.connectors.sweep_checks import sweep_fault

COLUMNS = {axis: cloud(30)[:, k].copy() for k, axis in enumerate("xyz")}


def _npz(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, **arrays)
    return out.getvalue()


def _first(make: Callable[[Path], object], pattern: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "made")
        return min(Path(folder).rglob(pattern)).read_bytes()


IMAGE = cloud(24)[:, :3].reshape(1, 4, 6, 3)
MADE: dict[str, Callable[[], tuple[str, bytes]]] = {
    "kitti": lambda: ("kitti-bin", cloud(30).tobytes()),
    "kitti-xz": lambda: ("kitti-bin", lzma.compress(cloud(30).tobytes())),
    "nuscenes": lambda: ("nuscenes-bin", _first(lambda path: nuscenes(path, 1), "*.bin")),
    "pcd-ascii": lambda: ("pcd", pcd(COLUMNS, "ascii")),
    "pcd-binary": lambda: ("pcd", pcd(COLUMNS, "binary")),
    "pcd-compressed": lambda: ("pcd", pcd(COLUMNS, "binary_compressed")),
    "range": lambda: ("range-npz", _npz(xyz=IMAGE[0], label=np.ones((4, 6), np.uint8))),
    "ouster": lambda: ("ouster-npz", _npz(xyz=IMAGE, col_timestamp_ns=np.arange(6, dtype=np.uint64)[None])),
    "av2": lambda: ("av2-feather", _first(lambda path: av2(path, 1), "3*.feather")),
    "bag": lambda: ("ros2-bag", _first(lambda path: bag(path / "a.db3", MESSAGES), "*.db3")),
    "mcap": lambda: ("mcap", _first(lambda path: mcap_file(path, MESSAGES), "made")),
}


@pytest.mark.parametrize("kind", MADE)
def test_damage_is_explained(kind: str, tmp_path: Path) -> None:
    name, body = MADE[kind]()
    path = tmp_path / "000000.bin"
    path.write_bytes(body)
    assert find_reader(path).name == name

    @settings(deadline=None, max_examples=60, derandomize=True)
    @given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4), st.integers(0, len(body)))
    def attempt(changes: list[tuple[int, int]], length: int) -> None:
        damaged = bytearray(body)
        for at, byte in changes:
            damaged[at % len(body)] = byte
        path.write_bytes(bytes(damaged[:length]) if len(changes) < 2 else bytes(damaged))
        with contextlib.suppress(InputError):
            recording = open_recording(path, name)
            for index in range(len(recording)):
                sweep = None
                with contextlib.suppress(InputError):
                    sweep = recording.load(index)
                assert sweep is None or sweep_fault(sweep) is None

    attempt()


def test_a_file_that_is_gone_is_one_sweep_less(tmp_path: Path) -> None:
    kitti(tmp_path, 3)
    recording = open_recording(tmp_path)
    (tmp_path / "000001.bin").unlink()
    assert recording.summary()["unreadable"] == 1
    for name in ("a.pcd", "b.pcd"):
        (tmp_path / name).write_bytes(pcd(COLUMNS, "binary"))
    recording = open_recording(tmp_path, "pcd")
    (tmp_path / "b.pcd").unlink()
    with pytest.raises(InputError, match="sweep 1: No such file"):
        recording.load(1)


def test_no_length_in_a_file_makes_room_for_more_than_the_file(tmp_path: Path) -> None:
    name, body = MADE["mcap"]()
    path = tmp_path / "made.mcap"
    refused = 0
    tracemalloc.start()
    try:
        for at in range(8, len(body)):
            path.write_bytes(body[:at] + b"\x51" + body[at + 1 :])
            try:
                recording = open_recording(path, name)
                for index in range(len(recording)):
                    with contextlib.suppress(InputError):
                        recording.load(index)
            except InputError:
                refused += 1
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Lengths are eight bytes: the damaged ones say up to 2^62.
    assert most < 64 << 20
    assert 0 < refused < len(body) - 8
