"""Running a StreamModel on a stream: one state row a key, many keys in one batched step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, KeysView, Sequence
from time import perf_counter
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from pydantic import Field

from stepstream.connectors.records import Record
from stepstream.models.base import StreamModel, Tree, close_rows, copy_rows, state_bytes_per_stream
from stepstream.operators import base
from stepstream.operators.base import Context, Operator, State

__all__ = ["Infer", "InferOptions", "StateRows"]


# A step reads the state of its whole batch. On a CPU, 64 METR-LA networks (3.8 MB of state each) in one step cost 1.5
# times what ten at a time cost, because they push each other out of the cache; small networks gain up to 64.
CACHED_STATE_BYTES = 32 << 20
MAX_BATCH = 64


class InferOptions(base.Options):
    """`device`: where the model runs. `max_batch`: most streams in one step (None: see `CACHED_STATE_BYTES`).

    `compile`: torch.compile the step.
    """

    device: str = "cpu"
    max_batch: int | None = Field(None, ge=1)
    compile: bool = False


class _HasState(Protocol):
    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree: ...


class StateRows:
    """The state of many streams in one tree of tensors; each key owns a row, freed rows are used again."""

    def __init__(self, model: _HasState, device: str) -> None:
        self._model, self._device = model, device
        self.state: Tree = model.initial_state(1, device)
        self._fresh: Tree = model.initial_state(1, device)
        self._rows: dict[str, int] = {}
        self._free = [0]
        self._capacity = 1

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def keys(self) -> KeysView[str]:
        """The keys that own a row."""
        return self._rows.keys()

    def row(self, key: str) -> int:
        """The row of a key, opened fresh if it has none."""
        row = self._rows.get(key)
        if row is None:
            if not self._free:
                self._grow()
            row = self._rows[key] = self._free.pop()
            self.reset(key)
        return row

    def _grow(self) -> None:
        """Doubles the capacity, so that n streams are opened in O(n) copies."""
        # The model makes it, not a concatenation: where state lies may be the model's to choose.
        grown = self._model.initial_state(2 * self._capacity, self._device)
        close_rows(grown, self.state, torch.arange(self._capacity, device=self._device))
        self.state = grown
        self._free = list(range(2 * self._capacity - 1, self._capacity - 1, -1))
        self._capacity *= 2

    def reset(self, key: str) -> None:
        """Makes the row of a key a fresh stream."""
        close_rows(self.state, self._fresh, torch.tensor([self._rows[key]], device=self._device))

    def close(self, key: str) -> None:
        """Frees the row of a key."""
        row = self._rows.pop(key, None)
        if row is not None:
            self._free.append(row)

    def read(self, key: str) -> Tree:
        """The state of a key on the CPU, without the row axis."""
        row = torch.tensor([self._rows[key]], device=self._device)
        return _map(copy_rows(self.state, row), lambda leaf: leaf[0].cpu())

    def write(self, key: str, saved: Tree) -> None:
        """Makes the state of a key what `read` gave. Raises ValueError naming the part that does not fit."""
        _check(self._fresh, saved, "state")
        row = torch.tensor([self.row(key)], device=self._device)
        close_rows(self.state, _map(saved, lambda leaf: torch.as_tensor(leaf)[None]), row)


def _placed(leaf: torch.Tensor) -> torch.Tensor:
    """A tensor that begins where torch's own do: a copy, if it is a view of a message, say.

    Products of matrices round by where their arrays begin: the oneMKL developer guide, "Obtaining Numerically
    Reproducible Results", has them reproducible where arrays are aligned to 64 bytes.
    """
    return leaf.clone() if leaf.is_cpu and leaf.data_ptr() % 64 else leaf


def _map(tree: Tree, function: Any) -> Tree:
    if isinstance(tree, dict):
        return {name: _map(leaf, function) for name, leaf in tree.items()}
    return function(tree)


def _check(expected: Tree, saved: Tree, where: str) -> None:
    if isinstance(expected, dict):
        if not isinstance(saved, dict) or saved.keys() != expected.keys():
            found = sorted(saved) if isinstance(saved, dict) else type(saved).__name__
            raise ValueError(f"{where} holds {found}: {sorted(expected)} was expected")
        for name in expected:
            _check(expected[name], saved[name], f"{where}/{name}")
    else:
        saved = torch.as_tensor(saved)
        if saved.shape != expected.shape[1:] or saved.dtype != expected.dtype:
            want = f"{expected.dtype} {list(expected.shape[1:])}"
            raise ValueError(f"{where} is {saved.dtype} {list(saved.shape)}: {want} was expected")


class Infer(Operator):
    """Steps a model once per consumed record of each key, oldest first; many keys share a batched step.

    Each call is cut into waves that hold at most one record of a key. What a stream gets does not depend on the
    other streams of its batch beyond the rounding of batched float32 arithmetic (stated and tested: 1e-5 relative
    to the output's scale); with one key it is bit for bit the same however the stream is cut.

    A subclass turns records into tensors (`encode`), an output row into payloads (`decode`), and says when a
    stream starts afresh (`starts_afresh`). Per-key memory beside the model's goes into `memory`.
    """

    Options: ClassVar[type[base.Options]] = InferOptions

    def __init__(self, options: InferOptions, model: StreamModel) -> None:
        self.options = options
        self.model = model.to(options.device).eval()
        self.rows = StateRows(self.model, options.device)
        self.memory: dict[str, dict[str, Any]] = {}
        self.on_step: Callable[[int, float], None] | None = None
        """Told of each model step, encoding and the copy back included: how many streams, how many seconds."""
        fitting = MAX_BATCH
        if options.device == "cpu":
            fitting = max(1, min(MAX_BATCH, CACHED_STATE_BYTES // max(1, state_bytes_per_stream(self.rows.state))))
        self.max_batch = options.max_batch or fitting
        self._step = (
            torch.compile(self.model.step, fullgraph=True, dynamic=True) if options.compile else self.model.step
        )

    @abstractmethod
    def starts_afresh(self, record: Record) -> bool:
        """Whether the state of the record's key must be reset before this record."""

    @abstractmethod
    def fresh_memory(self) -> dict[str, Any]:
        """What `memory[key]` starts as: a dict of numpy arrays and JSON values."""

    def lasting(self, memory: dict[str, Any]) -> dict[str, Any]:
        """What of a key's memory stays when its stream starts afresh."""
        return {}

    @abstractmethod
    def encode(self, records: Sequence[Record], context: Context) -> Tree:
        """Model input, a tree of [len(records), ...]; updates the memory of the records' keys."""

    @abstractmethod
    def decode(self, record: Record, output: np.ndarray[Any, Any]) -> list[Any]:
        """Payloads of one record's output row."""

    def process(self, records: Sequence[Record], context: Context) -> list[Record]:
        """One step for each record."""
        waves: list[list[Record]] = []
        position: dict[str, int] = {}
        for record in records:
            wave = position[record.key] = position.get(record.key, -1) + 1
            if wave == len(waves):
                waves.append([])
            waves[wave].append(record)
        payloads: dict[int, list[Any]] = {}
        for wave_records in waves:
            for start in range(0, len(wave_records), self.max_batch):
                batch = wave_records[start : start + self.max_batch]
                for record, row in zip(batch, self._run(batch, context), strict=True):
                    payloads[id(record)] = self.decode(record, row)
        return [record.derive(i, value) for record in records for i, value in enumerate(payloads[id(record)])]

    def _run(self, batch: Sequence[Record], context: Context) -> np.ndarray[Any, Any]:
        started = perf_counter()
        for record in batch:
            if record.key not in self.rows:
                self.rows.row(record.key)
                self.memory[record.key] = self.fresh_memory()
            elif self.starts_afresh(record):
                self.rows.reset(record.key)
                self.memory[record.key] = self.fresh_memory() | self.lasting(self.memory[record.key])
                context.count("restarts")
        x = _map(self.encode(batch, context), lambda leaf: _placed(leaf).to(self.options.device))
        rows = torch.tensor([self.rows.row(record.key) for record in batch], device=self.options.device)
        with torch.no_grad():
            output: np.ndarray[Any, Any] = self._step(x, self.rows.state, rows).float().cpu().numpy()
        context.count("steps", len(batch))
        if self.on_step is not None:
            self.on_step(len(batch), perf_counter() - started)
        return output

    def keys(self) -> Iterable[str]:
        """The keys that own a state row."""
        return list(self.rows.keys())

    def snapshot(self, key: str) -> State:
        """The model's state and the operator's memory of one key."""
        memory = {
            name: value.copy() if isinstance(value, np.ndarray) else value for name, value in self.memory[key].items()
        }
        return {"model": self.rows.read(key), "memory": memory}

    def restore(self, key: str, state: State) -> None:
        """The inverse of `snapshot`."""
        if set(state) != {"model", "memory"} or set(state["memory"]) != set(self.fresh_memory()):
            raise ValueError(f"the saved state of {key!r} is not one of this operator")
        self.rows.write(key, state["model"])
        self.memory[key] = {
            name: np.array(v) if isinstance(v, np.ndarray) else v for name, v in state["memory"].items()
        }

    def drop(self, key: str) -> None:
        """Frees the row of a key."""
        self.rows.close(key)
        self.memory.pop(key, None)

    def state_bytes(self) -> int | None:
        """The rows of the model's state that are in use."""
        return state_bytes_per_stream(self.rows.state) * len(self.rows.keys())

    def describe(self) -> dict[str, Any]:
        """Receptive field, delay, state size and parameter count."""
        return {
            "receptive_field": self.model.receptive_field,
            "delay": self.model.delay,
            "state_bytes_per_stream": state_bytes_per_stream(self.rows.state),
            "max_batch": self.max_batch,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }
