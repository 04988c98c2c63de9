"""Records of nodes that are away: what was read once is not read again, in bounded memory, and who is back is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stepstream.operators import away
from stepstream.operators.away import Away
from stepstream.operators.segment_files import SegmentFiles

NODES = list(range(20))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many records each read of the store was of."""
    sizes: list[int] = []
    read = SegmentFiles.read

    def counted(files: SegmentFiles, parts: Any) -> list[bytes]:
        sizes.append(len(parts))
        return read(files, parts)

    monkeypatch.setattr(SegmentFiles, "read", counted)
    return sizes


def stored(folder: Path) -> Away:
    held = Away(SegmentFiles(str(folder)), "fail")
    held.add(NODES, [b"%03d" % node for node in NODES])
    assert held.waiting == 0
    return held


def test_a_record_is_read_once(tmp_path: Path, reads: list[int]) -> None:
    held = stored(tmp_path)
    keys = [held.key(node) for node in NODES]
    wanted: list[bytes | None] = [b"%03d" % node for node in NODES]
    assert held.peek(keys[:3]) == wanted[:3] and reads == [3]
    assert held.peek(keys[:5]) == wanted[:5] and reads == [3, 2]
    assert held.peek([*keys[:5], keys[2]]) == [*wanted[:5], wanted[2]] and reads == [3, 2]
    assert held.peek(keys[7:8]) == wanted[7:8] and held.peek(keys[7:8]) == wanted[7:8] and reads == [3, 2, 1]


def test_no_more_is_kept_than_there_is_room_for(
    tmp_path: Path, reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = stored(tmp_path)
    keys = [held.key(node) for node in NODES]
    size = len(held.take(0, held.find(0) or 0) or b"") + 2 + 9
    monkeypatch.setattr(away, "_PEEKED_BYTES", 4 * size)
    reads.clear()
    held.peek(keys[1:9])
    assert reads == [8]
    held.peek(keys[5:9])
    assert reads == [8]
    held.peek(keys[4:9])
    assert reads == [8, 1]


def test_who_came_back_and_left_again_is_read_as_it_is_now(tmp_path: Path) -> None:
    held = stored(tmp_path)
    key, at = held.key(3), held.find(3)
    assert at is not None and held.peek([key]) == [b"003"]
    assert held.take(3, at) == b"003"
    assert held.peek([key]) == [None]
    held.add([3], [b"new"])
    assert held.peek([key]) == [b"new"]
