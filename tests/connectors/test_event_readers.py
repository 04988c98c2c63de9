from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import events as files
import numpy as np
import pytest
from events import Events, random_events
from hypothesis import given, settings
from hypothesis import strategies as st

from stepstream.connectors import events as module
from stepstream.connectors import events_binary, events_prophesee, events_text
from stepstream.connectors.base import InputError
from stepstream.connectors.event_columns import Columns, Decoder, RowDecoder, join
from stepstream.connectors.events import EventOptions, EventRecording
from stepstream.connectors.recording import find_reader, open_recording


def played(recording: EventRecording) -> Events:
    """All events of the slices, in order."""
    slices = list(recording.slices())
    assert [made.start_us for made in slices] == recording.starts_us.tolist()
    none = (np.zeros(0, np.int64), np.zeros(0, np.uint16), np.zeros(0, np.uint16), np.zeros(0, bool))
    columns = [(s.t_us, s.x, s.y, s.polarity) for s in slices] or [none]
    return tuple(np.concatenate(parts) for parts in zip(*columns, strict=True))  # type: ignore[return-value]


def assert_same(found: Events, expected: Events) -> None:
    for name, a, b in zip(("t", "x", "y", "polarity"), found, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


WIDE = random_events(3000, 1280, 720, 1, start=2**24 - 30_000)  # over an overflow of 24 bits
SMALL = random_events(600, 34, 34, 2)
MIDDLE = random_events(600, 128, 128, 3, start=2**23 - 5000)  # over an overflow of 23 bits
DAVIS = random_events(600, 346, 260, 4, start=5000)

# format -> (its file, the events in it, width, height)
FORMATS: dict[str, tuple[Callable[[Events], bytes], Events, int, int]] = {
    "prophesee-evt3": (files.evt3_file, WIDE, 1280, 720),
    "prophesee-evt2": (files.evt2_file, DAVIS, 640, 480),
    "prophesee-evt21": (files.evt21_file, WIDE, 1280, 720),
    "prophesee-dat": (files.dat_file, WIDE, 1280, 720),
    "nmnist-bin": (files.five_byte_file, SMALL, 34, 34),
    "bs2": (files.five_byte_file, MIDDLE, 128, 128),
    "aedat2": (files.aedat2_file, DAVIS, 346, 260),
    "event-stream": (partial(files.es_file, width=400, height=300), DAVIS, 400, 300),
    "events-text": (files.text_file, DAVIS, 346, 260),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_found_from_content_and_read_to_the_microsecond(name: str, tmp_path: Path) -> None:
    make, expected, width, height = FORMATS[name]
    path = tmp_path / "recording.npz"  # a name that lies
    path.write_bytes(make(expected))
    assert find_reader(path).name == name
    recording = open_recording(path)
    assert_same(played(recording), expected)
    summary = recording.summary()
    assert {k: summary[k] for k in ("modality", "format", "width", "height", "events", "on", "triggers")} == {
        "modality": "events",
        "format": name,
        "width": width if name != "events-text" else int(expected[1].max()) + 1,
        "height": height if name != "events-text" else int(expected[2].max()) + 1,
        "events": len(expected[0]),
        "on": int(expected[3].sum()),
        "triggers": 0,
    }
    assert (summary["t_first_us"], summary["t_last_us"]) == (expected[0].min(), expected[0].max())


VARIANTS = {
    "prophesee-dat": partial(files.dat_file, version=1),
    "prophesee-evt21": partial(files.evt21_file, legacy=True),
    "event-stream": partial(files.es_file, atis=True),
    "aedat2": partial(files.aedat2_file, chip="DVS128", height=128),
    "events-text": partial(files.text_file, seconds=False),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_other_form_of_a_format(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(VARIANTS[name](MIDDLE))
    recording = open_recording(path)
    assert recording.format == name
    assert_same(played(recording), MIDDLE)


def test_dsec_is_read_with_its_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepstream.connectors.events_h5._ROWS", 700)
    path = tmp_path / "x"
    expected = (WIDE[0] + 49_599_300_523, *WIDE[1:])
    files.write_dsec(path, expected, 49_599_300_523)
    recording = open_recording(path)
    assert recording.format == "dsec-h5"
    assert_same(played(recording), expected)


def decoders() -> dict[str, tuple[Callable[[], Decoder], bytes]]:
    """Every decoder of bytes, and a body for it: a valid one with some bytes broken."""
    rows: dict[str, Any] = {
        "dat": (8, partial(events_prophesee._dat_rows, False)),
        "five": (5, partial(events_binary._five_byte_rows, True)),
        "aedat2": (8, partial(events_binary._aedat2_rows, True, 260)),
    }
    found: dict[str, Callable[[], Decoder]] = {name: partial(RowDecoder, *args) for name, args in rows.items()}
    found |= {name: partial(events_prophesee.evt_decoder, name) for name in ("evt3", "evt2", "evt21")}
    found |= {str(kind): partial(events_binary._EsDecoder, kernel) for kind, kernel in events_binary._ES_KINDS.items()}
    found["text"] = partial(events_text._TextDecoder, 0)
    part = tuple(column[:300] for column in DAVIS)
    bodies = {
        "evt3": files.evt3_file(part),
        "evt2": files.evt2_file(part),
        "evt21": files.evt21_file(part),
        "text": files.text_file(part) + b"# no event\n1 2 3\n" + b"1" * 700 + b"\n0.5 1 1 -1\n 7.1\t2,3 1",
        "1": files.es_file(part)[20:],
        "2": files.es_file(part, atis=True)[20:],
    }
    return {name: (make, bodies.get(name, files.dat_file(part))) for name, make in found.items()}


DECODERS = decoders()


def decoded(decoder: Decoder, pieces: list[bytes]) -> tuple[Columns, dict[str, int], list[Any]]:
    found = join([*(decoder.feed(piece) for piece in pieces), decoder.finish()])
    return found, decoder.counts, np.concatenate([np.zeros((0, 3)), *decoder.triggers]).tolist()


def cut(body: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(at % (len(body) + 1) for at in cuts), len(body)]
    return [body[a:b] for a, b in itertools.pairwise(edges)]


@settings(max_examples=40)
@given(st.data())
@pytest.mark.parametrize("name", DECODERS)
def test_however_the_bytes_are_cut_the_events_are_the_same(name: str, data: st.DataObject) -> None:
    make, body = DECODERS[name]
    if data.draw(st.booleans()):
        noise = data.draw(st.binary(min_size=1, max_size=60))
        at = data.draw(st.integers(0, len(body)))
        body = body[:at] + noise + body[at:]
    cuts = data.draw(st.lists(st.integers(0, len(body)), max_size=30))
    whole, parts = decoded(make(), [body]), decoded(make(), cut(body, cuts))
    for a, b in zip(whole[0], parts[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert whole[1:] == parts[1:]


@settings(max_examples=60)
@given(st.binary(max_size=400))
@pytest.mark.parametrize("name", DECODERS)
def test_noise_is_decoded_without_a_crash(name: str, body: bytes) -> None:
    found, counts, _ = decoded(DECODERS[name][0](), [body[:100], body[100:]])
    assert len({len(column) for column in found}) == 1
    assert all(count >= 0 for count in counts.values())
    assert found.polarity.max(initial=0) <= 1


@pytest.fixture(scope="module")
def dsec(tmp_path_factory: Any) -> bytes:
    path = tmp_path_factory.mktemp("dsec") / "x.h5"
    files.write_dsec(path, tuple(column[:200] for column in WIDE), 0)  # type: ignore[arg-type]
    return path.read_bytes()


@settings(max_examples=60)
@given(
    st.sampled_from([*sorted(FORMATS), "dsec-h5"]),
    st.integers(0, 2**31),
    st.binary(max_size=40),
    st.sampled_from(["ends", "more", "flipped"]),
)
def test_a_damaged_file_is_read_as_far_as_is_right(
    tmp_path_factory: Any, dsec: bytes, name: str, at: int, noise: bytes, how: str
) -> None:
    if name == "dsec-h5":
        body = dsec
    else:
        make, expected, _, _ = FORMATS[name]
        body = make(tuple(column[:200] for column in expected))  # type: ignore[arg-type]
    at %= len(body)
    tail = {"ends": b"", "more": body[at:], "flipped": body[at + len(noise) :]}[how]
    if how == "flipped":
        noise = bytes(a ^ b for a, b in zip(noise, body[at:], strict=False))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(body[:at] + noise + tail)
    try:
        recording = open_recording(path, name)
        kept = played(recording)
    except InputError as error:
        if str(path) not in str(error):
            raise
        return
    assert len(kept[0]) + recording.counts["late"] == recording.events
    assert all(
        (column < side).all() for column, side in zip(kept[1:3], (recording.width, recording.height), strict=True)
    )


def raw(words: list[int], header: str = "% evt 3.0\n% geometry 640x480\n% end\n") -> bytes:
    return header.encode() + np.array(words, "<u2").tobytes()


TIME, ROW, X = 0x8001, 0x0005, 0x2807  # 4096 us, row 5, column 7 brighter


@pytest.mark.parametrize(
    ("words", "times", "count", "note"),
    [
        ([TIME, ROW, 0x4001, X], [4096], {"lone_vectors": 1}, "1 vector words without a base"),
        ([ROW, X, TIME, X], [4096], {"before_time": 1}, "1 events or triggers stand before the first time"),
        ([TIME, X, ROW, X], [4096], {"before_time": 1}, "before the first time (or row) word"),
        ([TIME, ROW, X, 0x9000, X], [4096, 4096], {"unknown_words": 1}, "1 words are of a kind that holds no events"),
        ([TIME, ROW, X, 0x2FFF], [4096], {"outside": 1}, "1 events lie outside the sensor (640x480)"),
        ([TIME, ROW, X, 0x7123, 0xE123, 0xF123, X], [4096, 4096], {}, None),
        ([0x8FFF, 0x6FFF, ROW, X, 0x8000, X], [2**24 - 1, 2**24], {}, None),
        ([0x8FFF, 0x6FFF, 0x8FFF, ROW, X, 0x8000, 0x8000, X], [2**24 - 1, 2**24], {}, None),
        ([0x8002, ROW, X, 0x8001, X, 0x8002, X], [8192, 8192], {"late": 1, "backwards": 1}, "4 ms too late"),
    ],
)
def test_strange_words_are_counted_and_explained(
    tmp_path: Path, words: list[int], times: list[int], count: dict[str, int], note: str | None
) -> None:
    path = tmp_path / "x"
    path.write_bytes(raw(words))
    recording = open_recording(path)
    assert played(recording)[0].tolist() == times
    assert {name: n for name, n in recording.counts.items() if n} == count
    assert note is None or note.replace("4 ms", "100 ms") in " ".join(recording.notes)


def test_a_restart_is_a_new_boot_and_a_long_gap_a_jump(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("0.5 1 1 1\n0.5021 1 1 1\n0.1 1 1 1\n90.0 1 1 1\n")
    recording = open_recording(path)
    slices = list(recording.slices())
    assert [(s.start_us, s.end_us, len(s.t_us), s.boot_id, s.sequence) for s in slices] == [
        (500_000, 501_000, 1, 0, 0),
        (501_000, 502_000, 0, 0, 1),
        (502_000, 503_000, 1, 0, 2),
        (100_000, 101_000, 1, 1, 3),
        (90_000_000, 90_001_000, 1, 1, 4),
    ]
    assert (recording.boots, recording.counts["gaps"]) == (2, 1)
    assert "time begins anew 1 times" in " ".join(recording.notes)


def test_triggers_are_read_and_a_cut_word_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(raw([0xA101, TIME, 0x6010, 0xA201, 0xA200]) + b"\x07")
    recording = open_recording(path)
    assert recording.triggers.tolist() == [[4112, 2, 1], [4112, 2, 0]]
    assert (recording.summary()["triggers"], recording.counts["before_time"], recording.counts["cut_bytes"]) == (
        2,
        1,
        1,
    )
    assert "there are no events" in recording.notes


def test_headers(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(raw([TIME, ROW, X], ""))
    with pytest.raises(InputError, match="of no known format"):
        open_recording(path)
    recording = open_recording(path, "prophesee-evt3")
    assert (recording.events, recording.width, recording.height) == (1, 8, 6)
    assert recording.notes[0] == "there is no header: read as evt3"
    path.write_bytes(raw([TIME, ROW, X]))
    with pytest.raises(InputError, match="x: format: the header says evt3, expected evt2"):
        open_recording(path, "prophesee-evt2")
    path.write_bytes(raw([TIME, ROW, X], "% evt 3.0\n% plugin_name hal_plugin_gen41_evk3\n"))
    assert (open_recording(path).width, open_recording(path).height) == (1280, 720)
    path.write_bytes(b"% Data file\n\x0e\x08" + bytes(8))
    with pytest.raises(InputError, match="expected events of kind 0, 1, 12 and 8 bytes, got kind 14 of 8 bytes"):
        open_recording(path)
    for body, reason in (
        (b"Event Stream\1\0\0\1" + bytes(9), "version: expected 2, got 1.0.0"),
        (b"Event Stream\2\0\0\4" + bytes(9), r"stream type: expected 1 \(DVS\) or 2 \(ATIS\), got 4"),
        (b"Event Stream\2\0\0\1\0\0\1\0", "width: expected 1 to 16384, got 0"),
        (b"Event Stream", "expected 20 bytes"),
        (b"#!AER-DAT2.0\r\n# AEChip: a.b.Cochlea\r\n", "AEChip: 'Cochlea' is not known; known: dvs128"),
    ):
        path.write_bytes(body)
        with pytest.raises(InputError, match=reason):
            open_recording(path)


def test_bad_lines_are_counted_and_a_size_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"240 180\n0.1 1 1 1\n0.2000019 2 2 -1\nx\n0.3 1 1\n0.4 1 1 2\n0.5 250 1 1\n\n# c\n0.6 3 3 0")
    with pytest.raises(InputError, match="no known format"):
        open_recording(path)
    recording = open_recording(path, "events-text")
    assert [column.tolist() for column in played(recording)] == [
        [100_000, 200_001, 600_000],
        [1, 2, 3],
        [1, 2, 3],
        [True, False, False],
    ]
    assert (recording.width, recording.height) == (240, 180)
    assert (recording.counts["bad_lines"], recording.counts["outside"]) == (3, 1)


def test_options_of_recordings(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(files.text_file(SMALL))
    recording = open_recording(path, options={"width": 100, "height": 90, "slice_us": 10_000, "name": "n"})
    assert (recording.width, recording.height, recording.name) == (100, 90, "n")
    assert set(np.diff(recording.starts_us).tolist()) == {10_000}
    with pytest.raises(InputError, match="height: give both width and height"):
        open_recording(path, options={"width": 100})
    with pytest.raises(InputError, match="slice_us: .*less than or equal to 10000, got 20000"):
        open_recording(path, options={"slice_us": 20_000})


@pytest.mark.parametrize("name", ["prophesee-evt3", "event-stream", "events-text"])
def test_any_slice_can_be_gone_to(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 61)
    monkeypatch.setattr(module, "MAX_PLACES", 4)
    path = tmp_path / "x"
    path.write_bytes(FORMATS[name][0](FORMATS[name][1]))
    recording = find_reader(path).read(path, EventOptions())  # type: ignore[call-arg]
    whole = list(recording.slices())
    assert_same(played(recording), FORMATS[name][1])
    one, other = recording.slices(1), recording.slices(len(whole) // 2)
    for first, second in zip(whole[1:], whole[len(whole) // 2 :], strict=False):  # two at once on one file
        for expected, found in ((first, next(one)), (second, next(other))):
            assert (found.sequence, found.t_us.tolist()) == (expected.sequence, expected.t_us.tolist())
    assert len(list(recording.slices(len(whole) - 1))) == 1
