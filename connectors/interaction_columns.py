"""Which column or array of an edge list is what, by its name.

The names are those of the published edge lists: SNAP and JODIE csv, DyGLib's and TGN's `u, i, ts, label, idx`, TGB,
PyG's TemporalData `src, dst, t, msg`, and what people call their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stepstream.connectors.base import InputError
from stepstream.connectors.interaction_times import TimeUnit

__all__ = ["FEATURES", "Roles", "find_roles", "looks_like_edges"]

_SOURCE = ("source", "src", "source_id", "src_id", "from", "sender", "u", "user", "user_id", "userid")
_DESTINATION = (
    "destination", "dst", "destination_id", "dst_id", "dest", "target", "target_id", "to", "receiver", "recipient", "v",
    "i", "item", "item_id", "itemid",
)  # fmt: skip
_NO_UNIT = ("time", "ts", "t", "timestamp", "timestamps", "times", "date", "datetime", "unix_time", "unixtime")
_UNITS: tuple[TimeUnit, ...] = ("s", "ms", "us", "ns")
_UNIT_OF: dict[str, TimeUnit] = {f"{name}_{unit}": unit for name in _NO_UNIT[:6] for unit in _UNITS}
_TIME = (*_NO_UNIT, *_UNIT_OF)
_EVENT = ("event_id", "eventid")
_LABEL = ("label", "labels", "state_label", "y")
FEATURES = ("features", "feats", "feat", "edge_features", "edge_feats", "edge_feat", "msg")
"""Names of a two-dimensional array of features."""

_ROW_NUMBERS = ("", "idx", "index", "unnamed: 0")
_USERS = ("user", "user_id", "userid")
_ITEMS = ("item", "item_id", "itemid")


@dataclass(frozen=True, slots=True)
class Roles:
    """Indices into a list of names. `others`: those that have no role and are no row numbers."""

    source: int
    destination: int
    time: int
    event: int | None
    label: int | None
    others: tuple[int, ...]
    separate_ids: bool
    """The names say that sources and destinations are two id spaces."""
    unit: TimeUnit | None
    """Of the time, where its name says so (`time_ns`)."""

    @property
    def needed(self) -> tuple[int, int, int]:
        """Source, destination, time."""
        return self.source, self.destination, self.time


def _plain(name: str) -> str:
    return name.strip().lower()


def looks_like_edges(names: Sequence[str]) -> bool:
    """Whether a source, a destination and a time are named."""
    known = {_plain(name) for name in names}
    return all(not known.isdisjoint(role) for role in (_SOURCE, _DESTINATION, _TIME))


def _some(known: tuple[str, ...]) -> str:
    return ", ".join(known[:15]) + (", ..." if len(known) > 15 else "")


def _find(names: list[str], known: tuple[str, ...]) -> int | None:
    at = [i for i, name in enumerate(names) if name in known]
    if len(at) > 1:
        raise InputError(f"expected one of {_some(known)}; got {' and '.join(names[i] for i in at)}")
    return at[0] if at else None


def find_roles(names: Sequence[str]) -> Roles:
    """What the names say. Raises InputError naming what is missing or there twice."""
    plain = [_plain(name) for name in names]
    found: dict[str, int] = {}
    for role, known in (("source", _SOURCE), ("destination", _DESTINATION), ("time", _TIME)):
        at = _find(plain, known)
        if at is None:
            raise InputError(f"{role}: missing; expected one of {_some(known)}; got {', '.join(names)[:200]}")
        found[role] = at
    event, label = _find(plain, _EVENT), _find(plain, _LABEL)
    taken = {*found.values(), event, label}
    others = [i for i, name in enumerate(plain) if i not in taken and name not in _ROW_NUMBERS]
    separate = plain[found["source"]] in _USERS and plain[found["destination"]] in _ITEMS
    unit = _UNIT_OF.get(plain[found["time"]])
    return Roles(found["source"], found["destination"], found["time"], event, label, tuple(others), separate, unit)
