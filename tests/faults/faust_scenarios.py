"""The Faust engine under the same kills: nothing is lost, and behind `stepstream dedupe` each output stands once."""

from __future__ import annotations

import time

from rig import Publisher, Verdict, Verifier, Worker, frames
from scenarios import READY_S, Scenario

from stepstream.pipeline.topics import Needed, create_topics

__all__ = ["faust_kill_brokers", "faust_kill_workers"]


class _Faust:
    """Two Faust workers, a `stepstream dedupe` behind them, and readers of the topics before and behind it."""

    def __init__(self, s: Scenario, count: int) -> None:
        self.s, self.rig = s, s.rig(engine="faust")
        raw, once = f"{self.rig.topic}.out", f"{self.rig.topic}.once"
        create_topics([Needed(once, "outputs, each once", self.rig.connection)], self.rig.partitions, -1)
        self.publisher = Publisher(self.rig.connection, self.rig.topic, frames(), s.rate, count)
        self.raw, self.once = Verifier(self.rig.connection, raw), Verifier(self.rig.connection, once)
        for thread in (self.publisher, self.raw, self.once):
            thread.start()
        self.workers = [self.rig.worker(), self.rig.worker()]
        arguments = ("dedupe", raw, once, "--servers", self.rig.connection.servers)
        self.dedupe = self.rig.start(Worker(arguments, self.rig.folder / "dedupe.log"))
        s.until_output(self.rig, self.once, 20)

    def verdict(self) -> Verdict:
        """Of what stands behind `dedupe`; with the repeats that it took out."""
        verdict = self.s.finish(self.rig, self.publisher, self.once)
        self.raw.stop()
        verdict.counts |= {"repeats before dedupe": self.raw.repeated, "lost": verdict.expected - len(self.raw.outputs)}
        return verdict


def faust_kill_workers(s: Scenario) -> Verdict:
    """kill -9 of one of two Faust workers, and now and then of `dedupe`."""
    faust = _Faust(s, int(s.rate * (15 + 8 * s.times)))
    for turn in range(s.times):
        worker = faust.dedupe if turn % 5 == 4 else s.random.choice(faust.workers)
        deadline = time.monotonic() + READY_S
        while worker is not faust.dedupe and not worker.has_partitions and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(s.random.uniform(0, 3))
        worker.kill()
        faust.rig.supervise()
    verdict = faust.verdict()
    verdict.counts["kills"] = s.times
    return verdict


def faust_kill_brokers(s: Scenario) -> Verdict:
    """kill -9 of one broker after the other under Faust workers."""
    faust = _Faust(s, int(s.rate * (15 + 16 * s.times)))
    gaps = []
    for turn in range(s.times):
        node = 1 + turn % s.cluster.nodes
        s.cluster.kill(node)
        gaps.append(s.until_output(faust.rig, faust.once, 10, 2 * READY_S))
        s.cluster.start(node)
        s.cluster.wait_ready()
    verdict = faust.verdict()
    verdict.seconds["longest until 10 more outputs"] = max(gaps)
    verdict.counts["kills"] = s.times
    return verdict
