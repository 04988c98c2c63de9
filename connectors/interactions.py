"""What every reader of edge lists gives: an `InteractionRecording`, checked.

Ids keep their kind. A column of text (csv) is integers if every cell of source and destination is one in its plain
form (7, not 007 or 7.0), else all of it is text. Where sources and destinations are two id spaces (users and items,
both counted from 0), user 7 becomes the node "user:7" and item 7 "item:7", whatever else the file holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from stepstream.connectors import base
from stepstream.connectors.base import InputError
from stepstream.connectors.interaction_times import Ticks, TimeUnit, to_ns
from stepstream.connectors.node_ids import MAX_FEATURES, MAX_ID, MIN_ID, node_fault, text_fault
from stepstream.connectors.records import NodeId
from stepstream.connectors.times import format_time
from stepstream.connectors.traffic import recording_name

__all__ = ["IdColumn", "InteractionOptions", "InteractionRecording", "build_interactions", "check_size"]

IntArray: TypeAlias = npt.NDArray[np.int64]

MAX_CELLS = 2**31
"""Most numbers in the features of one recording (8 GiB of float32)."""

MAX_INTERACTIONS = 2**30

_INTEGER = re.compile(r"0|-?[1-9]\d{0,18}", re.ASCII)


class InteractionOptions(base.Options):
    """What a user may say about an edge list.

    `time_unit`: auto judges it from the largest time, see `interaction_times`. `separate_ids`: sources and
    destinations are two id spaces; None: if the file calls them user and item. `name`: instead of the one made from the
    file's name.
    """

    time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto"
    separate_ids: bool | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class IdColumn:
    """A column of node ids: interaction e has `values[codes[e]]`. `values`: int64, or texts; each of them is used."""

    values: IntArray | list[str]
    codes: IntArray


@dataclass(frozen=True, slots=True)
class InteractionRecording:
    """E interactions in the order of their file.

    `nodes`: the ids of N nodes, ascending (sources before destinations where they are two id spaces). `source`,
    `destination`: int64 [E], indices into `nodes`. `times_ns`: int64 [E], 0 or more, in any order. `features`: float32
    [E, F], finite, or None; `feature_names`: F of them. `labels`: float32 [E] (NaN: none), or None: what is to be
    predicted, so no feature. `event_ids`: E texts, or None. `time_unit`: that of the file. `separate_ids`: two id
    spaces.
    `notes`: what a reader had to assume or found strange. Arrays are read-only.
    """

    name: str
    format: str
    nodes: tuple[NodeId, ...]
    source: IntArray
    destination: IntArray
    times_ns: IntArray
    features: npt.NDArray[np.float32] | None = None
    feature_names: tuple[str, ...] = ()
    labels: npt.NDArray[np.float32] | None = None
    event_ids: tuple[str, ...] | None = None
    time_unit: str = "s"
    separate_ids: bool = False
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.times_ns)

    @property
    def time_ordered(self) -> bool:
        """Whether time never goes backwards."""
        return bool((self.times_ns[1:] >= self.times_ns[:-1]).all())

    def in_time_order(self) -> InteractionRecording:
        """The same interactions by time, those of one time in the order of the file; itself if they are already."""
        return self if self.time_ordered else self.take(np.argsort(self.times_ns, kind="stable"))

    def take(self, which: IntArray) -> InteractionRecording:
        """The interactions at these places, in this order; the nodes stay all there."""
        chosen = replace(
            self,
            source=self.source[which],
            destination=self.destination[which],
            times_ns=self.times_ns[which],
            features=None if self.features is None else self.features[which],
            labels=None if self.labels is None else self.labels[which],
            event_ids=None if self.event_ids is None else tuple(self.event_ids[at] for at in which.tolist()),
        )
        _freeze(chosen)
        return chosen

    def summary(self) -> dict[str, Any]:
        """What `stepstream inspect` prints. `t_first`, `t_last`: seconds since 1970 (or the recording's own zero).

        `bipartite`: no node is both a source and a destination. `ties`: interactions beyond the first at their time.
        `repeats`: those whose pair (source, destination) came before in the file; `same_pair_and_time`: the ones beyond
        the first that are alike in all three. `out_of_order`: those before whom a later one stands, `behind_s` by how
        many seconds at most: the lateness with which the operator `interactions` loses none.
        """
        times = self.times_ns
        pairs = self.source * np.int64(len(self.nodes)) + self.destination
        behind = np.maximum.accumulate(times) - times
        first, last = int(times.min()), int(times.max())
        sources, destinations = set(np.unique(self.source).tolist()), set(np.unique(self.destination).tolist())
        order = np.lexsort((times, pairs))
        same = (np.diff(pairs[order]) == 0) & (np.diff(times[order]) == 0)
        return {
            "modality": "graph",
            "format": self.format,
            "name": self.name,
            "interactions": len(self),
            "sources": len(sources),
            "destinations": len(destinations),
            "nodes": len(self.nodes),
            "bipartite": sources.isdisjoint(destinations),
            "separate_ids": self.separate_ids,
            "t_first": _seconds(first),
            "t_last": _seconds(last),
            "start": format_time(first),
            "end": format_time(last),
            "time_unit": self.time_unit,
            "time_ordered": self.time_ordered,
            "out_of_order": int(np.count_nonzero(behind)),
            "behind_s": _seconds(int(behind.max())),
            "self_loops": int(np.count_nonzero(self.source == self.destination)),
            "ties": len(self) - len(np.unique(times)),
            "repeats": len(self) - len(np.unique(pairs)),
            "same_pair_and_time": int(np.count_nonzero(same)),
            "features": len(self.feature_names),
            "feature_names": list(self.feature_names[:20]),
            "labels": self.labels is not None,
            "event_ids": None if self.event_ids is None else len(set(self.event_ids)),
            "notes": list(self.notes),
        }


def _seconds(ns: int) -> int | float:
    return ns // 10**9 if ns % 10**9 == 0 else ns / 10**9


def _freeze(recording: InteractionRecording) -> None:
    for array in (recording.source, recording.destination, recording.times_ns, recording.features, recording.labels):
        if array is not None:
            array.setflags(write=False)


def check_size(path: Path, field: str, interactions: int, features: int) -> None:
    """InputError if there is nothing, or more than is read; to be called before it is read."""
    if interactions < 1:
        raise InputError(f"{path}: {field}: expected at least one interaction, there is none")
    if interactions > MAX_INTERACTIONS:
        raise InputError(f"{path}: {field}: {interactions} interactions, at most {MAX_INTERACTIONS} are read")
    if features > MAX_FEATURES or interactions * features > MAX_CELLS:
        raise InputError(
            f"{path}: {field}: {interactions} interactions x {features} features; expected at most {MAX_FEATURES} "
            f"features, and {MAX_CELLS} numbers in all"
        )


def _as_integers(values: IntArray | list[str]) -> IntArray | None:
    """Texts that are all integers of 64 bits in their plain form, as such."""
    if isinstance(values, np.ndarray):
        return values
    if not all(map(_INTEGER.fullmatch, values)):
        return None
    numbers = list(map(int, values))
    return np.array(numbers, np.int64) if all(MIN_ID <= n <= MAX_ID for n in numbers) else None


def _texts(values: IntArray | list[str]) -> list[str]:
    return list(map(str, values.tolist())) if isinstance(values, np.ndarray) else values


def _numbered(columns: Sequence[IdColumn], prefixes: Sequence[str]) -> tuple[list[NodeId], list[IntArray]]:
    """(The ids of one id space, ascending, and each column as indices into them.)"""
    integers = [_as_integers(column.values) for column in columns]
    unique: npt.NDArray[Any]
    if all(values is not None for values in integers):
        unique, inverse = np.unique(np.concatenate([v for v in integers if v is not None]), return_inverse=True)
        ids: list[NodeId] = unique.tolist()
        places = inverse.reshape(-1).astype(np.int64)
    else:
        texts = [text for column in columns for text in _texts(column.values)]
        ids = sorted(set(texts))
        at = {text: i for i, text in enumerate(ids)}
        places = np.array([at[text] for text in texts], np.int64)
    if prefixes:
        ids = [f"{prefixes[0]}:{node}" for node in ids]
    coded, start = [], 0
    for column in columns:
        coded.append(places[start + column.codes])
        start += len(column.values)
    return ids, coded


def _number_nodes(
    source: IdColumn, destination: IdColumn, separate: bool
) -> tuple[tuple[NodeId, ...], IntArray, IntArray]:
    """(All node ids, sources and destinations as indices into them.)"""
    if not separate:
        ids, (sources, destinations) = _numbered([source, destination], ())
        return tuple(ids), sources, destinations
    users, (sources,) = _numbered([source], ("user",))
    items, (destinations,) = _numbered([destination], ("item",))
    return (*users, *items), sources, destinations + len(users)


def _check_ids(column: IdColumn, field: str, where: Callable[[int], str]) -> None:
    if isinstance(column.values, np.ndarray):
        return
    for code, text in enumerate(column.values):
        fault = node_fault(text)
        if fault is not None:
            at = int(np.flatnonzero(column.codes == code)[0])
            raise InputError(f"{where(at)}: {field}: {fault}")


def build_interactions(
    path: Path,
    *,
    format: str,
    options: InteractionOptions,
    source: IdColumn,
    destination: IdColumn,
    ticks: Ticks,
    where: Callable[[int], str],
    fields: tuple[str, str, str] = ("source", "destination", "time"),
    separate_ids: bool = False,
    unit: TimeUnit | None = None,
    features: npt.NDArray[np.float32] | None = None,
    feature_names: Sequence[str] = (),
    labels: npt.NDArray[np.float32] | None = None,
    event_ids: Sequence[str] | None = None,
    notes: Sequence[str] = (),
) -> InteractionRecording:
    """A checked recording. `where` names the place of interaction e, `fields` what the file calls its three columns.
    `separate_ids`, `unit`: what those names say, if they do; options go before them.

    Raises InputError naming the file, the place, the field and what was expected.
    """
    check_size(path, fields[0], len(ticks.whole), 0 if features is None else features.shape[1])
    _check_ids(source, fields[0], where)
    _check_ids(destination, fields[1], where)
    if features is not None and not np.isfinite(features).all():
        at, column = (int(i) for i in np.argwhere(~np.isfinite(features))[0])
        raise InputError(
            f"{where(at)}: {feature_names[column]}: expected a finite number of float32, got {features[at, column]}"
        )
    for at, event in enumerate(event_ids or ()):
        fault = text_fault(event)
        if fault is not None:
            raise InputError(f"{where(at)}: event_id: {fault}")
    separate = separate_ids if options.separate_ids is None else options.separate_ids
    nodes, sources, destinations = _number_nodes(source, destination, separate)
    told = unit if options.time_unit == "auto" else options.time_unit
    times, unit = to_ns(ticks, told, lambda at: f"{where(at)}: {fields[2]}")
    remarks = list(notes)
    if told is None and ticks.unit is None and unit != "s":
        remarks.append(f"times are taken to be in {unit}, by the size of the largest (option time_unit)")
    if separate:
        remarks.append(f"{fields[0]} and {fields[1]} are two id spaces: nodes are called user:ID and item:ID")
    recording = InteractionRecording(
        name=options.name or recording_name(path),
        format=format,
        nodes=nodes,
        source=sources,
        destination=destinations,
        times_ns=times,
        features=features,
        feature_names=tuple(feature_names),
        labels=labels,
        event_ids=None if event_ids is None else tuple(event_ids),
        time_unit=unit,
        separate_ids=separate,
        notes=tuple(remarks),
    )
    _freeze(recording)
    return recording
