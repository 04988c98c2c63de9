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
from stepstream.models.dyngraph.nat_caches import EMPTY, find, join, slots, waves, winners
from stepstream.models.dyngraph.nat_score import score_pairs

__all__ = ["NAT", "NATConfig", "link_loss"]

_NS = 1e9
_DAY_S = 86_400.0
_LONG = math.log(30 * _DAY_S)
_MANY = math.log(1000)
_ORDER = (
    "id", "own", "own_ns", "events", "id1", "ns1", "met1", "edge1", "id2", "ns2", "met2", "edge2", "at1"
)  # fmt: skip


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
    float32 arithmetic (1e-5, tested). Beside the paper's representations an entry keeps its time, how often it was met
    and, of a neighbour, which of its owner's interactions was the last with it, so that "its latest neighbour" is exact
    knowledge. They enter the joint features: times as differences of int64 nanoseconds. What the two ends know of each
    other also goes straight to the score, beside how many interactions each of them had.

    State: `bytes_per_node` for every node; everything is in it.
    """

    identity: ClassVar[str | None] = "id"

    _since: Tensor
    _ranks: Tensor
    _ages_ns: Tensor

    def __init__(self, config: NATConfig) -> None:
        super().__init__()
        self.config = c = config
        times = 1 + c.decays
        self.log_decay_s = nn.Parameter(torch.linspace(math.log(60), _LONG, c.decays))
        self.own = nn.GRUCell(c.node + times + 1 + c.features, c.node)
        self.along = nn.GRUCell(c.node + times + 1 + c.features, c.edge)
        entry = 1 + c.edge + times + 1
        side = 1 + 2 * entry + 1
        self.joint = nn.Sequential(nn.Linear(2 * side, c.hidden), nn.ReLU(), nn.Linear(c.hidden, c.hidden), nn.ReLU())
        self.attention = nn.Linear(c.hidden, 1)
        pair = 2 * c.hidden + 2 * (c.node + times + 1) + 2 * (entry + 1)
        self._prepared: tuple[Any, tuple[Any, ...], tuple[Any, ...]] | None = None
        self.out = nn.Sequential(nn.Linear(pair, c.hidden), nn.ReLU(), nn.Linear(c.hidden, 1))
        # Sharp knowledge, as a ranking wants it: one row for each class of when two nodes met last, for either end.
        self.since = nn.Embedding(2 * (len(nat_kernels.SINCE) + 1), c.hidden)
        self.ranks = nn.Embedding(2 * (len(nat_kernels.RANKS) + 1), c.hidden)
        self.ages = nn.Embedding(2 * (len(nat_kernels.AGES_NS) + 1), c.hidden)
        for classes in (self.since, self.ranks, self.ages):
            nn.init.zeros_(classes.weight)
        # All that has parameters of its own, to look at them without a walk through the tree of modules.
        self._parts = [part for part in self.modules() if part is not self and part._parameters]  # noqa: SLF001
        self.register_buffer("_since", torch.from_numpy(nat_kernels.SINCE), persistent=False)
        self.register_buffer("_ranks", torch.from_numpy(nat_kernels.RANKS), persistent=False)
        self.register_buffer("_ages_ns", torch.from_numpy(nat_kernels.AGES_NS), persistent=False)

    @classmethod
    def from_card(cls, card: dict[str, Any]) -> NAT:
        """The model whose `NATConfig` is the card's `config`."""
        return cls(NATConfig(**card["config"]))

    # ---- state

    def initial_state(self, nodes: int, first: int = 0) -> GraphState:
        """Of a graph in which nothing has happened, whose nodes have the ids from `first` on.

        "id" is what a node is called in the caches of others: a row that is given to another node needs another id.
        """
        c, device = self.config, self.log_decay_s.device

        def integers(*shape: int, value: int = 0) -> Tensor:
            return torch.full((nodes, *shape), value, dtype=torch.int64, device=device)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(nodes, *shape, device=device)

        return {
            "id": torch.arange(first, first + nodes, device=device),
            "own": zeros(c.node),
            "own_ns": integers(),
            "events": integers(),
            "id1": integers(c.first, value=EMPTY),
            "ns1": integers(c.first),
            "met1": zeros(c.first),
            "edge1": zeros(c.first, c.edge),
            "at1": integers(c.first),
            "id2": integers(c.second, value=EMPTY),
            "ns2": integers(c.second),
            "met2": zeros(c.second),
            "edge2": zeros(c.second, c.edge),
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
        if self._compiles(source):
            asked = source.contiguous().numpy(), destination.contiguous().numpy(), time_ns.contiguous().numpy()
            weights = self._arrays()[1]
            return torch.from_numpy(score_pairs(_held(state), weights, *asked, _LONG, _MANY, self.config.seed))
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
        met = [self._met(state, *pair, time_ns, end) for end, pair in enumerate([(source, target), (target, source)])]
        first, *rest = self.out
        before = first(torch.cat([*pooled, *ends, *met[0][0], *met[1][0]], -1)) + met[0][1] + met[1][1]
        for layer in rest:
            before = layer(before)
        return before.reshape(-1, candidates)

    def _node(self, state: GraphState, node: Tensor, time_ns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        events = state["events"][node]
        seen = (events > 0).float()[:, None]
        busy = torch.log1p(events.float())[:, None] / _MANY
        return state["own"][node], self._times(time_ns - state["own_ns"][node]) * seen, busy

    def _met(
        self, state: GraphState, node: Tensor, other: Tensor, time_ns: Tensor, end: int
    ) -> tuple[list[Tensor], Tensor]:
        """What nodes know of others as neighbours: their entries, and what the classes say of when they last met."""
        place = find(state["id1"], node, state["id"][other][:, None], self.config.seed)[:, 0]
        at = (node, place.clamp(min=0))
        last, times = state["at1"][node], state["ns1"][at]
        later = ((last > state["at1"][at][:, None]) & (state["id1"][node] != EMPTY)).sum(1)
        classes = torch.zeros_like(state["own"][:1, :1])
        for table, value, bounds in (
            (self.since, state["events"][node] - state["at1"][at], self._since),
            (self.ranks, later, self._ranks),
            (self.ages, time_ns - times, self._ages_ns),
        ):
            classes = classes + table(torch.bucketize(value, bounds, right=True) + end * (len(bounds) + 1))
        return self._entry(state, 1, node, place, time_ns), classes * (place[:, None] >= 0)

    def _join(self, state: GraphState, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        tables = (state["id"], state["id1"], state["id2"])
        if source.device.type != "cpu":
            return join(*tables, source, target, self.config.seed)
        # The compiled form of the same: there is no gradient in it.
        ids, first, second = (table.numpy() for table in tables)
        pair, places = nat_kernels.join(ids, first, second, source.numpy(), target.numpy(), self.config.seed)
        return torch.from_numpy(pair), torch.from_numpy(places)

    def _known(self, state: GraphState, node: Tensor, places: Tensor, time_ns: Tensor) -> list[Tensor]:
        """What nodes [M] know of others, whose `places` [M, 3] tell where: whether they are they; of neighbours and
        theirs, all that is kept.
        """
        first, second = (self._entry(state, hop, node, places[:, hop], time_ns) for hop in (1, 2))
        return [places[:, :1].float(), *first, *second]

    def _entry(self, state: GraphState, hop: int, node: Tensor, place: Tensor, time_ns: Tensor) -> list[Tensor]:
        """What is in a slot of the caches of nodes; zeros where the slot is EMPTY."""
        found = (place[:, None] >= 0).float()
        at = (node, place.clamp(min=0))
        times = self._times(time_ns - state[f"ns{hop}"][at])
        met = torch.log1p(state[f"met{hop}"][at])[:, None]
        parts = [found, state[f"edge{hop}"][at] * found, times * found, met * found]
        if hop == 1:
            since = state["events"][node] - state["at1"][at]
            parts.append(found / (1 + since[:, None].float()))
        return parts

    # ---- updates

    def update(
        self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor, features: Tensor | None = None
    ) -> None:
        """See `GraphModel`. With gradients on, what is written carries them: `score` learns through one update."""
        if features is None:
            features = torch.zeros(len(source), self.config.features, device=source.device)
        if self._compiles(source):
            given = [column.contiguous().numpy() for column in (source, destination, time_ns, features)]
            weights = self._arrays()[0]
            nat_kernels.take_in(_held(state), weights, given[0], given[1], given[2], given[3], _LONG, self.config.seed)
            return
        for wave in waves(source, destination):
            self._wave(state, source[wave], destination[wave], time_ns[wave], features[wave])

    def _compiles(self, given: Tensor) -> bool:
        """Whether compiled code may do it: nobody wants gradients, and weights and data are where it can reach them."""
        weight = self.log_decay_s
        return not torch.is_grad_enabled() and given.is_cpu and weight.is_cpu and weight.dtype == torch.float32

    def _arrays(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The parameters as the kernels of `update` and `score` take them, made again when one of them has changed."""
        # What was made in inference mode has no version, as nothing writes to it.
        held = [p for part in self._parts for p in part._parameters.values() if p is not None]  # noqa: SLF001
        at = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in (self.log_decay_s, *held)]  # noqa: SLF001
        if self._prepared is None or self._prepared[0] != at:
            cells = [p for cell in (self.own, self.along) for p in cell.parameters()]
            layers = [p for part in (self.joint, self.attention, self.out) for p in part.parameters()]
            rates = _flat(torch.exp(-self.log_decay_s))
            classes = [part.weight.detach().numpy().copy() for part in (self.since, self.ranks, self.ages)]
            self._prepared = at, (rates, *map(_flat, cells)), (rates, *map(_flat, layers), *classes)
        return self._prepared[1:]

    def _wave(self, state: GraphState, source: Tensor, destination: Tensor, time_ns: Tensor, features: Tensor) -> None:
        """Events of which none shares a node with another. Both ends learn of each other as they were before."""
        two = source != destination
        node = torch.cat([source, destination[two]])
        other = torch.cat([destination, source[two]])
        at_ns = torch.cat([time_ns, time_ns[two]])
        features = torch.cat([features, features[two]])
        role = torch.zeros(len(node), 1, device=node.device)
        role[len(source) :] = 1
        theirs = state["own"][other]
        own = self._own(state, node, theirs, at_ns, role, features)
        first = self._first(state, node, other, theirs, at_ns, role, features)
        second = self._second(state, node, other)
        state["own"][node] = own
        state["own_ns"][node] = torch.maximum(state["own_ns"][node], at_ns)
        state["events"][node] += 1
        place, edge, met = first
        state["id1"][node, place] = state["id"][other]
        state["ns1"][node, place] = at_ns
        state["met1"][node, place] = met
        state["at1"][node, place] = state["events"][node]
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
        self,
        state: GraphState,
        node: Tensor,
        other: Tensor,
        theirs: Tensor,
        at_ns: Tensor,
        role: Tensor,
        features: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where the other end goes in the cache of neighbours, its new representation, and how often it was met."""
        ids = state["id"][other]
        place = slots(ids, self.config.first, self.config.seed)
        known = (state["id1"][node, place] == ids).float()
        times = self._times(at_ns - state["ns1"][node, place]) * known[:, None]
        before = state["edge1"][node, place] * known[:, None]
        edge = self.along(torch.cat([theirs, times, role, features], 1), before)
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


def _held(state: GraphState) -> tuple[Any, ...]:
    return tuple([state[name].numpy() for name in _ORDER])


def _flat(parameter: Tensor) -> Any:
    """As the kernels take it: matrices transposed, so that the inner loop runs along memory; one row as a vector."""
    turned = parameter.detach().t() if parameter.dim() == 2 else parameter.detach()
    return (turned[:, 0] if turned.dim() == 2 and turned.shape[1] == 1 else turned).contiguous().numpy().copy()


def _softmax(logits: Tensor, group: Tensor, groups: int) -> Tensor:
    """Over the entries of each group; float32 [M]."""
    most = logits.new_full((groups,), -math.inf).scatter_reduce(0, group, logits.detach(), "amax")
    weight = torch.exp(logits - most[group])
    return weight / weight.new_zeros(groups).index_add(0, group, weight)[group]


def link_loss(scores: Tensor, expected: Tensor | None = None) -> Tensor:
    """Of [B, 1 + negatives] logits whose first column is true.

    Binary cross-entropy; or, with how often a draw has each negative in expectation [B, negatives], the cross-entropy
    of the true one among all destinations, estimated from those drawn: what is drawn rarely counts for many (the
    sampled softmax of Jean et al., "On Using Very Large Target Vocabulary for Neural Machine Translation", ACL 2015,
    arXiv:1412.2007, section 3.1). A draw with expectation 0 is left out. The logarithm of the sum over all is held near
    0 (with a weight of 0.05), so that scores are near log-probabilities and those of two sources compare.
    """
    if expected is None:
        truth = torch.zeros_like(scores)
        truth[:, 0] = 1
        return functional.binary_cross_entropy_with_logits(scores, truth)
    out = expected == 0
    stands_for = torch.where(out, 1.0, expected).log()
    whole = torch.logsumexp(torch.cat([scores[:, :1], (scores[:, 1:] - stands_for).masked_fill(out, -1e9)], 1), 1)
    return (whole - scores[:, 0]).mean() + 0.05 * whole.square().mean()
