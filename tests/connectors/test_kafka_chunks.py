from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("kafka", reason="kafka-python is not installed")

from stepstream.connectors.base import InputError
from stepstream.connectors.kafka_chunks import SPAN, Assembler, split
from stepstream.connectors.kafka_messages import Message, headers_of

MAX = 10_000


@dataclass(frozen=True)
class Entry:
    """A message in a partition. `whole`: the value of the record whose last message it is; None: of none."""

    offset: int
    value: bytes | None
    headers: dict[str, str]
    whole: bytes | None = None
    first: int = 0


def message(value: bytes, **headers: str) -> Message:
    return Message("t", b"k", value, [(name, text.encode()) for name, text in headers.items()], None)


def read(entries: Iterable[Entry], begin: int = 0, max_bytes: int = MAX) -> list[tuple[int, bytes | str | None]]:
    """(offset, value or why there is none) of each record from `begin` on, as a reader of the log gets it."""
    assembler = Assembler(max_bytes)
    found: list[tuple[int, bytes | str | None]] = []
    for entry in entries:
        if entry.offset < begin - SPAN:
            continue
        try:
            value, whole = assembler.value(entry.offset, entry.value, entry.headers)
        except InputError as error:
            if entry.offset >= begin:
                found.append((entry.offset, str(error)))
            continue
        if whole and entry.offset >= begin:
            found.append((entry.offset, value))
    return found


def laid(messages: Sequence[Message], holes: Iterable[int] = ()) -> list[Entry]:
    """Messages one after another, `holes` offsets left out before each."""
    entries, offset, gaps = [], 0, iter(holes)
    for each in messages:
        offset += next(gaps, 0)
        entries.append(Entry(offset, each.value, headers_of(each.headers)))
        offset += 1
    return entries


@st.composite
def logs(draw: st.DrawFn) -> list[Entry]:
    """A partition that several producers wrote to at a time: each one's messages in order, holes between them."""
    queues: list[list[tuple[Message, bytes | None]]] = []
    for _ in range(draw(st.integers(1, 4))):
        queue: list[tuple[Message, bytes | None]] = []
        for _ in range(draw(st.integers(1, 4))):
            value = draw(st.binary(max_size=40))
            parts = split(message(value, a="b"), draw(st.integers(1, 12)))
            queue += [(part, value if part is parts[-1] else None) for part in parts]
        queues.append(queue)
    hole = st.sampled_from([0, 0, 0, 0, 1, 2, 30, SPAN - 3, SPAN - 2, SPAN - 1, SPAN, SPAN + 1])
    entries: list[Entry] = []
    started: dict[int, int] = {}
    offset = draw(st.integers(0, 3))
    while queues:
        number = draw(st.integers(0, len(queues) - 1))
        part, whole = queues[number].pop(0)
        began = started.setdefault(id(queues[number]), offset)
        entries.append(Entry(offset, part.value, headers_of(part.headers), whole, began))
        if whole is not None:
            del started[id(queues[number])]
        if not queues[number]:
            queues.pop(number)
        offset += 1 + draw(hole)
    return entries


@given(logs())
def test_records_within_the_span_come_out_whole_in_order_and_once(entries: list[Entry]) -> None:
    ends = [entry for entry in entries if entry.whole is not None]
    found = read(entries)
    assert [offset for offset, _ in found] == [entry.offset for entry in ends]
    for entry, (_, value) in zip(ends, found, strict=True):
        if entry.offset - entry.first <= SPAN:
            assert value == entry.whole
        else:
            assert isinstance(value, str)
            assert value.startswith("chunk: the last of ")
        assert entry.headers["a"] == "b"


NAMES = st.sampled_from(["x", "y"])
JUNK = st.one_of(
    st.builds("{}/{}/{}/{}".format, NAMES, st.integers(0, 3), st.integers(1, 3), st.integers(0, 6)),
    st.sampled_from(["", "x", "x/0/1", "x/a/1/1", "x/-1/1/1", f"x/0/{SPAN + 1}/1", "x/1/2/99999"]),
)


@st.composite
def junk(draw: st.DrawFn) -> list[Entry]:
    """Messages with whatever chunk headers: repeated, shuffled, cut off, lying."""
    described = draw(st.lists(JUNK | st.none(), max_size=30))
    entries, offset = [], 0
    for text in described:
        offset += 1 + draw(st.sampled_from([0, 0, 0, 1, 90, SPAN - 1, SPAN]))
        value = draw(st.none() | st.binary(max_size=3))
        entries.append(Entry(offset, value, {} if text is None else {"chunk": text}))
    return entries


