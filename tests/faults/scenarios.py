"""The faults: each makes a rig, does its worst while records flow, and returns the verdict with what it measured."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cluster import Cluster
from rig import Publisher, Rig, Verdict, Verifier, frames

from stepstream.connectors.records import Record

__all__ = [
    "READY_S",
    "Scenario",
    "come_and_go",
    "graceful_stops",
    "kill_brokers",
    "kill_workers",
    "snapshots_gone",
    "stop_and_continue",
]

READY_S, WAIT_S = 60.0, 45.0
NO_SNAPSHOT = "a snapshot could not be written"


@dataclass
class Scenario:
    """One run of one fault: on which cluster, where, with what randomness, how many times the fault happens."""

    cluster: Cluster
    folder: Path
    random: random.Random
    times: int
    rate: float = 60.0
    rigs: list[Rig] = field(default_factory=list)

    def rig(self, **options: object) -> Rig:
        """A rig of its own."""
        folder = self.folder / uuid.uuid4().hex[:8]
        self.rigs.append(Rig(folder, self.cluster.servers(), **options))  # type: ignore[arg-type]
        return self.rigs[-1]

    def run(self, fault: Callable[[Scenario], Verdict]) -> Verdict:
        """What comes of a fault; no worker outlives it."""
        try:
            return fault(self)
        finally:
            for rig in self.rigs:
                rig.close()

    def flow(self, rig: Rig, count: int, records: list[Record] | None = None) -> tuple[Publisher, Verifier]:
        """Records that come in at the rate, these or at least `count`, and somebody who reads what comes out."""
        publisher = Publisher(rig.connection, rig.topic, records or frames(), self.rate, 0 if records else count)
        verifier = Verifier(rig.connection, f"{rig.topic}.out")
        publisher.start()
        verifier.start()
        return publisher, verifier

    def until_output(self, rig: Rig, verifier: Verifier, more: int = 1, timeout_s: float = READY_S) -> float:
        """Waits for so many more outputs; the seconds it took. Raises TimeoutError with a worker's log."""
        goal = len(verifier.outputs) + more
        return self.until(rig, lambda: len(verifier.outputs) >= goal, "output", timeout_s)

    def until(self, rig: Rig, come: Callable[[], bool], what: str, timeout_s: float = READY_S) -> float:
        """Waits for something; the seconds it took. Raises TimeoutError with a worker's log."""
        began = time.monotonic()
        while not come():
            if time.monotonic() - began > timeout_s:
                raise TimeoutError(f"no {what} in {timeout_s} s: {rig.workers[0].log.read_text()[-2000:]}")
            rig.supervise()
            time.sleep(0.05)
        return time.monotonic() - began

    def finish(self, rig: Rig, publisher: Publisher, verifier: Verifier) -> Verdict:
        """When enough records are in: the verdict."""
        publisher.enough.set()
        while publisher.is_alive():
            rig.supervise()
            time.sleep(0.1)
        if publisher.error is not None:
            raise publisher.error
        verdict = rig.judge(verifier, WAIT_S)
        verdict.counts["starts"] = sum(worker.starts for worker in rig.workers)
        rig.close()
        return verdict


def kill_workers(s: Scenario) -> Verdict:
    """kill -9 of one of two workers, at random points from the moment on at which it is given partitions."""
    rig = s.rig()
    publisher, verifier = s.flow(rig, int(s.rate * (10 + 5 * s.times)))
    rig.worker(), rig.worker()
    s.until_output(rig, verifier, 20)
    for _ in range(s.times):
        worker = s.random.choice(rig.workers)
        deadline = time.monotonic() + READY_S
        while not worker.has_partitions and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(s.random.uniform(0, 2))
        worker.kill()
        rig.supervise()
    verdict = s.finish(rig, publisher, verifier)
    verdict.counts["kills"] = s.times
    return verdict


def kill_brokers(s: Scenario) -> Verdict:
    """kill -9 of one broker after the other, each started again; how long until outputs come again."""
    rig = s.rig()
    publisher, verifier = s.flow(rig, int(s.rate * (15 + 16 * s.times)))
    rig.worker(), rig.worker()
    s.until_output(rig, verifier, 20)
    gaps = []
    for turn in range(s.times):
        node = 1 + turn % s.cluster.nodes
        s.cluster.kill(node)
        gaps.append(s.until_output(rig, verifier, 10))
        s.cluster.start(node)
        s.cluster.wait_ready()
    verdict = s.finish(rig, publisher, verifier)
    verdict.seconds["longest until 10 more outputs"] = max(gaps)
    verdict.counts["kills"] = s.times
    return verdict


