"""Running the two networks of a PPN at the same time: on two processes of a CPU, or on two streams or devices of CUDA.

Every runner gives what `PPN.step` gives; on a CPU to the bit, as each network runs whole, on one thread, whichever
process it is in.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from types import TracebackType
from typing import Literal, Protocol, Self, TypeAlias

import torch
from safetensors.torch import save
from torch import Tensor

from stepstream.models.base import Tree
from stepstream.models.ppn import PPN, channels_of
from stepstream.models.ppn_shared import (
    COMMAND,
    DONE,
    READY,
    SharedArrays,
    SharedState,
    StateFile,
    flat_leaves,
    layout_of,
    slot,
)

__all__ = ["ENVIRONMENT", "InStreams", "InTurn", "Mode", "Runner", "TwoProcesses", "WorkerDied", "runner_for"]

Mode: TypeAlias = Literal["sequential", "processes", "streams"]

_STARTS = 2
"""Workers that one step may cost before it is given up."""

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
}
"""Of a process that runs a network. glibc's malloc gives the system back what a step used when it is done and takes it
anew, page by page, in the next; so it keeps it.
"""


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
        if rows is not None and len(rows) == 1 and rows.device.type == "cpu":
            # A slot as a view: nothing has to be gathered and put back.
            state, rows = slot(state, int(rows[0])), None
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

    Steps a state that its `initial_state` gave: reconstruction's part lies in memory that both processes see. A worker
    that dies or says nothing for `patience_s` is replaced and asked again, from the state as it was before it began: so
    nothing is lost. If its successor fails on the same step, WorkerDied says how. `core`: where the worker stays, None:
    where the system puts it. `restarts`: workers that were replaced.
    """

    def __init__(self, model: PPN, core: int | None = None, patience_s: float = 60.0) -> None:
        self.model, self._core, self._patience = model, core, patience_s
        self.spans: dict[str, tuple[float, float]] = {}
        self.restarts = 0
        self._worker: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._sent: int | None = None
        x, y, z = model.config.cells
        channels = z * (model.config.history if model.config.architecture == "ppn" else 1)
        like = model.reconstruction.trunk.initial_state(1)
        self._states = SharedState(like)
        layout = layout_of((1, x, y, channels), like, (1, 2, x, y))
        self._memory, self._weights = os.memfd_create("ppn-step"), os.memfd_create("ppn-weights")
        os.ftruncate(self._memory, SharedArrays.bytes_of(layout))
        self._shared = SharedArrays(self._memory, layout).tensors
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
        state = self.model.initial_state(streams, device)
        state["reconstruction"] = self._states.fresh(streams)
        return state

    def step(self, x: Tree, state: Tree, rows: Tensor | None = None) -> Tree:
        """As `PPN.step`. Raises ValueError for more than one stream, and for a state from elsewhere; WorkerDied."""
        for count in (x["map"].shape[0], 1 if rows is None else len(rows)):
            if count != 1:
                raise ValueError(f"{count} streams in one step: TwoProcesses takes one at a time")
        row = 0 if rows is None else int(rows[0])
        file = self._states.file_of(state["reconstruction"])
        with torch.inference_mode(), threads(1):
            here = slot({name: state[name] for name in ("shared", "segmentation")}, row)
            # The worker waits for the map: what it does not need is done when it has it.
            window = self.model.maps(x, here, out=self._shared["inputs"])
            asked = self._ask(file, row)
            try:
                self.model.keep(window, here)
                inputs = {"window": channels_of(window), "cell": x["cell"], "points": x["points"]}
                began = time.monotonic()
                classes = self.model.segmentation(inputs, 1, 1, here["segmentation"])
                self.spans["segmentation"] = (began, time.monotonic())
                self._await(state["reconstruction"], file, row, asked)
            except BaseException:
                # Its answer to this step must not be taken for one to the next.
                self._end()
                self._undo(state["reconstruction"], row)
                raise
            times = self._shared["times"].tolist()
            self.spans["reconstruction"] = (times[0], times[1])
            return {"classes": classes, "occupied": self._shared["output"].clone()}

    def _ask(self, file: StateFile | None, row: int) -> bool:
        """Says go; False if the worker is gone."""
        link = self._running()
        self._shared["begun"][0] = 0
        new = file is not None and file.number != self._sent
        try:
            socket.send_fds(link, [COMMAND.pack(row, file.slots if file else 0)], [file.fd] if file and new else [])
        except OSError:
            return False
        self._sent = file.number if file else None
        return True

    def _await(self, state: Tree, file: StateFile | None, row: int, asked: bool) -> None:
        for attempt in range(_STARTS):
            if asked and self._answer() == DONE:
                return
            how = self._end()
            self._undo(state, row)
            self.restarts += 1
            if attempt + 1 < _STARTS:
                asked = self._ask(file, row)
        raise WorkerDied(f"the process for reconstruction failed {_STARTS} times on one sweep, the last {how}")

    def _undo(self, state: Tree, row: int) -> None:
        """The state as it was before a worker that is gone began to write it."""
        if self._shared["begun"][0]:
            for name, leaf in flat_leaves(slot(state, row), "undo").items():
                leaf.copy_(self._shared[name])
            self._shared["begun"][0] = 0

    def _answer(self) -> bytes:
        """One byte; b"" if the worker is gone or says nothing in time."""
        assert self._link is not None
        self._link.settimeout(self._patience)
        try:
            return self._link.recv(1)
        except OSError:
            return b""

    def _running(self) -> socket.socket:
        if self._link is not None:
            return self._link
        self._link, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            self._worker = subprocess.Popen(
                [sys.executable, "-m", "stepstream.models.ppn_worker"],
                stdin=there.fileno(),
                # Whatever a library prints is no part of what this process prints.
                stdout=subprocess.DEVNULL,
                pass_fds=(self._memory, self._weights),
                env={**os.environ, **ENVIRONMENT},
            )
        with contextlib.suppress(OSError):  # it is gone already, as the next line finds
            self._link.send(json.dumps(self._start).encode())
        if self._answer() != READY:
            how = self._end()
            raise WorkerDied(f"the process for reconstruction did not start: {how}")
        return self._link

    def _end(self) -> str:
        """Ends the worker; how it ended."""
        worker, self._worker = self._worker, None
        link, self._link = self._link, None
        self._sent = None
        if link is not None:
            link.close()
        if worker is None:
            return "before it ran"
        try:
            worker.wait(0.2)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
            return f"without an answer in {self._patience:g} s"
        return f"with exit code {worker.returncode}"

    def close(self) -> None:
        """Ends the worker. The runner may be used again: the next step starts another."""
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
