"""A segment is a plain safetensors file, whole or not there, and every byte of a head is checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from stepstream.operators.segment_files import Segment, SegmentError, SegmentFiles, digest

RECORDS = [b"one", b"", b"three" * 100]


def test_a_segment_is_a_safetensors_file_that_can_be_read_in_parts(tmp_path: Path) -> None:
    segment = Segment.of([7, 8, 9], RECORDS)
    assert segment.data is not None
    held = load(segment.data)
    assert held["key"].tolist() == [7, 8, 9] and held["records"].tobytes() == b"".join(RECORDS)
    files = SegmentFiles(str(tmp_path / "a" / "b"))
    files.write(segment)
    files.write(segment)
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [f"{segment.sha256}.segment"]
    assert files.read([(segment.sha256, *segment.span(place)) for place in (2, 0, 1)]) == [RECORDS[2], b"one", b""]
    assert segment.check.tolist() == [digest(record) for record in RECORDS]
    head = files.read([(segment.sha256, 0, segment.base)])[0]
    again = Segment.read(segment.sha256, segment.head_sha256, segment.size, head, np.array([True, False, True]))
    assert again.start.tolist() == segment.start.tolist() and again.check.tolist() == segment.check.tolist()
    assert (again.count, again.live_bytes, segment.live_bytes) == (2, 503, 503)
    with pytest.raises(ValueError, match="not what was written"):
        Segment.read(segment.sha256, segment.head_sha256, segment.size, head[:-1] + b"?", segment.live)


def test_a_segment_that_is_missing_is_not_one_that_cannot_be_read(tmp_path: Path) -> None:
    files = SegmentFiles(str(tmp_path))
    with pytest.raises(FileNotFoundError):
        files.read([("0" * 64, 0, 1)])
    Path(files.name("1" * 64)).mkdir()
    with pytest.raises(SegmentError, match=r"cannot be read: IsADirectoryError.*Nothing is lost"):
        files.read([("1" * 64, 0, 1)])
    assert digest(b"a") != digest(b"b") and 0 <= digest(b"") < 1 << 63
