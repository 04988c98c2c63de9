"""Whether weights that go on learning foretell the test part better than frozen ones, and what that costs.

uv run python -m tests.bench.graph_online RECORDING WEIGHTS [FOLDER] [--rates 1e-4,1e-3] [--every 200] [--mrr 10]

RECORDING: an edge list; WEIGHTS: made by `stepstream train` on its first 70 %. The weights learn on the validation and
the test part, and are scored on the test part, refreshed every 200 interactions, by DyGLib's negatives; MRR of every
tenth interaction, among all destinations. One stream tells all: "frozen"; "online", the learning weights without a
guard; "guarded", whichever the guard hears. "cost": CPU time of the operator with learning over that without. One
thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.bench.common import report
from tests.support import RecordingContext

from stepstream.connectors.records import Interaction, Origin, Record
from stepstream.models.dyngraph.loading import load_graph_model
from stepstream.operators.link_guard import Guard, Verdict
from stepstream.operators.link_learning import GraphLearning, LearnOptions
from stepstream.operators.links import Links
from stepstream.pipeline.training.graph_data import GraphData, GraphSplit, read_graph
from stepstream.pipeline.training.graph_metrics import reciprocal_ranks
from stepstream.pipeline.training.graph_protocols import BATCH, Pairs, _summary

VOICES = ("frozen", "online", "guarded")


class Restarting(Guard):
    """Has learning begin anew as soon as it is worse by the margin, where `Guard` lets it go on unheard."""

    def close(self) -> Verdict:
        served, verdict = self.serves, super().close()
        frozen, learning = self.losses
        if learning - frozen > self._margin * frozen:
            self.serves = served
            return self.forget()
        return verdict


def _model(weights: str) -> str:
    return str(json.loads((Path(weights) / "card.json").read_text())["model"])


class Stream:
    """A recording, what is asked at each of its test interactions, and who answers."""

    def __init__(self, path: Path, weights: str, mrr_every: int) -> None:
        self.data: GraphData = read_graph(path)
        self.split = GraphSplit.of(self.data)
        self.loaded = load_graph_model(_model(weights), weights)
        self.columns = [torch.from_numpy(c) for c in (self.data.source, self.data.destination, self.data.time_ns)]
        self.features = None if self.data.features is None else torch.from_numpy(self.data.features)
        self.pairs = [p for p in Pairs.of(self.data, self.split, "test") if not p.name.startswith("new_")]
        rows = self.rows = np.flatnonzero(self.split.test)
        at = np.concatenate([rows, *(some.rows for some in self.pairs)])
        self.order = np.argsort(at, kind="stable")
        source = np.concatenate([self.data.source[rows], *(some.source for some in self.pairs)])[self.order]
        target = np.concatenate([self.data.destination[rows], *(some.destination for some in self.pairs)])[self.order]
        times = self.data.time_ns[at[self.order]]
        self.asked = [torch.from_numpy(some) for some in (source, target[:, None], times)]
        self.ends = np.searchsorted(at[self.order], np.arange(len(self.data) + 1)).tolist()
        self.candidates = torch.from_numpy(self.data.destinations)
        self.true = np.searchsorted(self.data.destinations, self.data.destination)
        self.mrr_every = mrr_every

    def batch(self, rows: Any) -> Any:
        return (*(c[rows] for c in self.columns), None if self.features is None else self.features[rows])

    def run(self, options: LearnOptions, guard: Guard | None) -> dict[str, Any]:
        model = self.loaded.model
        state, context = model.initial_state(self.data.nodes), RecordingContext()
        learning = GraphLearning(options, model, "frozen", self.data.nodes)
        if guard is not None:
            learning.guard = guard
        late = np.flatnonzero(self.split.validation)
        late = late[len(late) % BATCH :]
        early = np.flatnonzero(self.split.train)
        early = np.concatenate([early, np.arange(early[-1] + 1, late[0])])
        for first in range(0, len(early), BATCH):
            model.update(state, *self.batch(torch.from_numpy(early[first : first + BATCH])))
        learning._restart(state, context)
        known = dict.fromkeys(self.data.destination[early].tolist())
        scores = {voice: np.empty(len(self.order), dtype=np.float32) for voice in VOICES}
        ranks: dict[str, list[Any]] = {voice: [] for voice in VOICES}
        heard, shown = [], []
        begin = int(self.rows[0])
        for first in range(int(late[0]), int(self.rows[-1]) + 1, BATCH):
            rows = slice(first, min(first + BATCH, int(self.rows[-1]) + 1))
            if first >= begin:
                heard.append(learning.guard.serves)
                self.answer(rows, (model, state), (learning.model, learning.state(state)), scores, ranks, heard[-1])
            batch = self.batch(rows)
            known |= dict.fromkeys(batch[1].tolist())
            learning.observe(state, batch, list(known), context)
            model.update(state, *batch)
            learning.settle(state, len(known), context)
            shown.append(learning.guard.losses)
        found: dict[str, Any] = {"served_learned": round(float(np.mean(heard)), 3), **context.counts}
        found["losses_at_the_end"] = [round(loss, 4) for loss in shown[-1]]
        for voice in VOICES:
            back = np.empty_like(scores[voice])
            back[self.order] = scores[voice]
            metrics = _summary(back, self.rows, self.pairs, BATCH)
            if ranks[voice]:
                metrics["mrr"] = float(np.mean(np.concatenate(ranks[voice])))
            found[voice] = {name: round(value, 5) for name, value in metrics.items() if not name.startswith("auc")}
        return found

    def answer(self, rows: slice, frozen: Any, learned: Any, scores: Any, ranks: Any, serves: bool) -> None:
        mine = slice(self.ends[rows.start], self.ends[rows.stop])
        some = np.arange(rows.start, rows.stop)[:: self.mrr_every] if self.mrr_every else []
        for voice, (model, state) in zip(VOICES, (frozen, learned, learned if serves else frozen), strict=True):
            if voice == "guarded":
                same = "online" if serves else "frozen"
                scores[voice][mine] = scores[same][mine]
                ranks[voice] += ranks[same][-1:]
                continue
            scores[voice][mine] = model.score(state, *(part[mine] for part in self.asked))[:, 0].numpy()
            if len(some):
                asked = self.columns[0][some], self.candidates.expand(len(some), -1), self.columns[2][some]
                ranks[voice].append(reciprocal_ranks(model.score(state, *asked).numpy(), self.true[some]))


def cost(stream: Stream, weights: str, options: LearnOptions) -> dict[str, Any]:
    """Interactions a second of CPU time with and without learning, behind 4,000 that warm both up."""
    data, found = stream.data, {}
    records = [
        Record(
            "g",
            int(data.time_ns[i]),
            Interaction(
                int(data.source[i]), int(data.destination[i]), None if data.features is None else data.features[i]
            ),
            Origin("in", 0, i),
        )
        for i in range(6000)
    ]
    for freshness, count in (("batch", 2000), ("per_event", 400)):
        rates = {}
        for learn in (None, options):
            chosen = {"model": stream.loaded.name, "weights": weights, "freshness": freshness, "learn": learn}
            operator = Links(Links.Options.model_validate(chosen))
            warm = Links(Links.Options.model_validate({**chosen, "freshness": "batch"}))
            warm.process(records[:4000], RecordingContext())
            operator.restore("g", warm.snapshot("g"))
            began = time.process_time()
            operator.process(records[4000 : 4000 + count], RecordingContext())
            rates["frozen" if learn is None else "learning"] = round(count / (time.process_time() - began))
        found[freshness] = {**rates, "times": round(rates["frozen"] / rates["learning"], 1)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recording", type=Path)
    parser.add_argument("weights")
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--rates", default="1e-4,1e-3")
    parser.add_argument("--every", type=int, default=200)
    parser.add_argument("--guard", type=int, default=2000)
    parser.add_argument("--negatives", type=int, default=1)
    parser.add_argument("--mrr", type=int, default=10, help="the MRR of every so manieth interaction; 0: none")
    parser.add_argument("--restarting", action="store_true", help="a guard that has learning begin anew, too")
    parser.add_argument("--only-cost", action="store_true")
    parser.add_argument("--no-cost", action="store_true")
    given = parser.parse_args()
    sys.argv[1:] = [given.folder] if given.folder else []
    torch.set_num_threads(1)
    with torch.no_grad():
        stream = Stream(given.recording, given.weights, given.mrr)
        result: dict[str, Any] = {}
        for rate in () if given.only_cost else given.rates.split(","):
            options = LearnOptions(
                learning_rate=float(rate), every=given.every, guard=given.guard, negatives=given.negatives
            )
            restarting = Restarting(-(-options.guard // options.every), options.margin)
            result[rate] = {}
            for name, guard in (("guard", None), *((("restarting", restarting),) if given.restarting else ())):
                began = time.monotonic()
                found = result[rate][name] = stream.run(options, guard)
                print(rate, name, found, round(time.monotonic() - began), "s", file=sys.stderr, flush=True)
        if not given.no_cost:
            result["cost"] = cost(stream, given.weights, LearnOptions(every=given.every, guard=given.guard))
    report("graph_online", result)


if __name__ == "__main__":
    main()
