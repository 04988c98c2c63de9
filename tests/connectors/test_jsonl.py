from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import records, same

from stepstream.connectors.base import InputError, Undecodable
from stepstream.connectors.jsonl import JsonLines
from stepstream.connectors.lines import Line, LineSplitter
from stepstream.connectors.record_json import record_to_json
from stepstream.connectors.records import Origin, Reading, Record

GOOD = b'{"key": "k", "sensor": "s%d", "time": %d, "value": 1.5}'


def source_of(path: Path, content: bytes, **options: object) -> JsonLines:
    path.write_bytes(content)
    return JsonLines(JsonLines.Options.model_validate({"path": path, **options}))


def drain(source: JsonLines, size: int = 2) -> list[Record]:
    found: list[Record] = []
    while not source.ended:
        found += source.poll(size, 0)
    return found


@given(st.lists(records(), max_size=8), st.integers(1, 5))
def test_written_records_are_read(tmp_path_factory: pytest.TempPathFactory, written: list[Record], size: int) -> None:
    path = tmp_path_factory.getbasetemp() / "readings.jsonl"
    source = source_of(path, b"".join(record_to_json(record) + b"\n" for record in written))
    read = drain(source, size)
    expected = [Record(r.key, r.time_ns, r.value, Origin("readings", 0, i)) for i, r in enumerate(written)]
    assert len(read) == len(expected)
    assert all(same(a, b) for a, b in zip(read, expected, strict=True))
    source.close()


def test_bad_blank_and_cut_off_lines(tmp_path: Path) -> None:
    lines = [GOOD % (0, 0), b"not json", b"", GOOD % (3, 3), b'{"key": "k", "sensor": "s4", "ti']
    source = source_of(tmp_path / "a b.jsonl", b"\n".join(lines))
    assert source.partitions() == [("a-b", 0)]
    found = drain(source)
    assert [r.origin.offset for r in found] == [0, 1, 3, 4]
    assert found[2].value == Reading("s3", 1.5)
    for record, raw in ((found[1], lines[1]), (found[3], lines[4])):
        assert isinstance(record.value, Undecodable)
        assert record.value.raw == raw
        assert "not JSON" in record.value.reason
    assert source.progress() == (5, 5)


def test_a_last_line_without_newline_is_read_if_it_is_whole(tmp_path: Path) -> None:
    source = source_of(tmp_path / "x", GOOD % (0, 0) + b"\r\n" + GOOD % (1, 1))
    assert [r.value for r in drain(source)] == [Reading("s0", 1.5), Reading("s1", 1.5)]


def test_a_line_above_the_limit_costs_no_memory_and_is_a_dead_letter(tmp_path: Path) -> None:
    long = b'{"key": "' + b"x" * 5000 + b'"}'
    source = source_of(tmp_path / "x", long + b"\n" + GOOD % (1, 1) + b"\n", max_line_bytes=2000)
    first, second = drain(source)
    assert first.value == Undecodable(long[:1024], "the line is too long; only its beginning is kept")
    assert second.value == Reading("s1", 1.5)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6))
def test_seek_goes_to_lines(tmp_path_factory: pytest.TempPathFactory, offsets: list[int]) -> None:
    path = tmp_path_factory.getbasetemp() / "seek.jsonl"
    source = source_of(path, b"".join(GOOD % (i, i) + b"\n" for i in range(20)))
    for offset in offsets:
        source.seek({("seek", 0): offset})
        assert [r.time_ns for r in source.poll(3, 0)] == list(range(offset, min(offset + 3, 20)))
    source.close()


def test_seek_beyond_the_end_and_files_that_are_not_there(tmp_path: Path) -> None:
    source = source_of(tmp_path / "x", GOOD % (0, 0) + b"\n")
    with pytest.raises(InputError, match="has 1 lines, expected at least 3"):
        source.seek({("x", 0): 3})
    with pytest.raises(InputError, match=r"path: .*absent: No such file"):
        JsonLines(JsonLines.Options(path=tmp_path / "absent"))
    with pytest.raises(InputError, match="Is a directory"):
        JsonLines(JsonLines.Options(path=tmp_path))


def test_the_default_key_and_an_empty_file(tmp_path: Path) -> None:
    source = source_of(tmp_path / "x", b'{"sensor": "a", "time": 1, "value": 2}\n', key="la")
    assert [r.key for r in drain(source)] == ["la"]
    empty = source_of(tmp_path / "y", b"")
    assert empty.ended
    assert empty.progress() == (0, 0)


@given(st.lists(st.binary(max_size=30)), st.integers(1, 40))
def test_lines_do_not_depend_on_the_chunks(chunks: list[bytes], limit: int) -> None:
    whole, cut = LineSplitter(limit), LineSplitter(limit)
    for chunk in chunks:
        cut.feed(chunk)
    cut.end()
    text = b"".join(chunks)
    whole.feed(text)
    whole.end()
    assert cut.lines == whole.lines
    expected = text.split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert list(whole.lines) == [
        Line(line[:limit] if len(line) > limit else line, len(line) > limit) for line in expected
    ]
