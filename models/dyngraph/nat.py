"""NAT: links from the neighbourhoods that two nodes share, kept in caches of constant size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from stepstream.models.dyngraph import nat_kernels
from stepstream.models.dyngraph.base import GraphModel, GraphState
from stepstream.models.dyngraph.nat_caches import EMPTY, join, slots, waves, winners

__all__ = ["NAT", "NATConfig", "link_loss"]

_NS = 1e9
_DAY_S = 86_400.0
_LONG = math.log(30 * _DAY_S)
_ORDER = ("id", "own", "own_ns", "events", *(f"{name}{hop}" for hop in (1, 2) for name in ("id", "ns", "met", "edge")))


@dataclass(frozen=True)
class NATConfig:
    """`node`: width of a node's own representation; `edge`: of one of a neighbour. `first`, `second`: slots for its
    neighbours and for theirs. `features`: width of an interaction's features. `seed`: of the hash.
    """

    node: int = 32
    edge: int = 8
    first: int = 32
    second: int = 16
    hidden: int = 64
    decays: int = 4
    features: int = 0
    seed: int = 0


class NAT(nn.Module, GraphModel):
    """Neighborhood-aware temporal network (Luo and Li, LoG 2022, arXiv 2209.01084), with exact ids and times.

    A node keeps a representation of itself (0 hops), a cache of its latest neighbours (1 hop) and one of theirs (2
    hops), each entry with a representation of what happened along it. `score` joins the caches of two nodes: for every
    node in one of them, what both sides know of it (the joint structural features of section 4.2, where "in no cache"
    is knowledge too), then attention over these nodes. `update` takes interactions in time order, each seeing all
    before it: events without a common node go together, which is the same as one by one, to the rounding of batched
    float32 arithmetic (1e-5, tested). Beside the paper's representations an entry keeps its time and how often it was
    met, and both enter the joint features: differences of int64 nanoseconds, so that they are exact.

    State: `bytes_per_node` for every node; everything is in it.
    """

    identity: ClassVar[str | None] = "id"

    def __init__(self, config: NATConfig) -> None:
        super().__init__()
        self.config = c = config
        times = 1 + c.decays
        self.log_decay_s = nn.Parameter(torch.linspace(math.log(60), _LONG, c.decays))
        self.own = nn.GRUCell(c.node + times + 1 + c.features, c.node)
        self.along = nn.GRUCell(c.node + times + c.features, c.edge)
        side = 1 + 2 * (1 + c.edge + times + 1)
        self.joint = nn.Sequential(nn.Linear(2 * side, c.hidden), nn.ReLU(), nn.Linear(c.hidden, c.hidden), nn.ReLU())
        self.attention = nn.Linear(c.hidden, 1)
        pair = 2 * c.hidden + 2 * (c.node + times)
        self._prepared: tuple[Any, tuple[Any, ...]] | None = None
        self.out = nn.Sequential(nn.Linear(pair, c.hidden), nn.ReLU(), nn.Linear(c.hidden, 1))

    @classmethod
    def from_card(cls, card: dict[str, Any]) -> NAT:
        """The model whose `NATConfig` is the card's `config`."""
        return cls(NATConfig(**card["config"]))

    # ---- state

    def initial_state(self, nodes: int, first: int = 0) -> GraphState:
        """Of a graph in which nothing has happened, whose nodes have the ids from `first` on.

        "id" is what a node is called in the caches of others: a row that is given to another node needs another id.
        """
        c = self.config

        def integers(*shape: int, value: int = 0) -> Tensor:
            return torch.full((nodes, *shape), value, dtype=torch.int64)

        return {
            "id": torch.arange(first, first + nodes),
            "own": torch.zeros(nodes, c.node),
            "own_ns": integers(),
            "events": integers(),
            "id1": integers(c.first, value=EMPTY),
            "ns1": integers(c.first),
            "met1": torch.zeros(nodes, c.first),
            "edge1": torch.zeros(nodes, c.first, c.edge),
            "id2": integers(c.second, value=EMPTY),
            "ns2": integers(c.second),
            "met2": torch.zeros(nodes, c.second),
            "edge2": torch.zeros(nodes, c.second, c.edge),
        }

    def grow(self, state: GraphState, nodes: int) -> GraphState:
        """The same with room for more nodes."""
        held = len(state["own"])
        more = self.initial_state(nodes - held, held)
        return {name: torch.cat([leaf, more[name]]) for name, leaf in state.items()}

    @property
    def bytes_per_node(self) -> int:
        """Of state."""
        return sum(leaf[0].numel() * leaf.element_size() for leaf in self.initial_state(1).values())

    # ---- time

    def _times(self, elapsed_ns: Tensor) -> Tensor:
        """float32 [..., 1 + decays]: how long ago, as a logarithm and as what is left after decays that are learned."""
        elapsed_s = (elapsed_ns.clamp(min=0).double() / _NS).float()
        log = torch.log1p(elapsed_s) / _LONG
        left = torch.exp(-elapsed_s[..., None] * torch.exp(-self.log_decay_s))
        return torch.cat([log[..., None], left], -1)

    # ---- scores

    def score(self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor) -> Tensor:
        """See `GraphModel`; logits."""
        candidates = destination.shape[1]
        source, time_ns = source.repeat_interleave(candidates), time_ns.repeat_interleave(candidates)
        target = destination.reshape(-1)
        pair, places = self._join(state, source, target)
        elapsed = time_ns[pair]
        known = [
            self._known(state, source[pair], places[:, :3], elapsed),
            self._known(state, target[pair], places[:, 3:], elapsed),
        ]
        hidden = self.joint(torch.cat([part for side in known for part in side], -1))
        weight = _softmax(self.attention(hidden)[:, 0], pair, len(source))
        nothing = hidden.new_zeros(len(source), hidden.shape[1])
        pooled = [nothing.index_add(0, pair, weight[:, None] * hidden), nothing.index_add(0, pair, hidden) / 8]
        ends = [*self._node(state, source, time_ns), *self._node(state, target, time_ns)]
        scores: Tensor = self.out(torch.cat([*pooled, *ends], -1))
        return scores.reshape(-1, candidates)

    def _node(self, state: GraphState, node: Tensor, time_ns: Tensor) -> tuple[Tensor, Tensor]:
        seen = (state["events"][node] > 0).float()[:, None]
        return state["own"][node], self._times(time_ns - state["own_ns"][node]) * seen

    def _join(self, state: GraphState, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        tables = (state["id"], state["id1"], state["id2"])
        if source.device.type != "cpu":
            return join(*tables, source, target, self.config.seed)
        ids, first, second = (table.numpy() for table in tables)
        pair, places = nat_kernels.join(ids, first, second, source.numpy(), target.numpy(), self.config.seed)
        return torch.from_numpy(pair), torch.from_numpy(places)

    def _known(self, state: GraphState, node: Tensor, places: Tensor, time_ns: Tensor) -> list[Tensor]:
        """What nodes [M] know of others, whose `places` [M, 3] tell where: whether they are they; of neighbours and
        theirs, all that is kept.
        """
        parts = [places[:, :1].float()]
        for hop in (1, 2):
            found = (places[:, hop, None] >= 0).float()
            at = (node, places[:, hop].clamp(min=0))
            times = self._times(time_ns - state[f"ns{hop}"][at])
            met = torch.log1p(state[f"met{hop}"][at])[:, None]
            parts += [found, state[f"edge{hop}"][at] * found, times * found, met * found]
        return parts

    # ---- updates

    def update(
        self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor, features: Tensor | None = None
    ) -> None:
        """See `GraphModel`. With gradients on, what is written carries them: `score` learns through one update."""
        if features is None:
            features = torch.zeros(len(source), self.config.features, device=source.device)
        if not torch.is_grad_enabled() and source.device.type == "cpu":
            given = [column.contiguous().numpy() for column in (source, destination, time_ns, features)]
            held = tuple(state[name].numpy() for name in _ORDER)
            nat_kernels.take_in(held, self._arrays(), given[0], given[1], given[2], given[3], _LONG, self.config.seed)
            return
        for wave in waves(source, destination):
            self._wave(state, source[wave], destination[wave], time_ns[wave], features[wave])

    def _arrays(self) -> tuple[Any, ...]:
        """The parameters as the kernel takes them, made again when one of them has changed."""
        cells = [p for cell in (self.own, self.along) for p in cell.parameters()]
        # What was made in inference mode has no version, as nothing writes to it.
        parameters = (self.log_decay_s, *cells)
        at = tuple([(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters])  # noqa: SLF001
        if self._prepared is None or self._prepared[0] != at:
            rates = torch.exp(-self.log_decay_s)
            turned = [p.t() if p.dim() == 2 else p for p in cells]
            self._prepared = at, tuple(p.detach().contiguous().numpy().copy() for p in (rates, *turned))
        return self._prepared[1]

    def _wave(self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor, features: Tensor) -> None:
        """Events of which none shares a node with another. Both ends learn of each other as they were before."""
        two = source != destination
        node = torch.cat([source, destination[two]])
        other = torch.cat([destination, source[two]])
        at_ns = torch.cat([time_ns, time_ns[two]])
        features = torch.cat([features, features[two]])
        role = torch.cat([torch.zeros(len(source)), torch.ones(int(two.sum()))])[:, None]
        theirs = state["own"][other]
        own = self._own(state, node, theirs, at_ns, role, features)
        first = self._first(state, node, other, theirs, at_ns, features)
        second = self._second(state, node, other)
        state["own"][node] = own
        state["own_ns"][node] = torch.maximum(state["own_ns"][node], at_ns)
        state["events"][node] += 1
        place, edge, met = first
        state["id1"][node, place] = state["id"][other]
        state["ns1"][node, place] = at_ns
        state["met1"][node, place] = met
        state["edge1"][node, place] = edge
        for name, values in second.items():
            state[name][node] = values

    def _own(
        self, state: GraphState, node: Tensor, theirs: Tensor, at_ns: Tensor, role: Tensor, features: Tensor
    ) -> Tensor:
        seen = (state["events"][node] > 0).float()[:, None]
        times = self._times(at_ns - state["own_ns"][node]) * seen
        return self.own(torch.cat([theirs, times, role, features], 1), state["own"][node])

    def _first(
        self, state: GraphState, node: Tensor, other: Tensor, theirs: Tensor, at_ns: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where the other end goes in the cache of neighbours, its new representation, and how often it was met."""
        ids = state["id"][other]
        place = slots(ids, self.config.first, self.config.seed)
        known = (state["id1"][node, place] == ids).float()
        times = self._times(at_ns - state["ns1"][node, place]) * known[:, None]
        before = state["edge1"][node, place] * known[:, None]
        edge = self.along(torch.cat([theirs, times, features], 1), before)
        return place, edge, state["met1"][node, place] * known + 1

    def _second(self, state: GraphState, node: Tensor, other: Tensor) -> dict[str, Tensor]:
        """The cache of neighbours' neighbours once the other end's neighbours are in it; the latest met go first."""
        size = self.config.second
        ids, ns = state["id1"][other], state["ns1"][other]
        valid = (ids != EMPTY) & (ids != state["id"][node, None])
        chosen = winners(slots(ids, size, self.config.seed), ns, valid, size)
        taken, at = chosen >= 0, chosen.clamp(min=0)
        result: dict[str, Any] = {}
        for name in ("id", "ns", "met", "edge"):
            new, old = state[f"{name}1"][other], state[f"{name}2"][node]
            index = at[..., None].expand(-1, -1, new.shape[-1]) if new.dim() == 3 else at
            mask = taken[..., None] if new.dim() == 3 else taken
            result[f"{name}2"] = torch.where(mask, new.gather(1, index), old)
        return result


def _softmax(logits: Tensor, group: Tensor, groups: int) -> Tensor:
    """Over the entries of each group; float32 [M]."""
    most = logits.new_full((groups,), -math.inf).scatter_reduce(0, group, logits.detach(), "amax")
    weight = torch.exp(logits - most[group])
    return weight / weight.new_zeros(groups).index_add(0, group, weight)[group]


def link_loss(scores: Tensor) -> Tensor:
    """Binary cross-entropy of [B, 1 + negatives] logits whose first column is true."""
    truth = torch.zeros_like(scores)
    truth[:, 0] = 1
    return functional.binary_cross_entropy_with_logits(scores, truth)
