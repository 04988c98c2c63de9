"""`shards`: a graph in parts, each of which owns the nodes that hash to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from stepstream.connectors.records import Interaction, NodeId, Record
from stepstream.operators import base
from stepstream.operators.base import Context, Operator, OptionError

__all__ = ["MAX_SHARDS", "Shards", "node_number", "owner_of", "read_shard_key", "refuse_consumers", "shard_key"]

MAX_SHARDS = 4096


def node_number(node: NodeId) -> int:
    """What a node is called wherever its name is too long: 63 bits, the same on every machine and for ever.

    The highest 63 bits of BLAKE2b with a digest of 8 bytes, big-endian, of one byte for the kind of the id and the id:
    b"i" and 8 bytes of two's complement in big-endian order, or b"s" and UTF-8. So 7 and "7" differ.
    Two of a million nodes have one number with a probability of 5e-8; they would be taken for one node.
    """
    if isinstance(node, str):
        text = b"s" + node.encode("utf-8", "surrogatepass")
    else:
        text = b"i" + node.to_bytes(8, "big", signed=True)
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def owner_of(number: int, count: int) -> int:
    """The shard, 0 .. count - 1, that a node of this number belongs to."""
    return number % count


def shard_key(graph: str, shard: int) -> str:
    """The key of one shard of a graph."""
    return f"{graph}/{shard}"


def read_shard_key(key: str, count: int) -> tuple[str, int] | None:
    """(graph, shard) of a key; None if it is not that of one of `count` shards."""
    graph, slash, number = key.rpartition("/")
    if not slash or not number.isascii() or not number.isdigit() or len(number) > 4:
        return None
    shard = int(number)
    return (graph, shard) if shard < count and str(shard) == number else None


def refuse_consumers(behind: Sequence[Operator], kinds: Iterable[type], count: int) -> None:
    """Raises OptionError if one of the operators behind consumes what one emitted for a shard."""
    for operator in behind:
        for kind in kinds:
            if issubclass(kind, tuple(operator.consumes)):
                raise OptionError(
                    "count",
                    count,
                    f"what it emits for a shard goes to that shard's partition, but {type(operator).__name__} behind "
                    f"it consumes {kind.__name__}: publish to a topic, and put it into a pipeline of its own",
                )


class Shards(Operator):
    """Interactions of a graph -> the same for the shards that own their ends, keyed "graph/shard".

    A node belongs to the shard `node_number(node) % count`, whatever else happens: `count` is decided once for a topic,
    and another one is a new topic with the log replayed into it. An interaction becomes one record for each distinct
    owner, the source's first, with its time and payload as they were; `ends: source` leaves out the destination's,
    for models of which only the source remembers anything (recency, edgebank). Keeps no state.

    Counted: "interactions"; "crossing", those with two owners.
    """

    class Options(base.Options):
        """`count`: of shards. `ends`: whose owners are told."""

        count: int = Field(ge=1, le=MAX_SHARDS)
        ends: Literal["both", "source"] = "both"

    consumes: ClassVar[tuple[type, ...]] = (Interaction,)
    emits: ClassVar[tuple[type, ...]] = (Interaction,)
    rekeys = True
    reach = 0

    options: Options

    def __init__(self, options: Options) -> None:
        self.options = options

    def connect(self, before: Sequence[Operator], behind: Sequence[Operator]) -> None:
        """Refuses operators behind it that consume interactions."""
        refuse_consumers(behind, self.emits, self.options.count)

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        """One or two records for each."""
        count, out, crossing = self.options.count, [], 0
        for record in records:
            owners = [owner_of(node_number(record.value.source), count)]
            other = owner_of(node_number(record.value.destination), count)
            if other != owners[0]:
                crossing += 1
                if self.options.ends == "both":
                    owners.append(other)
            out += [record.derive(i, record.value, key=shard_key(record.key, shard)) for i, shard in enumerate(owners)]
        context.count("interactions", len(records))
        if crossing:
            context.count("crossing", crossing)
        return out

    def describe(self) -> dict[str, Any]:
        """Into what."""
        return {"shards": self.options.count, "told": f"the owners of {self.options.ends}", "receptive_field": 0}