@given(logs() | junk(), st.data())
def test_reading_on_from_anywhere_gives_the_rest_of_reading_it_all(entries: list[Entry], data: st.DataObject) -> None:
    everything = read(entries)
    end = entries[-1].offset + 1 if entries else 1
    begin = data.draw(st.integers(0, end) | st.sampled_from([entry.offset for entry in entries] or [0]))
    assert read(entries, begin) == [item for item in everything if item[0] >= begin]


@example([Entry(1, b"a", {"chunk": "x/0/2/2"}), Entry(1 + SPAN, b"b", {"chunk": "x/1/2/2"})])
@example([Entry(1, b"a", {"chunk": "x/0/2/2"}), Entry(2 + SPAN, b"b", {"chunk": "x/1/2/2"})])
@given(junk())
def test_whatever_comes_out_of_lying_headers_was_put_in(entries: list[Entry]) -> None:
    for offset, value in read(entries, max_bytes=4):
        at = next(index for index, entry in enumerate(entries) if entry.offset == offset)
        described = entries[at].headers.get("chunk")
        if described is None:
            assert value == entries[at].value
            continue
        if isinstance(value, str):
            assert value.startswith("chunk: ")
            continue
        name, _, count, size = described.split("/")
        assert value is not None
        assert len(value) == int(size) <= 4
        # The newest beginning of that name, and all that came of that name since: nothing was left out or added.
        since = [entry for entry in entries[: at + 1] if entry.headers.get("chunk", "").startswith(f"{name}/")]
        chunks = [entry for entry in since if not isinstance(described_or_none(entry), str)][-int(count) :]
        assert [entry.headers["chunk"] for entry in chunks] == [f"{name}/{i}/{count}/{size}" for i in range(int(count))]
        assert value == b"".join(entry.value or b"" for entry in chunks)
        assert offset - chunks[0].offset <= SPAN


def described_or_none(entry: Entry) -> str | None:
    """Why a chunk is passed over, whatever came before it; None: it is not."""
    try:
        Assembler(4).value(entry.offset, entry.value, {"chunk": entry.headers["chunk"]})
    except InputError as error:
        return str(error) if "expected ID" in str(error) or "at most" in str(error) else None
    return "too large" if int(entry.headers["chunk"].split("/")[-1]) > 4 else None


def changed(entry: Entry, **fields: object) -> Entry:
    """An entry with another name, index, count or size in its chunk header."""
    names = ("name", "index", "count", "size")
    was = dict(zip(names, entry.headers["chunk"].split("/"), strict=True))
    return dataclasses.replace(entry, headers={"chunk": "/".join(str((was | fields)[name]) for name in names)})


WHOLE = b"0123456789"
CHUNKS = laid(split(message(WHOLE), 3))


def test_four_chunks_are_a_record() -> None:
    assert read(CHUNKS) == [(3, WHOLE)]
    assert [entry.value for entry in CHUNKS] == [b"012", b"345", b"678", b"9"]
    assert "chunk" not in headers_of(split(message(WHOLE), 10)[0].headers)


def at(order: Sequence[int]) -> list[Entry]:
    return [dataclasses.replace(CHUNKS[index], offset=offset) for offset, index in enumerate(order)]


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param(at([1, 2, 3]), id="first-missing"),
        pytest.param(at([0, 2, 3]), id="middle-missing"),
        pytest.param(at([3]), id="only-last"),
        pytest.param(at([0, 2, 1, 3]), id="shuffled"),
        pytest.param(at([0, 1, 1, 2, 3]), id="repeated"),
        pytest.param([*CHUNKS[:3], changed(CHUNKS[3], name="other")], id="another-name"),
        pytest.param([*CHUNKS[:3], changed(CHUNKS[3], count=5, index=4)], id="another-count"),
        pytest.param([*CHUNKS[:3], changed(CHUNKS[3], size=11)], id="last-says-more"),
        pytest.param([changed(entry, size=11) for entry in CHUNKS], id="less-than-all-say"),
        pytest.param([changed(entry, size=9) for entry in CHUNKS], id="more-than-all-say"),
        pytest.param([changed(entry, size=0) for entry in CHUNKS], id="size-zero"),
        pytest.param([CHUNKS[0], *(dataclasses.replace(e, value=None) for e in CHUNKS[1:])], id="tombstones"),
        pytest.param([dataclasses.replace(e, offset=e.offset * SPAN) for e in CHUNKS], id="too-far-apart"),
    ],
)
def test_what_is_not_whole_is_refused_at_its_last_chunk_and_only_there(entries: list[Entry]) -> None:
    small = Entry(entries[-1].offset + 1, b"small", {})
    [(offset, reason), after] = read([*entries, small])
    assert offset == entries[-1].offset
    assert isinstance(reason, str)
    assert reason.startswith("chunk: the last of ")
    assert f"within the {SPAN} offsets before it" in reason
    assert after == (small.offset, b"small")


