from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stepstream.connectors import recording as module
from stepstream.connectors.base import InputError
from stepstream.connectors.recording import READERS, Recording, find_reader, open_recording, register_reader


@dataclass
class Ticks:
    count: int

    def summary(self) -> dict[str, Any]:
        return {"modality": "clock", "format": "ticks", "count": self.count}


class TickReader:
    name = "ticks"
    modality = "clock"

    def sniff(self, path: Path, head: bytes) -> bool:
        return head.startswith(b"TICK")

    def read(self, path: Path) -> Ticks:
        return Ticks(len(path.read_bytes()) - 4)


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(module, "_registered", {})
    path = tmp_path / "recording.npz"  # a name that lies
    path.write_bytes(b"TICK...")
    return path


def test_a_users_reader_is_found_by_content(ticks: Path) -> None:
    with pytest.raises(InputError, match="of no known format; known: interactions-npz, .*, traffic-npz"):
        open_recording(ticks)
    register_reader(TickReader)
    recording = open_recording(ticks)
    assert isinstance(recording, Recording)
    assert recording.summary() == {"modality": "clock", "format": "ticks", "count": 3}
    assert open_recording(ticks, "ticks").count == 3
    with pytest.raises(InputError, match="ticks: takes no options, got step_s"):
        open_recording(ticks, options={"step_s": 5})


def test_a_users_reader_is_named_as_module_and_class(
    ticks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_ticks.py").write_text(
        "class Reader:\n"
        "    name, modality = 'mine', 'clock'\n"
        "    def sniff(self, path, head): return False\n"
        "    def read(self, path): return path.name\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert open_recording(ticks, "my_ticks:Reader") == "recording.npz"
    sys.modules.pop("my_ticks")
    with pytest.raises(InputError, match=r"my_ticks:Missing.*cannot be imported"):
        find_reader(ticks, "my_ticks:Missing")


def test_a_class_that_is_no_reader_is_refused() -> None:
    with pytest.raises(InputError, match="has no 'name'"):
        register_reader(object)


def test_every_built_in_reader_keeps_the_contract(tmp_path: Path) -> None:
    for name in READERS:
        reader = find_reader(tmp_path, name)
        assert reader.name == name
        assert not reader.sniff(tmp_path, b"")  # a folder
        assert not reader.sniff(tmp_path / "x", b"\x00\x01\x02")


def test_what_cannot_be_opened_says_why(tmp_path: Path) -> None:
    empty, other = tmp_path / "empty.npz", tmp_path / "other.npz"
    empty.touch()
    np.savez(other, src=[1], dst=[2])
    with pytest.raises(InputError, match=r"empty\.npz: the file is empty"):
        open_recording(empty)
    with pytest.raises(InputError, match=r"absent: No such file"):
        open_recording(tmp_path / "absent")
    with pytest.raises(InputError, match=r"an archive with dst\.npy, src\.npy: not a layout"):
        open_recording(other)
    with pytest.raises(InputError, match="expected one of the arrays speed_num"):
        open_recording(other, "traffic-npz")
    with pytest.raises(InputError, match="format: 'netcdf' is unknown; known: .*interactions-csv, .*traffic-csv"):
        open_recording(other, "netcdf")
    with pytest.raises(InputError, match="of no known format"):
        open_recording(tmp_path)
    with pytest.raises(InputError, match="Is a directory"):
        open_recording(tmp_path, "traffic-csv")


def test_options_are_checked_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("time,a\n2020-01-01T00:00:00,5\n")
    with pytest.raises(InputError, match=r"^step_s: .*greater than 0, got -1"):
        open_recording(path, options={"step_s": -1})
    with pytest.raises(InputError, match=r"^stepp: Extra inputs are not permitted"):
        open_recording(path, options={"stepp": 1})
