from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import same
from support import DATA

from stepstream.connectors.base import InputError
from stepstream.connectors.bulk import make_interactions
from stepstream.connectors.records import EventSlice, Interaction, Origin, Reading, Record, Sweep
from stepstream.connectors.replay import Replay

HERE = ("chat", 0)
SECOND = 10**9
TIMES = [10, 12, 11, 11, 30, 12]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("replay") / "chat.npz"
    np.savez(path, src=[1, 2, 3, 1, 2, 3], dst=[2, 2, 1, 2, 3, 1], ts=TIMES, w=np.arange(6.0), event_id=list("abcdef"))
    return path


def everything(source: Replay, size: int = 4) -> list[Record]:
    records: list[Record] = []
    while not source.ended:
        records += source.poll(size, 0)
    return records


def replay(path: Path, **options: Any) -> Replay:
    return Replay(Replay.Options(path=path, **options))


def test_the_order_is_that_of_the_file(chat: Path) -> None:
    source = replay(chat)
    records = everything(source)
    assert [r.time_ns for r in records] == [t * SECOND for t in TIMES]
    assert [r.origin for r in records] == [Origin("chat", 0, i) for i in range(6)]
    assert [(r.value.source, r.value.destination, r.value.event_id) for r in records[:2]] == [(1, 2, "a"), (2, 2, "b")]
    assert [r.value.features.tolist() for r in records] == [[float(i)] for i in range(6)]
    assert {(r.key, type(r.value), type(r.value.source)) for r in records} == {("chat", Interaction, int)}
    assert source.progress() == (6, 6)
    assert Replay.emits(source.options) == (Interaction,)


def test_order_time_sorts_and_keeps_ties_as_they_came(chat: Path) -> None:
    records = everything(replay(chat, order="time", key="g"))
    assert [r.value.event_id for r in records] == list("acdbfe")
    assert [r.origin.offset for r in records] == list(range(6))
    assert {r.key for r in records} == {"g"}


def test_bounds_select_by_time(chat: Path) -> None:
    records = everything(replay(chat, start="1970-01-01T00:00:11Z", end="1970-01-01T00:00:30Z"))
    assert [r.value.event_id for r in records] == list("bcdf")
    with pytest.raises(InputError, match="chat has nothing in 1971-01-01 to ..; it has 1970-01-01T00:00:10Z"):
        replay(chat, start="1971-01-01")


@given(st.sampled_from(["file", "time"]), st.integers(0, 6), st.integers(1, 7))
def test_seek_gives_the_same_records_again(chat: Path, order: Any, offset: int, size: int) -> None:
    whole = everything(replay(chat, order=order), 100)
    source = replay(chat, order=order)
    source.seek({HERE: offset})
    again = everything(source, size)
    assert len(again) == 6 - offset
    assert all(same(a, b) for a, b in zip(again, whole[offset:], strict=True))


def test_pace_follows_event_time_and_what_is_behind_is_due_at_once(chat: Path) -> None:
    source = replay(chat, speed=10)
    begun = time.monotonic()
    assert [r.value.event_id for r in source.poll(9, 0)] == ["a"]
    found: list[Record] = []
    while len(found) < 3:
        found += source.poll(9, 1)
    assert [r.value.event_id for r in found] == list("bcd")  # c and d are earlier than b
    assert time.monotonic() - begun >= 0.2
    assert source.poll(9, 0) == []
    source = replay(chat, speed=0.001)
    source.pace_from({HERE: 3})
    assert len(source.poll(9, 0)) == 4  # the first paced one is due at once
    assert source.poll(9, 0.01) == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"emit": "frames"}, "emit: .*chat.npz is a graph recording: expected interactions, got frames"),
        ({"sensors": ["a"]}, "sensors: is for traffic recordings, and .*chat.npz is a graph recording"),
        ({"step_s": 5}, "step_s: is for traffic recordings"),
    ],
)
def test_options_of_another_modality_are_refused(chat: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        replay(chat, **options)


def test_options_of_graphs_are_refused_for_traffic() -> None:
    with pytest.raises(InputError, match="order: is for graph recordings, and metr-la-week is a traffic recording"):
        Replay(Replay.Options(order="time"))


def test_what_is_not_there_may_emit_either(tmp_path: Path) -> None:
    assert Replay.emits(Replay.Options(path=tmp_path / "none")) == (Reading, Interaction, Sweep, EventSlice)


@given(
    st.lists(st.tuples(st.integers(0, 2**62), st.integers() | st.text(), st.text(), st.text(min_size=1))),
    st.booleans(),
)
def test_bulk_made_interactions_are_those_of_the_constructors(rows: list[Any], named: bool) -> None:
    times, sources, destinations, events = ([row[i] for row in rows] for i in range(4))
    made = make_interactions("t", 5, "k", times, sources, destinations, None, events if named else None)
    assert made == [
        Record("k", t, Interaction(u, v, None, e if named else None), Origin("t", 0, 5 + i))
        for i, (t, u, v, e) in enumerate(rows)
    ]


def test_bitcoin_alpha_is_played_as_it_is_or_sorted() -> None:
    path = DATA / "dyngraph" / "bitcoin_alpha_unsorted.npz"
    if not path.exists():
        pytest.skip("bitcoin_alpha_unsorted.npz is not in ../shared/data/dyngraph")
    ts = np.load(path, allow_pickle=False)["ts"].astype(np.int64) * SECOND
    assert [r.time_ns for r in everything(replay(path), 1000)] == ts.tolist()
    assert [r.time_ns for r in everything(replay(path, order="time"), 1000)] == sorted(ts.tolist())
