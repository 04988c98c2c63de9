"""The task: a chain of operators with its state, from records in to records out. The heart of every engine.

The stream. Operator s is given the records whose payload type is in its `consumes`; all others pass it by. A consumed
record goes on behind the operator exactly if a later one consumes its type, and the operator does not emit that type
itself: one that turns frames into frames stands for what it was given. What is left behind the last operator is
output. An input record whose type no operator consumes is a dead letter; without any operator, input is output.

Order. Behind every operator the stream stands in the order (arrival of the origin, path): frame(t), the forecast(t) it
caused, frame(t+1). So outputs and dead letters are the same however the input was cut into calls.

Paths. Several operators may derive from one cause, each counting from 0, so the task rewrites the last element: index i
of operator s in a chain of S becomes i * S + s. This is unique, keeps the order of i within an operator and between
operators (equal i: the earlier operator first), stays a small number, and as it grows with i first, everything derived
from `END_INDEX` on sorts behind everything that the same cause had caused before, by whichever operator.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from operator import attrgetter
from time import perf_counter
from typing import Any, NoReturn, TypeAlias

from pydantic import BaseModel

from stepstream.connectors.base import DeadLetter, Partition, Undecodable
from stepstream.connectors.records import Origin, Record, Score
from stepstream.operators.base import END_INDEX, Operator, State
from stepstream.pipeline.metrics import Metrics
from stepstream.pipeline.order import Order
from stepstream.pipeline.tracing import NoTracing, Tracing

__all__ = ["OperatorError", "Outcome", "Task"]

_Place: TypeAlias = tuple[int, tuple[int, ...]]
# (place in the stream, stage or -1 for the task itself, the record, why).
_Dead: TypeAlias = tuple[int, int, Record, str]

_VALUE = attrgetter("value")
_KEY = attrgetter("key")
_ORIGIN = attrgetter("origin")
_PATH = attrgetter("path")
_TOPIC = attrgetter("topic")
_PARTITION = attrgetter("partition")


class OperatorError(RuntimeError):
    """An operator failed or broke its contract: names it and the input record. Nothing after it was committed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a batch of records led to, in order."""

    outputs: list[Record]
    dead: list[DeadLetter]


def _where(origin: Origin) -> str:
    return f"{origin.topic}/{origin.partition}@{origin.offset}"


class _StageContext:
    """What one operator may ask of the runtime; what it reports is held until its call has ended well."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self.counts: dict[str, int] = {}
        self.dead: list[tuple[Record, str, Record]] = []

    @property
    def replaying(self) -> bool:
        return self._task.replaying

    def count(self, what: str, amount: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + amount

    def dead_letter(self, record: Record, reason: str, cause: Record | None = None) -> None:
        """`cause`: the record that is being processed, if it is not `record`: where in the order the letter belongs.

        Without it a record held since an earlier call is placed behind this call's, which depends on how the input
        is cut into calls.
        """
        self.dead.append((record, reason, record if cause is None else cause))


class _Stage:
    """One operator at its place in the chain."""

    def __init__(self, task: Task, index: int, name: str, operator: Operator) -> None:
        self.index = index
        self.name = name
        self.operator = operator
        self.context = _StageContext(task)
        self.consumes = tuple(operator.consumes)
        self.emits = tuple(operator.emits)

    def takes(self, kind: type) -> bool:
        return issubclass(kind, self.consumes)


class Task:
    """A chain of named operators with their keyed state.

    `process` and `end` are deterministic: outputs and dead letters depend on the records and their order, not on how
    they are cut into calls. After an OperatorError the task refuses to go on: its state may be half changed.
    Raises ValueError for operators without a name or with the name of another.
    """

    def __init__(self, operators: Sequence[tuple[str, Operator]], metrics: Metrics) -> None:
        self.replaying = False
        """Set while the log before the committed offset is replayed: outputs are thrown away and nothing is counted."""
        self.metrics = metrics
        self.tracing: Tracing = NoTracing()
        self.operators = tuple(operators)
        names = [name for name, _ in operators]
        for name in names:
            if not name or name == "source" or names.count(name) > 1:
                raise ValueError(f"operator name {name!r} is empty, reserved or taken twice; the names are {names}")
        self._stages = [_Stage(self, index, name, operator) for index, (name, operator) in enumerate(operators)]
        # By payload type: for each stage, whether it takes it, and whether it lets it pass to a later one that does.
        self._routes: dict[type, tuple[tuple[bool, bool], ...]] = {}
        # Without payload: an end of input right after a restore must show operators what it would have shown before.
        self._last: dict[str, Record] = {}
        self._seen: dict[Partition, set[str]] = {}
        self._failure: str | None = None

    # ---- the stream

    def process(self, records: Sequence[Record]) -> Outcome:
        """Takes the next records of the input log; offsets rise within a partition. Raises OperatorError."""
        self._refuse_if_failed()
        if not records:
            return Outcome([], [])
        started = perf_counter()
        if not self.replaying:
            self.tracing.begin(records)
        count = len(records)
        stream, refused = self._admit(records)
        dead: list[_Dead] = []
        if stream or refused:
            single = self._note(stream) if stream else None
            order = Order(records, single if not refused else None)
            for record, reason in refused:
                dead.append((order[record.origin], -1, record, reason))
            stream = self._flow(stream, 0, order, dead)
        outcome = self._outcome(stream, dead)
        if not self.replaying:
            self.metrics.records_in(count)
            self.metrics.observe_batch(count)
            self.metrics.observe_process(perf_counter() - started)
        return outcome

    def end(self) -> Outcome:
        """The input has ended for good: what the operators still hold back, each one's flushed through those behind it.

        Keys end in the order of their last input records (topic, partition, offset). Raises OperatorError.
        """
        self._refuse_if_failed()
        if not self._last:
            return Outcome([], [])

        def coordinates(record: Record) -> tuple[str, int, int]:
            return record.origin.topic, record.origin.partition, record.origin.offset

        lasts = [
            Record(record.key, record.time_ns, None, record.origin)
            for record in sorted(self._last.values(), key=coordinates)
        ]
        order = Order(lasts, None)
        places = {last.key: place for place, last in enumerate(lasts)}
        dead: list[_Dead] = []
        collected: list[Record] = []
        for stage in self._stages:
            flushed: list[Record] = []
            for last in lasts:
                flushed += self._guarded(stage, [last], partial(stage.operator.on_end, last, stage.context))
            self._settle(stage, lambda record: places.get(record.key, len(places)), dead)
            adopted = self._adopt(stage, flushed, lasts, order, END_INDEX)
            collected += self._flow(adopted, stage.index + 1, order, dead)
        return self._outcome(order.sort(collected), dead)

    def _admit(self, records: Sequence[Record]) -> tuple[list[Record], list[tuple[Record, str]]]:
        """(what the operators can use, the rest with the reason)."""
        kinds = set(map(type, map(_VALUE, records)))
        bad = {kind for kind in kinds if kind is Undecodable or (self._stages and not self._consumed(kind))}
        if not bad:
            return list(records), []
        good: list[Record] = []
        refused: list[tuple[Record, str]] = []
        for record in records:
            kind = type(record.value)
            if kind not in bad:
                good.append(record)
            elif isinstance(record.value, Undecodable):
                refused.append((record, record.value.reason))
            else:
                refused.append((record, f"no operator consumes {kind.__name__}: {self._appetite()}"))
        return good, refused

    def _appetite(self) -> str:
        return "; ".join(
            f"{stage.name} consumes {', '.join(kind.__name__ for kind in stage.consumes) or 'nothing'}"
            for stage in self._stages
        )

    def _note(self, records: list[Record]) -> Partition | None:
        """Remembers the last record of each key and where keys were seen; the partition, if it is one."""
        latest = dict(zip(map(_KEY, records), records, strict=True))
        self._last.update(latest)
        origins = list(map(_ORIGIN, records))
        topics, partitions = set(map(_TOPIC, origins)), set(map(_PARTITION, origins))
        if len(topics) == len(partitions) == 1:
            single = (topics.pop(), partitions.pop())
            self._seen.setdefault(single, set()).update(latest)
            return single
        for record, origin in zip(records, origins, strict=True):
            self._seen.setdefault((origin.topic, origin.partition), set()).add(record.key)
        return None

    def _consumed(self, kind: type) -> bool:
        return any(takes for takes, _ in self._route(kind))

    def _route(self, kind: type) -> tuple[tuple[bool, bool], ...]:
        route = self._routes.get(kind)
        if route is None:
            takes = [stage.takes(kind) for stage in self._stages]
            route = tuple(
                (take, any(takes[index + 1 :]) and not (take and issubclass(kind, self._stages[index].emits)))
                for index, take in enumerate(takes)
            )
            self._routes[kind] = route
        return route

    def _flow(self, stream: list[Record], first: int, order: Order, dead: list[_Dead]) -> list[Record]:
        """What is left of a stream behind the last operator, in order."""
        for stage in self._stages[first:]:
            if not stream:
                break
            given, passed = self._split(stage.index, stream)
            if not given:
                continue
            outputs = self._guarded(stage, given, partial(stage.operator.process, given, stage.context))
            self._settle(stage, order.place_or_last, dead)
            if outputs:
                adopted = self._adopt(stage, outputs, given, order, 0)
                stream = order.sort(passed + adopted) if passed else adopted
            else:
                stream = passed
        return stream

    def _split(self, stage: int, stream: list[Record]) -> tuple[list[Record], list[Record]]:
        """(what the operator is given, what goes on behind it besides its outputs)."""
        actions = {kind: self._route(kind)[stage] for kind in set(map(type, map(_VALUE, stream)))}
        if len(actions) == 1:
            ((takes, forwards),) = actions.values()
            return (stream if takes else []), (stream if forwards or not takes else [])
        given = [record for record in stream if actions[type(record.value)][0]]
        passed = [record for record in stream if actions[type(record.value)] != (True, False)]
        return given, passed

    def _guarded(self, stage: _Stage, given: list[Record], call: Callable[[], list[Record]]) -> list[Record]:
        started = perf_counter()
        try:
            outputs = call()
        except Exception as error:  # noqa: BLE001 whatever it is, it names the operator and the record
            at = _culprit(error, given)
            self._fail(stage, f"failed {at}: {type(error).__name__}: {error}", error)
        if not self.replaying:
            seconds = perf_counter() - started
            self.metrics.observe_operator(stage.name, seconds)
            self.tracing.operator(stage.name, seconds)
        return outputs

    def _fail(self, stage: _Stage, what: str, error: Exception | None = None) -> NoReturn:
        self._failure = f"operator {stage.name!r} {what}"
        raise OperatorError(self._failure) from error

    def _refuse_if_failed(self) -> None:
        if self._failure is not None:
            raise OperatorError(f"the task stopped before: {self._failure}")

    def _settle(self, stage: _Stage, place: Callable[[Record], int], dead: list[_Dead]) -> None:
        """Takes over what an operator reported through its context."""
        context = stage.context
        if context.counts:
            if not self.replaying:
                for what, amount in context.counts.items():
                    self.metrics.operator_event(stage.name, what, amount)
            context.counts.clear()
        if context.dead:
            dead += [(place(cause), stage.index, record, reason) for record, reason, cause in context.dead]
            context.dead.clear()

    def _adopt(
        self, stage: _Stage, outputs: list[Record], given: list[Record], order: Order, base: int
    ) -> list[Record]:
        """An operator's outputs with their final paths, in order. Raises OperatorError if they break the contract."""
        stages, index, limit = len(self._stages), stage.index, base + END_INDEX
        causes: set[_Place] | None = None
        result: list[Record] = []
        places: list[_Place] = []
        for record in outputs:
            place, path = order.place(record.origin), record.path
            if place is None or not path or not (stage.operator.rekeys or record.key in self._last):
                self._fail(stage, f"returned a record that is not derived from what it was given: {_name(record)}")
            cause = path[:-1]
            if causes is None and (cause or given[0].path):
                causes = {(order[r.origin], r.path) for r in given}
            if causes is not None and (place, cause) not in causes:
                self._fail(stage, f"returned a record that is not derived from what it was given: {_name(record)}")
            if not base <= path[-1] < limit:
                self._fail(stage, f"derived index {path[-1]}, not one from {base} to {limit - 1}: {_name(record)}")
            if stages > 1 or type(path[-1]) is not int:
                # A numpy integer among them would be no JSON value.
                path = (*cause, int(path[-1]) * stages + index)
                record = Record(record.key, record.time_ns, record.value, record.origin, path)
            result.append(record)
            places.append((place, path))
        if all(one < two for one, two in pairwise(places)):
            return result
        ranks = sorted(range(len(places)), key=places.__getitem__)
        for one, two in pairwise(ranks):
            if places[one] == places[two]:
                self._fail(stage, f"derived two records with one index from one cause: {_name(result[one])}")
        return [result[rank] for rank in ranks]

    def _outcome(self, outputs: list[Record], dead: list[_Dead]) -> Outcome:
        if self.replaying:
            return Outcome([], [])
        # As if every input record had come in a call of its own; of one record and operator, as the operator had it.
        dead.sort(key=lambda row: row[:2])
        letters = [
            DeadLetter(record, "source" if index < 0 else self._stages[index].name, reason)
            for _, index, record, reason in dead
        ]
        for letter in letters:
            self.metrics.dead_letter(letter.operator)
        for kind in set(kinds := list(map(type, map(_VALUE, outputs)))):
            self.metrics.records_out(kind.__name__, kinds.count(kind))
            if kind is Score:
                self.metrics.scores.see(outputs)
        return Outcome(outputs, letters)

    # ---- the state

    def keys(self, partition: Partition | None = None) -> list[str]:
        """The keys seen so far (on one partition), sorted."""
        return sorted(self._last if partition is None else self._seen.get(partition, ()))

    def partitions(self, key: str) -> list[Partition]:
        """The partitions a key was seen on. More than one means that its state cannot move with a partition."""
        return sorted(partition for partition, keys in self._seen.items() if key in keys)

    def standing(self, partition: Partition) -> tuple[int, int | None, int | None]:
        """(keys, newest event time taken in, watermark) of a partition, times in ns; None where there is none.

        The watermark is the oldest of its keys': nothing before it is waited for any more by any operator.
        """
        keys = [key for key in self._seen.get(partition, ()) if key in self._last]
        marks = [mark for _, o in self.operators for key in keys if (mark := o.watermark(key)) is not None]
        return len(keys), max((self._last[key].time_ns for key in keys), default=None), min(marks, default=None)

    def snapshot(self, keys: Iterable[str] | None = None) -> dict[str, State]:
        """The state of each key (of these keys): all that `restore` needs. Unknown keys are left out."""
        self._refuse_if_failed()
        holders = [(name, operator, set(operator.keys())) for name, operator in self.operators]
        result: dict[str, State] = {}
        for key in self.keys() if keys is None else sorted(set(keys) & self._last.keys()):
            last = self._last[key]
            result[key] = {
                "input": {
                    "partitions": [[topic, partition] for topic, partition in self.partitions(key)],
                    "last": [last.time_ns, last.origin.topic, last.origin.partition, last.origin.offset],
                },
                "operators": {name: operator.snapshot(key) for name, operator, held in holders if key in held},
            }
        return result

    def restore(self, states: Mapping[str, State]) -> None:
        """Gives keys what `snapshot` returned, in place of what they had. Raises ValueError if it does not fit."""
        known = dict(self.operators)
        for key, state in states.items():
            try:
                time_ns, topic, partition, offset = state["input"]["last"]
                partitions = [(name, number) for name, number in state["input"]["partitions"]]
                operators = dict(state["operators"])
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"state of key {key!r} is not a task's: {error}") from error
            if strange := sorted(set(operators) - set(known)):
                raise ValueError(f"state of key {key!r} is for operator {strange[0]!r}; there are {sorted(known)}")
            self.drop([key])
            for name, held in operators.items():
                try:
                    known[name].restore(key, held)
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"state of key {key!r} does not fit operator {name!r}: {error}") from error
            self._last[key] = Record(key, time_ns, None, Origin(topic, partition, offset))
            for place in partitions:
                self._seen.setdefault(place, set()).add(key)

    def drop(self, keys: Iterable[str] | None = None) -> None:
        """Forgets keys (all of them)."""
        for key in self.keys() if keys is None else list(keys):
            for _, operator in self.operators:
                operator.drop(key)
            self._last.pop(key, None)
            for seen in self._seen.values():
                seen.discard(key)

    @property
    def reach(self) -> int | None:
        """How many of a key's last records (those that `reaches` counts) its state is made of; 0: it has none; None: it
        may be all of them. Known for a chain in which at most one operator keeps state, and is given input as it came.
        """
        reaches = [operator.reach for _, operator in self.operators]
        keeping = [index for index, reach in enumerate(reaches) if reach != 0]
        if not keeping:
            return 0
        first = keeping[0]
        stage = self._stages[first]
        derived = any(stage.takes(kind) for before in self._stages[:first] for kind in before.emits)
        return None if derived or len(keeping) > 1 else reaches[first]

    def reaches(self, record: Record) -> bool:
        """Whether an input record is one of those of which `reach` speaks."""
        return any(stage.operator.reach != 0 and stage.takes(type(record.value)) for stage in self._stages)

    def fingerprint(self) -> list[dict[str, Any]]:
        """What the state depends on besides the log: each operator's name, type, options and weights, as JSON values.

        Options are an operator's attribute `options`; weights are the item "weights" of its `describe()`, if any.
        """
        result: list[dict[str, Any]] = []
        for name, operator in self.operators:
            options = getattr(operator, "options", None)
            kind = type(operator)
            weights = operator.describe().get("weights")
            result.append(
                {
                    "name": name,
                    "type": f"{kind.__module__}:{kind.__qualname__}",
                    # Through text, so that it equals itself after a way through a file.
                    "options": json.loads(options.model_dump_json()) if isinstance(options, BaseModel) else {},
                    "weights": None if weights is None else str(weights),
                }
            )
        return result


def _name(record: Record) -> str:
    return f"{type(record.value).__name__} of key {record.key!r}, origin {_where(record.origin)}, path {record.path}"


def _culprit(error: Exception, given: list[Record]) -> str:
    """Where in its input an operator failed: the record its innermost frame had in hand if that is clear."""
    if len(given) == 1:
        return f"on {_name(given[0])}"
    ours = {id(record): record for record in given}
    found: dict[int, Record] = {}
    trace = error.__traceback__
    while trace is not None:
        held = {id(v): ours[id(v)] for v in trace.tb_frame.f_locals.values() if id(v) in ours}
        found = held or found
        trace = trace.tb_next
    if len(found) == 1:
        (record,) = found.values()
        return f"on {_name(record)}"
    return f"between {_name(given[0])} and {_name(given[-1])}"
