"""Learning on the stream of one graph: predict, score, learn, with the frozen weights beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from stepstream.models.dyngraph.base import GraphModel, GraphState
from stepstream.models.dyngraph.excerpts import Opened
from stepstream.models.dyngraph.nat import NAT
from stepstream.models.dyngraph.nat_caches import slots
from stepstream.models.dyngraph.online import Batch, Fill, OnlineLearner, Part
from stepstream.operators import base
from stepstream.operators.base import Context
from stepstream.operators.link_guard import Guard, Verdict, link_losses, reciprocal_ranks
from stepstream.operators.link_states import KeptStates, LearnedStates

__all__ = ["GraphLearning", "LearnOptions"]

_MET = 32
"""How many of the destinations that a source met last are drawn from, as many as NAT's cache can hold."""


_RANKED_EVERY = 16
"""One interaction in so many is ranked for the guard."""

_RANKED_ALL, _RANKED_AMONG = 1024, 256
"""Of more destinations than the first, an interaction is ranked among those that its source met last and so many that
stand for all others. (64 could not tell an MRR of .745 from one of .751: each stood for 15.)"""


class Drawn(NamedTuple):
    """Negatives int64 [B, K], and how often such a draw has each in expectation float32 [B, K], 0: to be left out."""

    destination: Tensor
    expected: Tensor


class LearnOptions(base.Options):
    """How a graph's weights learn on. `guard`: interactions over which they are compared with the frozen ones, in whole
    windows of `every`. `margin`: the share by which they must be better to be heard.
    """

    learning_rate: float = Field(1e-4, gt=0, le=1, allow_inf_nan=False)
    negatives: int = Field(4, ge=1, le=100, description="destinations met so far that an interaction is told from")
    historical: int = Field(2, ge=0, le=100, description="and of those that its source met; NAT's only")
    every: int = Field(200, ge=1, le=100_000, description="interactions of a graph behind which it learns")
    guard: int = Field(2000, ge=1, le=10_000_000)
    margin: float = Field(0.01, ge=0, lt=1, allow_inf_nan=False)
    seed: int = Field(0, ge=0, lt=1 << 31)

    @model_validator(mode="after")
    def _fits(self) -> LearnOptions:
        if self.guard < self.every:
            raise ValueError(f"guard: {self.guard} interactions are less than one window of every ({self.every})")
        return self


