"""Edge lists in .npz archives: arrays [E] that name a source, a destination and a time (`src`, `dst`, `ts`).

Besides them `features` [E, F] (or `msg`, ...), `label` [E], `event_id` [E]; every other array of E numbers is a feature
too. Ids are integers or texts, never floats, which do not hold large ones. Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stepstream.connectors.base import InputError
from stepstream.connectors.interaction_columns import FEATURES, Roles, find_roles, looks_like_edges
from stepstream.connectors.interaction_times import ticks_of_array
from stepstream.connectors.interactions import (
    IdColumn,
    InteractionOptions,
    InteractionRecording,
    build_interactions,
    check_size,
)
from stepstream.connectors.npz import Npz

__all__ = ["InteractionsNpz"]


def _texts(array: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    try:
        return np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: no UTF-8 text ({error.reason})") from None


def _ids(archive: Npz, name: str) -> IdColumn:
    array, where = archive[name], f"{archive.path}: {name}"
    kind = array.dtype.kind
    if kind == "u" and array.dtype.itemsize == 8 and bool((array > 2**63 - 1).any()):
        at = int(np.flatnonzero(array > 2**63 - 1)[0])
        raise InputError(f"{where}[{at}]: expected an integer of 64 bits with sign, got {array[at]}")
    if kind in "iu":
        values, codes = np.unique(array.astype(np.int64), return_inverse=True)
        return IdColumn(values, codes.reshape(-1).astype(np.int64))
    if kind in "US":
        texts, codes = np.unique(_texts(array, where), return_inverse=True)
        return IdColumn(texts.tolist(), codes.reshape(-1).astype(np.int64))
    raise InputError(f"{where}: expected ids, integers or texts, got {array.dtype}")


def _features(
    archive: Npz, names: list[str], roles: Roles, count: int
) -> tuple[npt.NDArray[np.float32] | None, list[str], list[str]]:
    """(The features, their names, the arrays that are not read.)"""
    blocks: list[npt.NDArray[np.float32]] = []
    called: list[str] = []
    left: list[str] = []
    for name in (names[at] for at in roles.others):
        shape, dtype = archive.header(name)
        declared = name.strip().lower() in FEATURES
        if declared and (dtype.kind not in "fiub" or len(shape) not in (1, 2) or shape[0] != count):
            raise InputError(f"{archive.path}: {name}: expected numbers [{count}, F], got {dtype} {list(shape)}")
        if dtype.kind not in "fiub" or shape[:1] != (count,) or not (declared or len(shape) == 1):
            left.append(name)
            continue
        width = shape[1] if len(shape) == 2 else 1
        check_size(archive.path, name, count, len(called) + width)
        with np.errstate(over="ignore"):
            blocks.append(archive[name].astype(np.float32).reshape(count, width))
        called += [name] if len(shape) == 1 else [f"{name}_{i}" for i in range(width)]
    return (np.concatenate(blocks, axis=1) if called else None), called, left


def _labels(archive: Npz, name: str, count: int) -> npt.NDArray[np.float32] | None:
    shape, dtype = archive.header(name)
    if shape not in ((count,), (count, 1)) or dtype.kind not in "fiub":
        return None
    return archive[name].reshape(count).astype(np.float32)


def _events(archive: Npz, name: str) -> list[str]:
    array, where = archive[name], f"{archive.path}: {name}"
    if array.dtype.kind not in "iuUS":
        raise InputError(f"{where}: expected integers or texts, got {array.dtype}")
    return list(map(str, _texts(array, where).tolist()))


def _check_lengths(archive: Npz, names: list[str]) -> int:
    """How many interactions there are, if all these arrays have that length."""
    shapes = {name: archive.header(name)[0] for name in names}
    first = shapes[names[0]]
    for name, shape in shapes.items():
        if len(shape) != 1 or shape != first:
            raise InputError(
                f"{archive.path}: {name}: expected one value an interaction, {list(first)}, got {list(shape)}"
            )
    check_size(archive.path, names[0], first[0], 0)
    return first[0]


def _at(path: Path) -> Callable[[int], str]:
    return lambda at: f"{path}: interaction {at}"


class InteractionsNpz:
    """Reader of edge lists in .npz archives."""

    name = "interactions-npz"
    modality = "graph"
    Options = InteractionOptions

    @staticmethod
    def sniff(path: Path, head: bytes) -> bool:
        """Whether the archive has arrays that name a source, a destination and a time."""
        if not head.startswith(b"PK\x03\x04"):
            return False
        try:
            with Npz(path) as archive:
                return looks_like_edges(list(archive))
        except InputError:
            return False

    @staticmethod
    def read(path: Path, options: InteractionOptions | None = None) -> InteractionRecording:
        """The recording; raises InputError naming the file, the array, and what was expected."""
        with Npz(path) as archive:
            names = list(archive)
            try:
                roles = find_roles(names)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None
            source, destination, time = (names[at] for at in roles.needed)
            event = None if roles.event is None else names[roles.event]
            count = _check_lengths(archive, [source, destination, time, *([event] if event else [])])
            labels = None if roles.label is None else _labels(archive, names[roles.label], count)
            features, called, left = _features(archive, names, roles, count)
            if labels is None and roles.label is not None:
                left.append(names[roles.label])
            return build_interactions(
                path,
                format=InteractionsNpz.name,
                options=options or InteractionOptions(),
                source=_ids(archive, source),
                destination=_ids(archive, destination),
                ticks=ticks_of_array(archive[time], lambda at: f"{path}: {time}[{at}]"),
                where=_at(path),
                fields=(source, destination, time),
                separate_ids=roles.separate_ids,
                unit=roles.unit,
                features=features,
                feature_names=called,
                labels=labels,
                event_ids=None if event is None else _events(archive, event),
                notes=[f"arrays that are not read: {', '.join(left)[:200]}"] if left else [],
            )
