"""What sharding a graph costs: accuracy, staleness, records and bytes, against a single writer.

`uv run --group bench python -m tests.bench.graph_shards wikipedia.npz --weights FOLDER --shards 1,2,4,8`

All in one process and one thread: the operators `shards` and `shard-links` themselves, and in the broker's place a
queue in which a copy is behind the interaction that caused it and the `delay` next ones. Pairs are scored in the test
part, true link and random negative (DyGLib's), by the source's owner. The state is made from the beginning of the
recording. That takes long, so with `--warm N` (NAT) a single writer makes it up to N interactions before the test part,
and shards go on from there: each with its own nodes, and with ghosts as their owners sent them last, at the very
interactions at which they would have been sent.
"""

from __future__ import annotations

import argparse
import heapq
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepstream.connectors.codecs import encode
from stepstream.connectors.records import Interaction, NodeMemory, Origin, Record
from stepstream.models.dyngraph.loading import load_graph_model
from stepstream.models.dyngraph.rows import Row, carried, read_row, write_row
from stepstream.models.weights import find_weights
from stepstream.operators.shard_links import ShardLinks
from stepstream.operators.shard_state import NOBODY, ShardState
from stepstream.operators.shards import Shards, node_number, owner_of
from stepstream.pipeline.training.graph_data import GraphData, GraphSplit, read_graph
from stepstream.pipeline.training.graph_metrics import average_precision, batch_mean
from stepstream.pipeline.training.graph_protocols import BATCH, Pairs

ENCODED_EVERY = 200


