"""Running the two networks of a PPN at the same time: on two processes of a CPU, or on two streams or devices of CUDA.

Every runner gives what `PPN.step` gives; on a CPU to the bit, as each network runs whole, on one thread, whichever
process it is in.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from types import TracebackType
from typing import IO, Literal, Protocol, Self, TypeAlias

import torch
from safetensors.torch import save
from torch import Tensor

from stepstream.models.base import Tree
from stepstream.models.ppn import PPN
from stepstream.models.ppn_shared import DONE, READY, STEP, SharedArrays, flat_leaves, layout_of

__all__ = ["InStreams", "InTurn", "Mode", "Runner", "TwoProcesses", "WorkerDied", "runner_for"]

Mode: TypeAlias = Literal["sequential", "processes", "streams"]

_STARTS = 2
"""Workers that one step may cost before it is given up."""


class WorkerDied(RuntimeError):
    """The second process ended or was silent, and so did the one that was started in its place."""


class Runner(Protocol):
    """Runs a step. `spans`: of the last step, when each network began and ended on this machine's monotonic clock."""

    spans: dict[str, tuple[float, float]]
    restarts: int

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        """Fresh state; without a `device`, on those that the networks are on."""

    def step(self, x: Tree, state: Tree, rows: Tensor | None = None) -> Tree:
        """As `PPN.step`."""

    def close(self) -> None:
        """Ends what was started."""


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many threads for torch meanwhile; None: as it is."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class InTurn:
    """One network after the other, in this process, on `count` threads each (None: as many as torch has)."""

    def __init__(self, model: PPN, count: int | None = None) -> None:
        self.model, self._threads = model, count
        self.spans: dict[str, tuple[float, float]] = {}
        self.restarts = 0

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        return self.model.initial_state(streams, device)

    def step(self, x: Tree, state: Tree, rows: Tensor | None = None) -> Tree:
        with torch.inference_mode(), threads(self._threads):
            inputs = self.model.take(x, state, rows)
            found = []
            for name, network in self.model.networks.items():
                began = time.monotonic()
                found.append(network(inputs, 1, 1, state[name], rows))
                self.spans[name] = (began, time.monotonic())
        return {"classes": found[0], "occupied": found[1]}

    def close(self) -> None:
        pass


class TwoProcesses:
    """Segmentation here, reconstruction in a second process, each on one thread; one stream a step.

    A worker that dies or says nothing for `patience_s` is replaced and asked again: the state it was given is still
    here, so that nothing is lost. If its successor fails on the same step, WorkerDied says how. `core`: where the
    worker stays, None: where the system puts it. `restarts`: workers that were replaced.
    """

    def __init__(self, model: PPN, core: int | None = None, patience_s: float = 60.0) -> None:
        self.model, self._core, self._patience = model, core, patience_s
        self.spans: dict[str, tuple[float, float]] = {}
        self.restarts = 0
        self._worker: subprocess.Popen[bytes] | None = None
        x, y, z = model.config.cells
        channels = z * (model.config.history if model.config.architecture == "ppn" else 1)
        like = model.reconstruction.trunk.initial_state(1)
        layout = layout_of(torch.empty((1, x, y, channels), dtype=torch.uint8), like, (1, 2, x, y))
        self._memory, self._weights = os.memfd_create("ppn-step"), os.memfd_create("ppn-weights")
        os.ftruncate(self._memory, SharedArrays.bytes_of(layout))
        self._shared = SharedArrays(self._memory, layout)
        weights = save({name: leaf.contiguous() for name, leaf in model.state_dict().items()})
        with os.fdopen(os.dup(self._weights), "wb") as stream:
            stream.write(weights)
        self._start = {
            "config": asdict(model.config),
            "network": "reconstruction",
            "layout": layout,
            "memory": self._memory,
            "weights": self._weights,
            "core": core,
        }

    @property
    def worker(self) -> int | None:
        """The process id of the worker; None before the first step."""
        return None if self._worker is None else self._worker.pid

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        return self.model.initial_state(streams, device)

    def step(self, x: Tree, state: Tree, rows: Tensor | None = None) -> Tree:
        row = torch.zeros(1, dtype=torch.int64) if rows is None else rows
        if len(row) != 1 or x["map"].shape[0] != 1:
            raise ValueError(f"{len(row)} streams in one step: TwoProcesses takes one at a time")
        with torch.inference_mode(), threads(1):
            window = self.model.maps(x, state, row)
            inputs = {"window": window.permute(0, 3, 1, 2).float(), "cell": x["cell"], "points": x["points"]}
            shared = self._shared.tensors
            shared["inputs"].copy_(window)
            asked = self._ask(state["reconstruction"], row)
            began = time.monotonic()
            classes = self.model.segmentation(inputs, 1, 1, state["segmentation"], row)
            self.spans["segmentation"] = (began, time.monotonic())
            self._await(state["reconstruction"], row, asked)
            for name, leaf in flat_leaves(state["reconstruction"]).items():
                leaf.index_copy_(0, row, shared[name])
            times = shared["times"].tolist()
            self.spans["reconstruction"] = (times[0], times[1])
            return {"classes": classes, "occupied": shared["output"].clone()}

    def _ask(self, state: Tree, row: Tensor) -> bool:
        """Hands the state over and says go; False if the worker is gone."""
        for name, leaf in flat_leaves(state).items():
            torch.index_select(leaf, 0, row, out=self._shared.tensors[name])
        try:
            stream = self._running().stdin
            assert stream is not None
            stream.write(STEP)
        except BrokenPipeError:
            return False
        return True

    def _await(self, state: Tree, row: Tensor, asked: bool) -> None:
        for attempt in range(_STARTS):
            if asked and self._answer() == DONE:
                return
            how = self._end()
            self.restarts += 1
            if attempt + 1 < _STARTS:
                asked = self._ask(state, row)
        raise WorkerDied(f"the process for reconstruction failed {_STARTS} times on one sweep, the last {how}")

    def _answer(self) -> bytes:
        """One byte; b"" if the worker is gone or says nothing in time."""
        assert self._worker is not None
        stream: IO[bytes] | None = self._worker.stdout
        assert stream is not None
        ready, _, _ = select.select([stream], [], [], self._patience)
        return stream.read(1) if ready else b""

    def _running(self) -> subprocess.Popen[bytes]:
        if self._worker is not None:
            return self._worker
        command = [sys.executable, "-m", "stepstream.models.ppn_worker"]
        self._worker = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pass_fds=(self._memory, self._weights),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._worker.stdin is not None
        self._worker.stdin.write(json.dumps(self._start).encode() + b"\n")
        if self._answer() != READY:
            how = self._end()
            raise WorkerDied(f"the process for reconstruction did not start: {how}")
        return self._worker

    def _end(self) -> str:
        """Ends the worker; how it ended."""
        worker, self._worker = self._worker, None
        if worker is None:
            return "before it ran"
        try:
            worker.wait(0.2)
            how = f"with exit code {worker.returncode}"
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
            how = f"without an answer in {self._patience:g} s"
        for stream in (worker.stdin, worker.stdout):
            if stream is not None:
                stream.close()
        return how

    def close(self) -> None:
        """Ends the worker. The runner may be used again: the next step starts another."""
        if self._worker is not None and self._worker.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._worker.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._worker.wait(5)
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # A constructor that raised has nothing to end.
        if getattr(self, "_worker", None) is not None:
            self._end()
        for name in ("_memory", "_weights"):
            if (fd := getattr(self, name, None)) is not None:
                with contextlib.suppress(OSError):
                    os.close(fd)