def stop_and_continue(s: Scenario) -> Verdict:
    """SIGSTOP past the session timeout, then SIGCONT: the commit that comes late is refused."""
    rig = s.rig()
    publisher, verifier = s.flow(rig, int(s.rate * (10 + 16 * s.times)))
    rig.worker(), rig.worker()
    s.until_output(rig, verifier, 20)
    for turn in range(s.times):
        worker = rig.workers[turn % 2]
        worker.send(signal.SIGSTOP)
        time.sleep(s.random.uniform(7, 9))
        worker.send(signal.SIGCONT)
        s.until_output(rig, verifier, 10)
        time.sleep(s.random.uniform(1, 4))
    verdict = s.finish(rig, publisher, verifier)
    verdict.counts["stops"] = s.times
    return verdict


def come_and_go(s: Scenario) -> Verdict:
    """Workers are added and ended under load, also while others are still recovering."""
    rig = s.rig(partitions=6)
    publisher, verifier = s.flow(rig, int(s.rate * (15 + 5 * s.times)))
    rig.worker()
    s.until_output(rig, verifier, 20)
    for _ in range(s.times):
        if len(rig.workers) < 4 and (len(rig.workers) == 1 or s.random.random() < 0.6):
            rig.worker()
        else:
            gone = rig.workers.pop()
            gone.send(s.random.choice([signal.SIGTERM, signal.SIGKILL]))
        time.sleep(s.random.uniform(0.5, 5))
        rig.supervise()
    verdict = s.finish(rig, publisher, verifier)
    verdict.counts["changes"] = s.times
    return verdict


def snapshots_gone(s: Scenario) -> Verdict:
    """The snapshot store goes away and comes back, empty: the stream goes on, and a kill costs a longer replay."""
    rig = s.rig()
    publisher, verifier = s.flow(rig, int(s.rate * (25 + 8 * s.times)))
    rig.worker()
    s.until_output(rig, verifier, 100)
    store = rig.folder / "snapshots"
    for _ in range(s.times):
        _put_away(store)
        # Outputs alone would not show it: a worker that is behind may hand out 100 between two of its snapshots.
        s.until(rig, lambda: rig.workers[0].has_logged(NO_SNAPSHOT), "alarm")
        s.until_output(rig, verifier, 100)
        rig.workers[0].kill()
        s.until_output(rig, verifier, 20)
        store.unlink()
        s.until_output(rig, verifier, 100)
    log = rig.workers[0].log.read_text()
    verdict = s.finish(rig, publisher, verifier)
    verdict.counts["alarms"] = log.count(NO_SNAPSHOT)
    verdict.counts["snapshots after"] = len(list(store.rglob("*.safetensors")))
    return verdict


def _put_away(store: Path) -> None:
    """The folder is gone and a file is where it was, however busily a worker makes it anew."""
    while not store.is_file():
        shutil.rmtree(store, ignore_errors=True)
        with contextlib.suppress(IsADirectoryError):
            store.write_text("in the way of a folder")


def graceful_stops(s: Scenario) -> Verdict:
    """SIGTERM under load: how long until it has ended, and how much the next start replays."""
    rig = s.rig()
    publisher, verifier = s.flow(rig, int(s.rate * (10 + 6 * s.times)))
    rig.worker()
    s.until_output(rig, verifier, 20)
    ends = []
    for _ in range(s.times):
        time.sleep(s.random.uniform(0.5, 3))
        worker = rig.workers[0]
        began = time.monotonic()
        worker.send(signal.SIGTERM)
        assert worker.process is not None
        worker.process.wait()
        ends.append(time.monotonic() - began)
        s.until_output(rig, verifier, 20)
    time.sleep(1)
    worker.send(signal.SIGTERM)
    worker.process.wait()
    log = worker.log.read_text()
    verdict = s.finish(rig, publisher, verifier)
    verdict.seconds["longest until ended"] = max(ends)
    verdict.counts["stops"] = s.times
    verdict.counts["replayed"] = log.count("replayed to catch up")
    return verdict
