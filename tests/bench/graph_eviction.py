"""What it costs that nodes leave memory and come back: `links` with all nodes in memory, and with a tenth of them.

uv run python -m tests.bench.graph_eviction [--nodes 20000] [--wikipedia FILE] [--nat FOLDER] [--batch 200] [--learn]

Interactions a second are of CPU time, one thread, freshness batch. "stream": sources and destinations of power-law
degrees, scattered over the nodes, and all their ids new to the operator. "wikipedia": AP over the last 15 %, one random
destination each, of all that were one by then; one that is away is scored as one never seen. `--nat`: weights that
`stepstream train nat` made on the same file without features; without it, on the stream, random ones. `--learn`: NAT
alone, and it goes on learning. "scores": the same where all scores are, to the bit.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.support import RecordingContext

from stepstream.connectors.records import Interaction, Origin, Record
from stepstream.models.dyngraph.nat import NAT, NATConfig
from stepstream.models.dyngraph.residency import NOBODY
from stepstream.models.weights import Card, save_weights
from stepstream.operators.links import Links
from stepstream.pipeline.training.graph_data import read_graph
from stepstream.pipeline.training.graph_metrics import average_precision, batch_mean

MANY = 1 << 22


class WithNegatives(Links):
    """Scores a random destination beside each true one, from the same state."""

    def __init__(self, options: Links.Options, first: int) -> None:
        super().__init__(options)
        self.first, self.random = first, np.random.default_rng(0)
        self.names: list[Any] = []
        self.pairs: list[tuple[float, float]] = []
        self.seen: set[Any] = set()

    def _scores(self, graph: Any, good: Sequence[Any], known: Sequence[Any], context: Any) -> list[Record]:
        out = super()._scores(graph, good, known, context)
        for _, _, name in ((*ends, record.value.destination) for record, *ends in good):
            if name not in self.seen:
                self.seen.add(name)
                self.names.append(name)
        if not good or good[0][0].origin.offset < self.first:
            return out
        picks = self.random.integers(0, len(self.names), len(good))
        rows = torch.tensor([[graph.rows.get(self.names[pick], NOBODY)] for pick in picks])
        # As nodes that nobody has met: numbers that are given to none.
        graph.state["number"][NOBODY] = (1 << 31) - 1
        if "id" in graph.state["held"]:
            graph.state["held"]["id"][NOBODY] = -2
        source = torch.tensor([row for _, row, _ in good])
        time_ns = torch.tensor([record.time_ns for record, _, _ in good])
        false = self.model.score(graph.state, source, rows, time_ns)[:, 0].tolist()
        graph.state["number"][NOBODY] = -1
        self.pairs += [(float(o.value.scores[0]), f) for o, f in zip(out, false, strict=True)]
        return out


def table(rows: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(flush=True)


def stream(nodes: int, count: int) -> list[Record]:
    random = np.random.default_rng(0)
    picks = ((random.pareto(0.6, (count, 2)) + 1) * 3).astype(np.uint64) * np.uint64(2_654_435_761) % np.uint64(nodes)
    return [
        Record("g", (1_700_000_000 + i) * 10**9, Interaction(f"user {a}", f"page {b}", None), Origin("in", 0, i))
        for i, (a, b) in enumerate(picks.tolist())
    ]


def recording(path: Path) -> list[Record]:
    data = read_graph(path)
    columns = zip(data.source.tolist(), data.destination.tolist(), data.time_ns.tolist(), strict=True)
    return [
        Record("g", at, Interaction(data.ids[a], data.ids[b], None), Origin("in", 0, i))
        for i, (a, b, at) in enumerate(columns)
    ]


def measured(
    name: str,
    model: str,
    weights: Path | None,
    records: list[Record],
    most: int,
    store: Path | None,
    batch: int,
    ap: bool,
    learn: bool,
) -> dict[str, Any]:
    given = {
        "model": model,
        "weights": weights,
        "freshness": "batch",
        "batch": batch,
        "max_nodes": most,
        "evict": {"store": None if store is None else str(store)},
        "learn": {"every": batch} if learn else None,
    }
    first = int(0.85 * len(records)) if ap else len(records)
    operator, context = WithNegatives(Links.Options.model_validate(given), first), RecordingContext()
    operator.process(records[:batch], context)
    scores = hashlib.sha256()
    cpu, wall = time.process_time(), time.perf_counter()
    for at in range(batch, len(records), 500):
        for out in operator.process(records[at : at + 500], context):
            scores.update(out.value.scores)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    graph = operator._graphs["g"]
    held = [*_leaves(graph.state)]
    away = graph.residents.away if graph.residents is not None else None
    row = {
        "model": model,
        "nodes in memory": name,
        "interactions/s": f"{len(records) / cpu:,.0f}",
        "wall s": f"{wall:.1f}",
        "evicted": context.counts["evicted"] + context.counts["forgotten"],
        "reloaded": context.counts["reloaded"],
        "state MB": f"{sum(leaf.numel() * leaf.element_size() for leaf in held) / 1e6:.1f}",
        "stored MB": "" if away is None else f"{away.stored_bytes / 1e6:.1f}",
        "away": "" if away is None else len(away),
        "scores": scores.hexdigest()[:8],
        "cpu": cpu,
    }
    if ap:
        true, false = np.array(operator.pairs).T
        row["AP"] = f"{100 * batch_mean(average_precision, true, false, batch):.2f}"
    return row


def _leaves(state: dict[str, Any]) -> Any:
    for leaf in state.values():
        if isinstance(leaf, dict):
            yield from _leaves(leaf)
        else:
            yield leaf


def compare(
    model: str, weights: Path | None, records: list[Record], batch: int, ap: bool, fraction: float, learn: bool
) -> list[dict[str, Any]]:
    nodes = len({node for record in records for node in (record.value.source, record.value.destination)})
    most = max(int(fraction * nodes), (4 if learn else 2) * batch + 2)
    rows = []
    for name, limit, kept in (
        (f"all {nodes:,}", MANY, True),
        (f"{most:,}, store", most, True),
        (f"{most:,}, none", most, False),
    ):
        folder = Path(tempfile.mkdtemp())
        rows.append(measured(name, model, weights, records, limit, folder if kept else None, batch, ap, learn))
        shutil.rmtree(folder)
    for row in rows:
        moved = row["evicted"] + row["reloaded"]
        more = row["cpu"] - rows[0]["cpu"]
        row["us a move"] = f"{more / moved * 1e6:.0f}" if moved else ""
    for row in rows:
        del row["cpu"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=20_000)
    parser.add_argument("--interactions", type=int, default=60_000)
    parser.add_argument("--fraction", type=float, default=0.1, help="of the nodes that are in memory")
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--wikipedia", type=Path)
    parser.add_argument("--first", type=int, help="only so many interactions of wikipedia")
    parser.add_argument("--nat", type=Path)
    parser.add_argument("--learn", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "nat"
        config = NATConfig()
        save_weights(NAT(config), weights, Card(model="nat", task="graph", config=vars(config).copy()))
        records = stream(given.nodes, given.interactions)
        for model, trained in (*((("recency", None),) if not given.learn else ()), ("nat", weights)):
            print(f"stream: {model}, {len(records):,} interactions, batch {given.batch}")
            table(compare(model, trained, records, given.batch, False, given.fraction, given.learn))
    if given.wikipedia is not None:
        records = recording(given.wikipedia)[: given.first]
        for model, trained in (
            *((("recency", None),) if not given.learn else ()),
            *((("nat", given.nat),) if given.nat else ()),
        ):
            print(f"wikipedia: {model}, {len(records):,} interactions, batch {given.batch}")
            table(compare(model, trained, records, given.batch, True, given.fraction, given.learn))


if __name__ == "__main__":
    main()
