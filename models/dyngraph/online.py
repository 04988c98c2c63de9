"""Learning that goes on while a model serves: one optimiser step for each window of a graph's interactions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stepstream.models.dyngraph.base import GraphModel, GraphState
from stepstream.models.dyngraph.events import Interactions
from stepstream.models.dyngraph.excerpts import Open, Whole
from stepstream.models.dyngraph.memory import MemoryModel, training_step
from stepstream.models.dyngraph.nat import NAT
from stepstream.models.dyngraph.nat_training import Batch, NATLearner

__all__ = ["Batch", "Fill", "OnlineLearner", "Part", "can_learn", "clone_state", "one_thread"]

Part = Callable[[GraphState], dict[str, Any]]
"""What is saved of a model's state."""
Fill = Callable[[GraphState, Mapping[str, Any]], None]
"""Writes what was saved into a fresh state. Raises ValueError for what does not fit."""

_CLIP = 1.0
_COLUMNS = ("source", "destination", "time_ns")


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch uses one thread: sums of gradients are made in one order, whatever the machine has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def can_learn(model: type) -> bool:
    """Whether a class of models has weights that a stream can teach."""
    return issubclass(model, (NAT, MemoryModel))


def clone_state(state: GraphState) -> GraphState:
    """A copy that shares no memory."""
    return {name: clone_state(leaf) if isinstance(leaf, dict) else leaf.clone() for name, leaf in state.items()}


class OnlineLearner:
    """A copy of a model's weights that learns from one graph, and nobody else's.

    `step` is given the graph's interactions in windows, each once and in the order of the log, and makes one Adam step
    of each: as in training, with gradient through the update that the window before it led to. It keeps a state of its
    own for that, made window by window, so that what is learned does not depend on how fresh the served scores are. A
    step is a function of weights, moments, state, window, negatives, seed and the number of the step, to the bit on one
    thread of the same kind of processor: dropout draws from a generator that seed and number decide.

    `nodes`: how many it has room for; None where nodes leave memory: its state is kept with theirs, each step is told
    how to open some of it, and nodes are named by number.

    A step whose loss or gradient is not finite changes no weights and says so; `restart` makes all new.
    """

    def __init__(self, model: GraphModel, nodes: int | None, learning_rate: float, seed: int = 0) -> None:
        assert isinstance(model, (NAT, MemoryModel))
        self.model: NAT | MemoryModel = copy.deepcopy(model)
        self.model.eval().requires_grad_(True)
        self.steps = 0
        self._learning_rate, self._seed = learning_rate, seed
        self._begin({} if nodes is None else model.initial_state(nodes))

    def _begin(self, state: GraphState) -> None:
        self._state = state
        self._optimizer = torch.optim.Adam(self.model.parameters(), lr=self._learning_rate)
        self._through_update = NATLearner(self.model) if isinstance(self.model, NAT) else None

    def restart(self, model: GraphModel, state: GraphState) -> None:
        """Learns anew from another model's weights and its state, which is copied. The number of steps goes on."""
        assert isinstance(model, nn.Module)
        self.model.load_state_dict(model.state_dict())
        self._begin(clone_state(state))

    def grow(self, nodes: int) -> None:
        """Makes room for more nodes."""
        self._state = self.model.grow(self._state, nodes)

    @property
    def waiting(self) -> Batch | None:
        """The window that was learned from last, where it is not in the state yet."""
        return None if self._through_update is None else self._through_update.waiting

    def step(self, batch: Batch, negatives: Tensor, expected: Tensor, opens: Open | None = None) -> bool:
        """Learns from interactions in time order against destinations int64 [B, K] that are not theirs, with the loss
        that the model is trained with: NAT's is that of a choice among all, for which `expected` [B, K] says how often
        a draw has each (see `link_loss`). `opens`: nodes of the state, where it is not kept here.

        False if the loss or its gradient was not finite: then `restart` must follow.
        """
        waiting = self.waiting
        opened = Whole(self._state) if opens is None else opens(torch.cat(_ends(batch, negatives, waiting)))
        mine = _renamed(batch, opened.rows)
        if self._through_update is not None and waiting is not None:
            self._through_update.waiting = _renamed(waiting, opened.rows)
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            # torch.manual_seed would move the generators of accelerators too.
            torch.default_generator.manual_seed(self._seed * 1_000_003 + self.steps)
            self.model.train()
            try:
                loss = self._loss(opened.state, mine, opened.rows(negatives), expected)
                self._optimizer.zero_grad(set_to_none=True)
                loss.backward()
            finally:
                self.model.eval()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
            if not (math.isfinite(float(loss.detach())) and math.isfinite(float(norm))):
                return False
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        if self._through_update is not None:
            self._through_update.take(opened.state, mine)
            self._through_update.waiting = batch
        else:
            self.model.update(opened.state, *mine)
        opened.close()
        return True

    def _loss(self, state: GraphState, batch: Batch, negatives: Tensor, expected: Tensor) -> Tensor:
        if self._through_update is not None:
            return self._through_update.loss(state, batch, negatives, expected)
        assert isinstance(self.model, MemoryModel)
        return training_step(self.model, state, Interactions(*batch), negatives)

    # ---- what is kept

    def snapshot(self, part: Part) -> dict[str, Any]:
        """Weights, moments, state and what waits, copied; `part` of the state."""
        moments: dict[str, Any] = {}
        for name, parameter in self.model.named_parameters():
            held = self._optimizer.state.get(parameter, {})
            moments[name] = {what: value.clone() for what, value in held.items()}
        columns = () if self.waiting is None else self.waiting
        return {
            "steps": self.steps,
            "weights": {name: leaf.clone() for name, leaf in self.model.state_dict().items()},
            "moments": moments,
            "state": part(self._state),
            "waiting": {
                name: column.clone()
                for name, column in zip((*_COLUMNS, "features"), columns, strict=False)
                if column is not None
            },
        }

    def restore(self, saved: Mapping[str, Any], fill: Fill) -> None:
        """The inverse of `snapshot`, into a learner that has not learned. Raises ValueError for another model's."""
        parameters = dict(self.model.named_parameters())
        if saved["weights"].keys() != self.model.state_dict().keys() or saved["moments"].keys() != parameters.keys():
            raise ValueError("the learned weights are of another model")
        for name, held in saved["moments"].items():
            if any(what != "step" and value.shape != parameters[name].shape for what, value in held.items()):
                raise ValueError(f"moments of {name}: {list(parameters[name].shape)} was expected")
        try:
            self.model.load_state_dict(dict(saved["weights"]))
        except RuntimeError as error:
            raise ValueError(f"learned weights: {str(error).splitlines()[-1].strip()}") from None
        fill(self._state, saved["state"])
        for name, held in saved["moments"].items():
            if held:
                self._optimizer.state[parameters[name]] = {what: value.clone() for what, value in held.items()}
        self.steps = int(saved["steps"])
        waiting = saved["waiting"]
        if waiting and self._through_update is not None:
            source, destination, time_ns = (waiting[name].clone() for name in _COLUMNS)
            features = waiting["features"].clone() if "features" in waiting else None
            self._through_update.waiting = (source, destination, time_ns, features)


def _ends(batch: Batch, negatives: Tensor, waiting: Batch | None) -> list[Tensor]:
    return [*batch[:2], negatives.reshape(-1), *(() if waiting is None else waiting[:2])]


def _renamed(batch: Batch, rows: Callable[[Tensor], Tensor]) -> Batch:
    source, destination, time_ns, features = batch
    return rows(source), rows(destination), time_ns, features