def test_a_record_that_begins_again_is_taken_from_there() -> None:
    assert read(at([0, 1, 0, 1, 2, 3])) == [(5, WHOLE)]
    assert read(at([0, 1, 2, 3, 0, 1, 2, 3])) == [(3, WHOLE), (7, WHOLE)]


@pytest.mark.parametrize(
    "text",
    ["", "x", "x/0/1", "x/0/1/2/3", "/0/1/2", "x/a/1/2", "x/1/1/2", "x/-1/1/2", "x/0/0/2", "x/0/1/-2", "x/0/1/",
     f"x/0/{SPAN + 1}/2", "x/0/1/" + "9" * 16, "x/0/1/" + "9" * 5000, f"{'x' * 65}/0/1/2"],
)  # fmt: skip
def test_a_header_that_is_none_is_refused_at_once(text: str) -> None:
    [(_, reason)] = read([Entry(0, b"ab", {"chunk": text})])
    assert isinstance(reason, str)
    assert reason.startswith("chunk: expected ID/INDEX/COUNT/BYTES, got ")
    assert len(reason) < 200


def test_too_large_a_record_is_refused_at_its_last_chunk_and_none_of_it_is_kept() -> None:
    chunks = laid(split(message(bytes(2**20)), 2**14))
    assembler = Assembler(2**20 - 1)
    tracemalloc.start()
    for entry in chunks[:-1]:
        # Bytes that only the assembler could keep alive.
        assert assembler.value(entry.offset, bytes(bytearray(entry.value or b"")), entry.headers) == (None, False)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2**14
    with pytest.raises(InputError, match=f"chunk: a record of {2**20} bytes, at most {2**20 - 1} are taken"):
        assembler.value(chunks[-1].offset, chunks[-1].value, chunks[-1].headers)
    assert read(chunks, max_bytes=2**20) == [(len(chunks) - 1, bytes(2**20))]


def test_what_never_ends_is_let_go() -> None:
    assembler, size = Assembler(2**30), 2**14
    tracemalloc.start()
    for offset in range(6 * SPAN):
        header = {"chunk": f"n{offset}/0/2/{2**20}"}
        assert assembler.value(offset, bytes(bytearray(size)), header) == (None, False)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert SPAN * size <= held < 1.2 * (SPAN + 1) * size


@pytest.mark.parametrize("described", ["x/{}/200/20000", "x/{}/100/1638400"])
def test_what_is_more_than_it_says_or_was_given_is_not_kept(described: str) -> None:
    assembler = Assembler(2**30)
    tracemalloc.start()
    for offset in range(100):
        header = {"chunk": described.format(offset)}
        value, whole = assembler.value(offset, bytes(bytearray(2**14)), header)
        assert whole is (offset == 99 and "/100/" in described)
        assert len(value or b"") == (100 * 2**14 if whole else 0)
    del value
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 2**15


def test_what_says_more_than_it_is_takes_no_more_than_it_is() -> None:
    tracemalloc.start()
    Assembler(2**30).value(0, b"ab", {"chunk": f"x/0/2/{2**30}"})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**16


def test_the_records_headers_key_and_time_stand_on_the_last_chunk() -> None:
    whole = Message("t", b"k", WHOLE, [("content-type", b"x"), ("origin", b"t/0/1")], 77)
    parts = split(whole, 4)
    assert [headers_of(part.headers).keys() for part in parts] == [
        {"chunk"},
        {"chunk"},
        {"chunk", "content-type", "origin"},
    ]
    assert {(part.topic, part.key, part.timestamp_ms) for part in parts} == {("t", b"k", 77)}
    assert split(whole, len(WHOLE)) == [whole]


def test_more_chunks_than_a_span_holds_are_refused_before_anything_is_cut() -> None:
    most = SPAN // 2
    assert len(split(message(bytes(most * 3)), 3)) == most
    with pytest.raises(InputError, match=f"a record of {most * 3 + 1} bytes needs {most + 1} chunks of 3, and {most}"):
        split(message(bytes(most * 3 + 1)), 3)
