"""Small real sources, operators and sinks for the tests of the runtime, and a run of them that can be killed."""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from stepstream.connectors.base import DeadLetter, InputError, Partition, Sink, Source, Undecodable
from stepstream.connectors.records import Origin, Reading, Record
from stepstream.operators import base
from stepstream.operators.base import END_INDEX, Context, Operator, State
from stepstream.pipeline.engines.base import RunResult
from stepstream.pipeline.engines.local import LocalEngine
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.task import Outcome, Task


@dataclass(frozen=True, slots=True)
class Total:
    """The sum of some readings."""

    value: float
    count: int


@dataclass(frozen=True, slots=True)
class Guess:
    """What the next total may be."""

    value: float
    by: str


@dataclass(frozen=True, slots=True)
class Miss:
    """How far the last guess was off."""

    value: float
    by: str


class Window(Operator):
    """Sums every `size` readings of a key; negative ones are dead letters, and zeros are counted."""

    class Options(base.Options):
        size: int = 3

    consumes: ClassVar[tuple[type, ...]] = (Reading,)
    emits: ClassVar[tuple[type, ...]] = (Total,)

    def __init__(self, options: Window.Options) -> None:
        self.options = options
        self.held: dict[str, list[float]] = {}

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        out = []
        for record in records:
            value = record.value.value
            if value < 0:
                context.dead_letter(record, f"expected 0 or more, not {value}")
                continue
            if value == 0:
                context.count("zero")
            held = self.held.setdefault(record.key, [])
            held.append(value)
            if len(held) == self.options.size:
                # Two outputs of one cause: the whole and its first half.
                out.append(record.derive(0, Total(sum(held), len(held))))
                out.append(record.derive(1, Total(sum(held[:1]), 1)))
                held.clear()
        return out

    def on_end(self, last: Record, context: Context) -> list[Record]:
        held = self.held.get(last.key, [])
        if not held:
            return []
        context.count("rest")
        return [last.derive(END_INDEX, Total(sum(held), len(held)))]

    def keys(self) -> Iterable[str]:
        return self.held

    def snapshot(self, key: str) -> State:
        return {"held": np.array(self.held[key])}

    def restore(self, key: str, state: State) -> None:
        self.held[key] = state["held"].tolist()

    def drop(self, key: str) -> None:
        self.held.pop(key, None)


class Guesser(Operator):
    """A running sum that depends on the order of totals; a total that is a multiple of 7 is a dead letter."""

    class Options(base.Options):
        by: str = "a"
        decay: float = 0.9

    consumes: ClassVar[tuple[type, ...]] = (Total,)
    emits: ClassVar[tuple[type, ...]] = (Guess,)

    def __init__(self, options: Guesser.Options) -> None:
        self.options = options
        self.state: dict[str, np.ndarray[Any, np.dtype[np.float64]]] = {}

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        out = []
        for record in records:
            if record.value.value % 7 == 1:
                context.dead_letter(record, "a total of this kind")
                continue
            state = self.state.setdefault(record.key, np.zeros(4))
            state *= self.options.decay
            state[int(record.value.value) % 4] += record.value.value
            out.append(record.derive(0, Guess(float(state.sum()), self.options.by)))
        return out

    def keys(self) -> Iterable[str]:
        return self.state

    def snapshot(self, key: str) -> State:
        return {"state": self.state[key].copy()}

    def restore(self, key: str, state: State) -> None:
        self.state[key] = state["state"]

    def drop(self, key: str) -> None:
        self.state.pop(key, None)


class Compare(Operator):
    """Scores the last guess of each kind when a total comes, and passes guesses on with a mark."""

    consumes: ClassVar[tuple[type, ...]] = (Total, Guess)
    emits: ClassVar[tuple[type, ...]] = (Guess, Miss)

    def __init__(self, options: base.Options) -> None:
        self.options = options
        self.last: dict[str, dict[str, float]] = {}

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        out = []
        for record in records:
            last = self.last.setdefault(record.key, {})
            if isinstance(record.value, Guess):
                last[record.value.by] = record.value.value
                out.append(record.derive(0, Guess(record.value.value, record.value.by + "!")))
                continue
            for index, (by, guess) in enumerate(sorted(last.items())):
                out.append(record.derive(index, Miss(guess - record.value.value, by)))
        return out

    def keys(self) -> Iterable[str]:
        return self.last

    def snapshot(self, key: str) -> State:
        return {"last": dict(self.last[key])}

    def restore(self, key: str, state: State) -> None:
        self.last[key] = state["last"]

    def drop(self, key: str) -> None:
        self.last.pop(key, None)


def chain() -> list[tuple[str, Operator]]:
    """Window -> two guessers -> Compare."""
    return [
        ("window", Window(Window.Options())),
        ("a", Guesser(Guesser.Options())),
        ("b", Guesser(Guesser.Options(by="b", decay=0.5))),
        ("compare", Compare(base.Options())),
    ]


def readings(count: int, seed: int, topic: str = "in", partition: int = 0, keys: str = "xyz") -> list[Record]:
    """Readings with some negative, some undecodable."""
    rng = random.Random(seed)
    out = []
    for offset in range(count):
        value: Any = Reading("s", float(rng.randint(-1, 9)))
        if rng.random() < 0.03:
            value = Undecodable(b"\xff", "not UTF-8")
        out.append(Record(rng.choice(keys), offset * 1_000, value, Origin(topic, partition, offset)))
    return out


