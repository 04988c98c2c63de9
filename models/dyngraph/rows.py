"""What a model remembers of one node, taken out of a state and put into another one's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stepstream.models.dyngraph.base import GraphModel, GraphState
from stepstream.models.dyngraph.jodie import JODIE
from stepstream.models.dyngraph.nat import NAT
from stepstream.models.dyngraph.tgn import TGN

__all__ = ["Carried", "Row", "carried", "forget_references", "leaves_of", "read_row", "row_spec", "write_row"]

Row = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Carried:
    """How rows of a model's state move between graphs that number their nodes differently.

    `references`: leaves that hold rows of other nodes. `identity`: the leaf with what a node is called in the caches of
    others, which every graph must agree on and no copy has to say; None for a model without.
    """

    references: tuple[str, ...] = ()
    identity: str | None = None


# By exact class. APAN is not among them: an interaction writes into the mailboxes of nodes that are no end of it, and
# so into rows that others own. Nor is PRES over any of them: nobody has looked at what it does to its statistics.
_CARRIED: dict[type[GraphModel], Carried] = {
    NAT: Carried(identity="id"),
    TGN: Carried(("other", "ring_ids")),
    JODIE: Carried(("other",)),
}


def carried(model: GraphModel) -> Carried | None:
    """How a model's rows move; None if they cannot: an update would have to write rows of other nodes."""
    found = _CARRIED.get(type(model))
    if found is not None and getattr(model, "smoother", None) is not None:
        return None
    return found


def leaves_of(state: GraphState, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, leaf) of a state, those of a tree in it as "tree/leaf"."""
    for name, leaf in state.items():
        if isinstance(leaf, Mapping):
            yield from leaves_of(dict(leaf), f"{prefix}{name}/")
        else:
            yield prefix + name, leaf


def row_spec(model: GraphModel, how: Carried) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of each leaf of a row, by name."""
    spec = {}
    for name, leaf in leaves_of(model.initial_state(1)):
        if name != how.identity:
            spec[name] = str(leaf.numpy().dtype), tuple(leaf.shape[1:])
    return spec


def read_row(state: GraphState, row: int, how: Carried) -> Row:
    """A copy of what the state holds of one node, on the processor."""
    return {name: np.array(leaf[row].numpy(), copy=True) for name, leaf in leaves_of(state) if name != how.identity}


def write_row(state: GraphState, row: int, values: Mapping[str, npt.NDArray[Any]], how: Carried) -> None:
    """The inverse of `read_row`: every leaf but the identity."""
    for name, leaf in leaves_of(state):
        if name != how.identity:
            leaf.numpy()[row] = values[name]


def forget_references(state: GraphState, gone: list[int], instead: int, how: Carried) -> None:
    """Whoever refers to one of the rows `gone` refers to `instead` from then on."""
    if not how.references:
        return
    for name, leaf in leaves_of(state):
        if name in how.references:
            table = torch.arange(len(leaf))
            table[gone] = instead
            leaf.copy_(table[leaf])