class InStreams:
    """CUDA: each network on a stream of its own, of one device or of two. State lies where its network is."""

    def __init__(self, model: PPN, first: str, second: str | None = None) -> None:
        self.model = model.to(first)
        self.devices = {"segmentation": torch.device(first), "reconstruction": torch.device(second or first)}
        model.reconstruction.to(self.devices["reconstruction"])
        self.streams = {name: torch.cuda.Stream(device) for name, device in self.devices.items()}
        self.spans: dict[str, tuple[float, float]] = {}
        self.restarts = 0

    def initial_state(self, streams: int, device: torch.device | str | None = None) -> Tree:
        # Each part of the state belongs where its network is, whatever device is asked for.
        state = self.model.initial_state(streams, self.devices["segmentation"])
        there = self.devices["reconstruction"]
        state["reconstruction"] = self.model.reconstruction.trunk.initial_state(streams, there)
        return state

    def step(self, x: Tree, state: Tree, rows: Tensor | None = None) -> Tree:
        found = {}
        with torch.inference_mode():
            inputs = self.model.take(x, state, rows)
            ready = torch.cuda.current_stream(self.devices["segmentation"]).record_event()
            for name, network in self.model.networks.items():
                device, stream = self.devices[name], self.streams[name]
                stream.wait_event(ready)
                with torch.cuda.stream(stream):
                    window = inputs["window"].to(device, non_blocking=True)
                    given = {"window": window} if name == "reconstruction" else inputs
                    there = None if rows is None else rows.to(device, non_blocking=True)
                    found[name] = network(given, 1, 1, state[name], there)
                    for part in inputs.values():
                        if part.device == device:
                            part.record_stream(stream)
            home = torch.cuda.current_stream(self.devices["segmentation"])
            for name, stream in self.streams.items():
                home.wait_event(stream.record_event())
                if self.devices[name] != self.devices["segmentation"]:
                    torch.cuda.current_stream(self.devices[name]).wait_stream(stream)
                found[name].record_stream(torch.cuda.current_stream(self.devices[name]))
        return {"classes": found["segmentation"], "occupied": found["reconstruction"]}

    def close(self) -> None:
        pass


def runner_for(model: PPN, mode: Mode, device: str = "cpu", second: str | None = None) -> Runner:
    """The runner of a mode. Raises ValueError where mode and device do not fit."""
    on_cuda = torch.device(device).type == "cuda"
    if mode == "processes" and on_cuda:
        raise ValueError(f"processes is for a CPU, the device is {device}: expected streams or sequential")
    if mode == "streams" and not on_cuda:
        raise ValueError(f"streams is for CUDA, the device is {device}: expected processes or sequential")
    if second is not None and mode != "streams":
        raise ValueError(f"a second device, {second}, is for streams, not for {mode}")
    if mode == "processes":
        return TwoProcesses(model)
    if mode == "streams":
        return InStreams(model, device, second)
    return InTurn(model.to(device), 1 if not on_cuda else None)