class ListSource(Source):
    """Records of one or more partitions. `seed`: polls are short at random, some empty, and partitions interleave.

    `held`: the last record of each partition never comes, so that whoever wants to kill the run cannot come too late.
    """

    def __init__(
        self,
        logs: Mapping[Partition, list[Record]],
        seed: int | None = None,
        delay_s: float = 0,
        held: bool = False,
    ) -> None:
        self.logs = dict(logs)
        self.held = held
        self.at = dict.fromkeys(self.logs, 0)
        self.rng = None if seed is None else random.Random(seed)
        self.delay_s = delay_s
        self.closed = False

    def partitions(self) -> Sequence[Partition]:
        return list(self.logs)

    def seek(self, offsets: Mapping[Partition, int]) -> None:
        for partition, offset in offsets.items():
            if offset > len(self.logs[partition]):
                raise InputError(f"offset {offset} of {partition}: there are {len(self.logs[partition])} records")
            self.at[partition] = offset

    def poll(self, max_records: int, timeout_s: float) -> list[Record]:
        time.sleep(self.delay_s)
        most = max_records if self.rng is None else self.rng.randint(0, max_records)
        out: list[Record] = []
        while len(out) < most and (open_ := [p for p, log in self.logs.items() if self.at[p] < len(log) - self.held]):
            partition = open_[0] if self.rng is None else self.rng.choice(open_)
            out.append(self.logs[partition][self.at[partition]])
            self.at[partition] += 1
        return out

    @property
    def ended(self) -> bool:
        return all(self.at[partition] == len(log) for partition, log in self.logs.items())

    def progress(self) -> tuple[int, int | None]:
        return sum(self.at.values()), sum(map(len, self.logs.values()))

    def close(self) -> None:
        self.closed = True


def line(record: Record) -> str:
    """One record as a line of JSON."""
    origin = record.origin
    value = repr(record.value)
    return json.dumps([record.key, record.time_ns, origin.topic, origin.partition, origin.offset, record.path, value])


class FolderSink(Sink):
    """out.jsonl and dead.jsonl, appended to, and a file for each commit that had outputs; `finish` writes DONE."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sizes = {"out": 0, "dead": 0, "parts": 0}
        self.part: list[str] = []

    def open(self, position: dict[str, Any] | None) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sizes = dict(position or {"out": 0, "dead": 0, "parts": 0})
        for name in ("out", "dead"):
            with (self.folder / f"{name}.jsonl").open("ab") as file:
                if file.tell() < self.sizes[name]:
                    raise InputError(f"{name}.jsonl was made shorter than the {self.sizes[name]} bytes committed")
                file.truncate(self.sizes[name])
        for path in self.folder.glob("part-*"):
            if int(path.name.removeprefix("part-")) >= self.sizes["parts"]:
                path.unlink()

    def write(self, records: Sequence[Record], dead: Sequence[DeadLetter]) -> None:
        lines = [line(record) for record in records]
        self.part += lines
        self._append("out", lines)
        self._append("dead", [f"{letter.operator}: {letter.reason}: {line(letter.record)}" for letter in dead])

    def _append(self, name: str, lines: list[str]) -> None:
        data = "".join(f"{text}\n" for text in lines).encode()
        with (self.folder / f"{name}.jsonl").open("ab") as file:
            file.write(data)
        self.sizes[name] += len(data)

    def prepare(self) -> dict[str, Any]:
        if self.part:
            (self.folder / f"part-{self.sizes['parts']}").write_text("\n".join(self.part))
            self.sizes["parts"] += 1
            self.part = []
        return dict(self.sizes)

    def finish(self) -> None:
        (self.folder / "DONE").write_text("\n".join(sorted(self.files(self.folder))))

    @staticmethod
    def files(folder: Path) -> dict[str, bytes]:
        """All that a user sees: names and bytes."""
        return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and p.name != "DONE"}


def run(
    folder: Path,
    source: Source,
    stop: threading.Event | None = None,
    operators: list[tuple[str, Operator]] | None = None,
    on_progress: Any = None,
    **options: Any,
) -> RunResult:
    """One run of the chain into a folder, with its state below it."""
    settings = {"max_batch": 32, "commit_every": 100, "snapshot_every_s": 0, "max_wait_ms": 0} | options
    task = Task(chain() if operators is None else operators, Metrics("test"))
    engine = LocalEngine(LocalEngine.Options(**settings))
    return engine.run(task, source, FolderSink(folder), folder / ".stepstream", stop, on_progress)


def whole(task: Task, records: Sequence[Record], cuts: Sequence[int] = (), end: bool = True) -> Outcome:
    """What a task makes of records that come in several calls."""
    outputs: list[Record] = []
    dead: list[DeadLetter] = []
    edges = [0, *sorted(cuts), len(records)]
    steps = [task.process(records[a:b]) for a, b in pairwise(edges)]
    for outcome in [*steps, task.end()] if end else steps:
        outputs += outcome.outputs
        dead += outcome.dead
    return Outcome(outputs, dead)


def main(folder: str, count: str, delay_s: str) -> None:
    """A slow run in a process of its own, which lasts until a signal ends it."""
    from stepstream.pipeline.signals import stop_on_signals

    source = ListSource({("in", 0): readings(int(count), 5)}, seed=os.getpid(), delay_s=float(delay_s), held=True)
    with stop_on_signals() as stop:
        print("ready", flush=True)
        result = run(Path(folder), source, stop)
    print(json.dumps({"ended": result.ended, "totals": result.totals}), flush=True)


if __name__ == "__main__":
    # By its name, so that the operators are the same classes here and in a test.
    import streams

    streams.main(*sys.argv[1:])