class Counter:
    """A `Context` that counts, and takes no dead letters."""

    replaying = False

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def count(self, what: str, amount: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + amount

    def dead_letter(self, record: Record, reason: str, cause: Record | None = None) -> None:
        raise AssertionError(reason)


class History:
    """A single writer's state before interaction `at`, and what shards would know of each other's nodes there."""

    def __init__(self, data: GraphData, model: Any, at: int, counts: list[int]) -> None:
        how = carried(model)
        assert how is not None and not how.references, "of NAT only"
        ends = [torch.from_numpy(part[:at]) for part in (data.source, data.destination, data.time_ns)]
        self.plain, self.state = model.initial_state(data.nodes), model.initial_state(data.nodes)
        self.state["id"] = torch.tensor([node_number(node) for node in data.ids])
        model.update(self.plain, *ends)
        wanted: dict[int, list[tuple[int, int, int]]] = {}
        for count in counts:
            for event, shard, node in last_meetings(data, at, count):
                wanted.setdefault(event, []).append((count, shard, node))
        self.ghosts: dict[tuple[int, int], list[tuple[int, int, Row]]] = {}
        self.seen, done = np.zeros(data.nodes, np.int64), 0
        for event in sorted({*wanted, at - 1}):
            model.update(self.state, *(part[done : event + 1] for part in ends))
            for i in range(done, event + 1):
                self.seen[list({data.source[i], data.destination[i]})] += 1
            done = event + 1
            rows = {node: read_row(self.state, node, how) for _, _, node in wanted.get(event, [])}
            for count, shard, node in wanted.get(event, []):
                self.ghosts.setdefault((count, shard), []).append((node, int(self.seen[node]), rows[node]))


def last_meetings(data: GraphData, at: int, count: int) -> list[tuple[int, int, int]]:
    """(interaction, shard, node): where a node of another shard last met one of this, before `at`."""
    owners = np.array([owner_of(node_number(node), count) for node in data.ids])
    last: dict[tuple[int, int], int] = {}
    for i, (one, other) in enumerate(zip(data.source[:at].tolist(), data.destination[:at].tolist(), strict=True)):
        if owners[one] != owners[other]:
            last[int(owners[other]), one] = last[int(owners[one]), other] = i
    return [(event, shard, node) for (shard, node), event in last.items()]


class Simulation:
    """One run: `count` shards, copies to the other end's owner or to all, so many interactions late."""

    def __init__(self, data: GraphData, options: dict[str, Any], count: int, copies: str, delay: int) -> None:
        self.data, self.count, self.delay = data, count, delay
        self.numbers = [node_number(node) for node in data.ids]
        self.router = Shards(Shards.Options(count=count))
        given = {**options, "count": count, "copies": copies}
        self.operators = [ShardLinks(ShardLinks.Options.model_validate(given)) for _ in range(count)]
        self.context = Counter()
        self.due: list[tuple[int, int, int, Record]] = []
        self.sent = self.routed = self.busy_ns = 0
        self.bytes: dict[str, list[int]] = {"Interaction": [], "NodeMemory": []}
        self.seen = np.zeros(data.nodes, np.int64)
        self.behind: list[int] = []
        self.unknown = 0

    def begin_at(self, history: History) -> None:
        """As if the shards had been there all the time; but that what they know of others was never stale."""
        self.seen[:] = history.seen
        data, single = self.data, self.count == 1
        state = history.plain if single else history.state
        fresh = "all" in (operator.options.copies for operator in self.operators)
        for number, operator in enumerate(self.operators):
            shard = operator._shard(f"g/{number}")
            assert shard is not None
            # With one shard every node has the row of its number, as in the single writer's state.
            known = [
                n for n in range(data.nodes) if single or (self.seen[n] and (fresh or shard.owns(self.numbers[n])))
            ]
            rows = [shard.row(self.numbers[n], data.ids[n]) for n in known]
            for name, leaf in state.items():
                shard.state[name][rows] = leaf[known]
            for n, row in zip(known, rows, strict=True):
                shard.versions[row] = int(self.seen[n])
            for node, version, values in [] if fresh or single else history.ghosts[self.count, number]:
                assert shard.how is not None
                row = shard.row(self.numbers[node], data.ids[node])
                shard.versions[row] = shard.received[row] = version
                write_row(shard.state, row, values, shard.how)

    def interaction(self, at: int) -> list[Record]:
        """Number `at` of the recording, for each owner."""
        data = self.data
        features = None if data.features is None else data.features[at]
        value = Interaction(data.ids[data.source[at]], data.ids[data.destination[at]], features)
        record = Record("g", int(data.time_ns[at]), value, Origin("in", 0, at))
        routed = self.router.process([record], self.context)
        self.routed += len(routed)
        self._weigh(routed[0], at)
        return routed

    def _weigh(self, record: Record, at: int) -> None:
        if at % ENCODED_EVERY == 0:
            self.bytes[type(record.value).__name__].append(len(encode(record.value).body))

    def deliver(self, at: int) -> None:
        """The copies that come before interaction `at`."""
        while self.due and self.due[0][0] <= at:
            record = heapq.heappop(self.due)[3]
            self._work(record, at)

    def take(self, routed: list[Record], at: int) -> None:
        """An interaction, at each owner."""
        for record in routed:
            self._work(record, at)
        self.seen[list({self.data.source[at], self.data.destination[at]})] += 1

    def _work(self, record: Record, at: int) -> None:
        began = time.process_time_ns()
        out = self.operators[int(record.key.rpartition("/")[2])].process([record], self.context)
        self.busy_ns += time.process_time_ns() - began
        for copy in out:
            if isinstance(copy.value, NodeMemory):
                self._weigh(copy, at)
                self.sent += 1
                heapq.heappush(self.due, (at + 1 + self.delay, self.sent, 0, copy))

    def score(self, routed: list[Record], at: int, negative: int) -> tuple[float, float]:
        """Of interaction `at` before it is taken in, and of its negative, both as its source's owner sees them."""
        record, data = routed[0], self.data
        shard = self.operators[int(record.key.rpartition("/")[2])]._shard(record.key)
        assert shard is not None
        ends = [data.source[at], data.destination[at], negative]
        rows = [self._row(shard, int(end)) for end in ends]
        true = int(ends[1])
        if not shard.owns(self.numbers[true]) and shard.how is not None:
            known = shard.versions[rows[1]] if self.numbers[true] in shard.rows else 0
            self.behind.append(int(self.seen[true]) - known)
            self.unknown += known == 0 < self.seen[true]
        # Two calls, as the operator makes them: how many share a multiplication may change the last bit.
        positive, other = (float(shard.score(rows[0], [row], record.time_ns)[0]) for row in rows[1:])
        return positive, other

    def _row(self, shard: ShardState, node: int) -> int:
        """Of a node, or of one that was never seen, without making it."""
        row = shard.rows.get(self.numbers[node])
        if row is not None:
            return row
        if shard.how is not None:
            return NOBODY
        # A single writer (or a pair memory) has rows for all: the next free one was never seen.
        assert len(shard.numbers) + 1 < shard.capacity
        return shard.capacity - 1


@torch.no_grad()
def run(
    data: GraphData,
    split: GraphSplit,
    pairs: Pairs,
    options: dict[str, Any],
    count: int,
    copies: str,
    delay: int,
    limit: int | None,
    history: History | None = None,
    first: int = 0,
) -> dict[str, Any]:
    """What one run comes to, as a row of the table."""
    simulation = Simulation(data, options, count, copies, delay)
    rows = np.flatnonzero(split.test)[:limit]
    scores = np.zeros((len(rows), 2), np.float32)
    began = time.monotonic()
    if history is not None:
        simulation.begin_at(history)
    for at in range(first, int(rows[-1]) + 1):
        simulation.deliver(at)
        routed = simulation.interaction(at)
        if at == rows[0]:
            simulation.busy_ns = 0
        if at >= rows[0]:
            place = at - rows[0]
            scores[place] = simulation.score(routed, at, int(pairs.destination[place]))
        simulation.take(routed, at)
    total = int(rows[-1]) + 1 - first
    behind = np.array(simulation.behind or [0])
    sizes = {name: float(np.mean(found)) if found else 0.0 for name, found in simulation.bytes.items()}
    counts = simulation.context.counts
    return {
        "shards": count,
        "copies": copies if count > 1 else "none",
        "delay": delay,
        "ap": 100 * batch_mean(average_precision, scores[:, 0], scores[:, 1], BATCH),
        "crossing": counts.get("crossing", 0) / total,
        "behind_mean": float(behind.mean()),
        "behind_p99": float(np.quantile(behind, 0.99)),
        "unknown": simulation.unknown / max(1, len(simulation.behind)),
        "records": (simulation.routed + simulation.sent) / total,
        "bytes": (simulation.routed * sizes["Interaction"] + simulation.sent * sizes["NodeMemory"]) / total,
        "per_s": len(rows) / (simulation.busy_ns / 1e9 / count),
        "stale": counts.get("stale_copies", 0),
        "took_s": time.monotonic() - began,
    }


def main() -> None:
    """Prints a row for each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="nat")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--shards", default="1,2,4,8")
    parser.add_argument("--delays", default="0,10,200")
    parser.add_argument("--copies", default="ends")
    parser.add_argument("--limit", type=int, help="of the test part")
    parser.add_argument("--warm", type=int, help="interactions before the test part with which shards begin")
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = read_graph(given.data)
    if given.weights is None or not wide(given.weights):
        data = GraphData(data.name, data.source, data.destination, data.time_ns, None, data.ids, data.reordered)
    split = GraphSplit.of(data)
    (pairs,) = [some for some in Pairs.of(data, split) if some.name == "random"]
    options = {"model": given.model, "weights": given.weights}
    history, first = None, 0
    if given.warm is not None:
        first = int(np.flatnonzero(split.test)[0]) - given.warm
        counts = [count for count in map(int, given.shards.split(",")) if count > 1]
        model = load_graph_model(given.model, given.weights).model
        with torch.no_grad():
            history = History(data, model, first, counts)
    for count in map(int, given.shards.split(",")):
        for copies in given.copies.split(",") if count > 1 else ["ends"]:
            for delay in map(int, given.delays.split(",") if count > 1 else "0"):
                row = run(data, split, pairs, options, count, copies, delay, given.limit, history, first)
                told = (f"{name} {v:.4f}" if isinstance(v, float) else f"{name} {v}" for name, v in row.items())
                print("  ".join(told), flush=True)


def wide(weights: Path) -> int:
    """How many features the weights are for."""
    return int(find_weights(weights).card.config.get("features", 0))


if __name__ == "__main__":
    main()