class GraphLearning:
    """The weights that one graph teaches, their state of it, and the guard that compares them with the frozen ones.

    Two graphs never learn into each other's weights: what a key's outputs are depends on its own records alone.
    `observe` comes before interactions are taken in, `settle` after; windows of `every` interactions are counted in the
    order of the log, and a window's end must be an end of what is observed at once, so that nothing here depends on how
    the stream is cut into calls. Negatives are decided by seed and number of the interaction alone, out of the
    destinations met up to then, and out of those that the source itself met last: without these, the order among them
    is unlearned. `name` is of the weights: the frozen ones' hash, "+", and how many steps this graph has
    learned in all; with the key it names one set of weights.

    `nodes`: how many there is room for, or where the states are if nodes leave memory. Everything here names nodes by
    their numbers then, `destinations` too, and only a batch comes with rows. Nobody who is `staying` may leave: it is
    of a window that is not in the state yet that learning goes through. With a node leaves what its source met.
    """

    def __init__(self, options: LearnOptions, model: GraphModel, weights: str, nodes: int | LearnedStates) -> None:
        self._options, self._frozen, self._weights = options, model, weights
        kept = nodes if isinstance(nodes, int) else None
        self._learner = OnlineLearner(model, kept, options.learning_rate, options.seed)
        self._states: LearnedStates = KeptStates(model, nodes) if isinstance(nodes, int) else nodes
        self._served = self._states.served(self._learner.model)
        self.guard = Guard(-(-options.guard // options.every), options.margin)
        self._seen = 0
        self._window: list[tuple[Batch, Drawn]] = []
        self._met: dict[int, list[int]] = {}
        # The other models' loss takes no weights.
        self._historical = options.historical if isinstance(model, NAT) else 0

    @property
    def model(self) -> GraphModel:
        """With the learned weights, for `state`."""
        return self._served

    def state(self, frozen: GraphState) -> GraphState:
        """The learned weights' state."""
        return self._states.learned(frozen)

    @property
    def name(self) -> str:
        """Of the learned weights."""
        return f"{self._weights}+{self._learner.steps}"

    def grow(self, nodes: int) -> None:
        """Makes room for more nodes."""
        self._states.grow(nodes)
        self._learner.grow(nodes)

    # ---- the stream

    def observe(self, frozen: GraphState, batch: Batch, destinations: Sequence[int], context: Context) -> None:
        """Both models foretell interactions that neither has taken in; then the learned state does."""
        time_ns, features = batch[2:]
        source, destination = (self._states.numbers(frozen, rows) for rows in batch[:2])
        asked = self._asked_of(source, destination, destinations)
        drawn = self._drawn(source, destination, destinations)
        candidates = torch.cat((destination[:, None], drawn.destination), 1)
        ranked = torch.tensor([node for nodes, _ in asked for node in nodes], dtype=torch.int64)
        opened = self._states.open(frozen, torch.cat((source, candidates.reshape(-1), ranked)))
        self._rank(opened, source, time_ns, asked, context)
        # As in `link_loss`: what is drawn rarely stands for many, so that it is the choice among all that is judged.
        stands_for = torch.cat((torch.zeros(len(source), 1), -drawn.expected.log()), 1)
        stands_for = stands_for.masked_fill(stands_for == math.inf, -math.inf)
        lost = [link_losses((said + stands_for).numpy()) for said in self._say(opened, source, candidates, time_ns)]
        self.guard.add(*lost)
        for name, losses in zip(("frozen", "learned"), lost, strict=True):
            # Counters are whole numbers: millionths, over "interactions" the mean loss.
            total = float(losses.sum())
            context.count(f"loss_{name}_millionths", round(1e6 * total) if np.isfinite(total) else 0)
        self.model.update(self.state(frozen), *batch)
        self._seen += len(source)
        self._window.append(((source, destination, time_ns, features), drawn))

    def _say(
        self, opened: tuple[Opened, Opened], source: Tensor, candidates: Tensor, time_ns: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What both models say of links, frozen and learned."""
        frozen, learned = (
            model.score(part.state, part.rows(source), part.rows(candidates), time_ns)
            for model, part in zip((self._frozen, self._learner.model), opened, strict=True)
        )
        return frozen, learned

    def _asked_of(
        self, source: Tensor, destination: Tensor, known: Sequence[int]
    ) -> list[tuple[list[int], list[float]]]:
        """For each interaction that is ranked, whom it is ranked among: see `_asked`."""
        first = -self._seen % _RANKED_EVERY
        asked: list[tuple[list[int], list[float]]] = []
        met: dict[int, list[int]] = {}
        for i, (mine, true) in enumerate(zip(source.tolist(), destination.tolist(), strict=True)):
            before = met.get(mine, self._met.get(mine, []))
            met[mine] = _met_after(before, true)
            if i % _RANKED_EVERY == first:
                asked.append(self._asked(self._seen + i, true, before, known))
        return asked

    def _rank(
        self,
        opened: tuple[Opened, Opened],
        source: Tensor,
        time_ns: Tensor,
        asked: Sequence[tuple[list[int], list[float]]],
        context: Context,
    ) -> None:
        """Tells the guard how both models rank what came, among all destinations, estimated from a few.

        Those that the source met last stand for themselves, others that are drawn for all that it did not meet.
        """
        if not asked:
            return
        some = slice(-self._seen % _RANKED_EVERY, None, _RANKED_EVERY)
        width = max(len(candidates) for candidates, _ in asked)
        candidates = torch.tensor([row + row[:1] * (width - len(row)) for row, _ in asked])
        stands_for = np.array([weights + [0.0] * (width - 1 - len(weights)) for _, weights in asked])
        said = self._say(opened, source[some], candidates, time_ns[some])
        ranks = [reciprocal_ranks(scores.numpy(), stands_for) for scores in said]
        self.guard.rank(*ranks)
        context.count("ranked", len(asked))
        for name, found in zip(("frozen", "learned"), ranks, strict=True):
            context.count(f"reciprocal_rank_{name}_millionths", round(1e6 * float(found.sum())))

    def _asked(
        self, number: int, true: int, before: Sequence[int], known: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        """Whom interaction `number` is ranked among, the true one first, and how many each of the others stands for.

        Distinct ones, decided by seed and number alone: all that are known, or those that the source met last and some.
        """
        if len(known) <= _RANKED_ALL:
            others = [node for node in known if node != true]
            return [true, *others], [1.0] * len(others)
        near = [node for node in before if node != true]
        numbers = torch.arange(number * _RANKED_AMONG, (number + 1) * _RANKED_AMONG)
        places = slots(numbers, 1 << 53, self._options.seed + 1).tolist()
        but = {true, *near}
        drawn = [node for node in dict.fromkeys(known[place % len(known)] for place in places) if node not in but]
        each = max(0, len(known) - len(near) - 1) / len(drawn) if drawn else 0.0
        return [true, *near, *drawn], [1.0] * len(near) + [each] * len(drawn)

    def settle(self, frozen: GraphState, destinations: int, context: Context) -> None:
        """At the end of a window: who is heard from now on, and a step of learning. `frozen`: the state with it."""
        if self._seen % self._options.every:
            return
        window, self._window = self._window, []
        verdict = self.guard.close()
        self._tell(verdict, context)
        if verdict in ("restart", "falls back and restart"):
            self._restart(frozen, context)
        elif destinations > 1:
            self._learn(window, frozen, context)

    def _learn(self, window: Sequence[tuple[Batch, Drawn]], frozen: GraphState, context: Context) -> None:
        batch, drawn = _joined(window)
        if self._learner.step(batch, drawn.destination, drawn.expected, self._states.opens(frozen)):
            context.count("learned_steps")
            return
        context.count("not_finite")
        self._tell(self.guard.forget(), context)
        self._restart(frozen, context)

    def _restart(self, frozen: GraphState, context: Context) -> None:
        context.count("restarted")
        self._learner.restart(self._frozen, self._states.begin(frozen))

    def _tell(self, verdict: Verdict, context: Context) -> None:
        if verdict.startswith("falls back"):
            context.count("fell_back")
        elif verdict == "takes over":
            context.count("took_over")

    def _drawn(self, source: Tensor, destination: Tensor, known: Sequence[int]) -> Drawn:
        """`negatives` of all destinations known (whoever draws the true one takes the next), then historical ones."""
        count, historical, rows = self._options.negatives, self._historical, len(destination)
        each = count + historical
        numbers = torch.arange(self._seen * each, (self._seen + rows) * each)
        places = slots(numbers, 1 << 53, self._options.seed).view(rows, each).tolist()
        drawn, expected = [], []
        for mine, true, picks in zip(source.tolist(), destination.tolist(), places, strict=True):
            met = self._met.get(mine, [])
            random = [known[pick % len(known)] for pick in picks[:count]]
            random = [
                known[(p + 1) % len(known)] if node == true else node for node, p in zip(random, picks, strict=False)
            ]
            before = [met[pick % len(met)] if met else true for pick in picks[count:]]
            drawn.append(random + before)
            often = [count / len(known)] * count + [historical / max(1, len(met))] * historical
            expected.append([0.0 if node == true else o for node, o in zip(drawn[-1], often, strict=True)])
            self._met[mine] = _met_after(met, true)
        return Drawn(torch.tensor(drawn), torch.tensor(expected))

    # ---- nodes that leave memory

    def staying(self) -> Iterator[int]:
        """The numbers of nodes that must be there, repeats included."""
        waiting = self._learner.waiting
        for batch in (*(batch for batch, _ in self._window), *(() if waiting is None else (waiting,))):
            for numbers in batch[:2]:
                yield from numbers.tolist()

    def take_out(self, number: int) -> bytes:
        """What is known of a node that leaves, and is not in the state."""
        return np.array(self._met.pop(number, ()), dtype=np.int64).tobytes()

    def put_back(self, number: int, kept: bytes) -> None:
        """The inverse of `take_out`."""
        if kept:
            self._met[number] = np.frombuffer(kept, dtype=np.int64).tolist()

    # ---- what is kept

    def snapshot(self, part: Part) -> dict[str, Any]:
        """All of it, copied; `part` of a state."""
        window: dict[str, Any] = {}
        if self._window:
            batch, drawn = _joined(self._window, in_order=False)
            columns = zip(("source", "destination", "time_ns", "features"), batch, strict=True)
            window = {name: column for name, column in columns if column is not None}
            window |= {"negatives": drawn.destination, "expected": drawn.expected}
        return {
            "frozen": self._weights,
            "seen": self._seen,
            "guard": self.guard.snapshot(),
            "learner": self._learner.snapshot(part),
            "state": self._states.snapshot(part),
            "window": window,
            "met": torch.tensor([[mine, node] for mine, met in self._met.items() for node in met]).view(-1, 2),
        }

    def restore(self, saved: Mapping[str, Any], fill: Fill) -> None:
        """The inverse of `snapshot`, into one that has seen nothing. Raises ValueError for what does not fit."""
        if saved["frozen"] != self._weights:
            raise ValueError(f"what was learned is from the weights {saved['frozen']}, not from {self._weights}")
        self._seen = int(saved["seen"])
        self.guard.restore(saved["guard"])
        self._learner.restore(saved["learner"], fill)
        self._states.restore(saved["state"], fill)
        window = {name: torch.as_tensor(column).clone() for name, column in saved["window"].items()}
        if window:
            batch = window["source"], window["destination"], window["time_ns"], window.get("features")
            self._window = [(batch, Drawn(window["negatives"], window["expected"]))]
        self._met = {}
        for mine, node in torch.as_tensor(saved["met"]).tolist():
            self._met.setdefault(mine, []).append(node)


def _met_after(before: Sequence[int], destination: int) -> list[int]:
    """The destinations that a source met last, the latest at the end."""
    return [*(node for node in before if node != destination), destination][-_MET:]


def _joined(window: Sequence[tuple[Batch, Drawn]], *, in_order: bool = True) -> tuple[Batch, Drawn]:
    """A window as one batch: in time order, as models want it, or as it came."""
    batches, draws = zip(*window, strict=True)
    source, destination, time_ns = (torch.cat([batch[i] for batch in batches]) for i in range(3))
    held = [batch[3] for batch in batches if batch[3] is not None]
    features, drawn = torch.cat(held) if held else None, Drawn(*map(torch.cat, zip(*draws, strict=True)))
    if in_order:
        order = torch.argsort(time_ns, stable=True)
        source, destination, time_ns = source[order], destination[order], time_ns[order]
        drawn = Drawn(drawn.destination[order], drawn.expected[order])
        features = None if features is None else features[order]
    return (source, destination, time_ns, features), drawn
