"""The other faults: networks that are cut, crashes at one exact moment, bad input, brokers that do not answer."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from kafka import TopicPartition
from kafka.admin import MemberToRemove
from rig import FORECAST, Rig, Verdict, frames
from scenarios import Scenario

from stepstream.connectors import kafka_client
from stepstream.connectors.kafka_messages import headers_of
from stepstream.connectors.records import Record

__all__ = [
    "CUT_USER",
    "bad_input",
    "cannot_cut",
    "crash_before_commit",
    "cut_off",
    "no_answer",
    "put_out",
    "seek_back",
    "warm_standby",
]

CUT_USER = 12345
"""The worker that is cut off runs as this user, so that a rule of the firewall can be about it alone."""

ALIGNED = "[{{align: {{every: 5min, lateness: 20min}}}}, " + FORECAST[1:]


def cannot_cut() -> str | None:
    """Why no worker can be cut off here; None if one can."""
    if os.geteuid() != 0:
        return "only root can cut a worker off from the network"
    if shutil.which("iptables") is None or shutil.which("setpriv") is None:
        return "no iptables to cut a worker off with"
    return None


def _firewall(action: str) -> None:
    rule = ["-p", "tcp", "-m", "owner", "--uid-owner", str(CUT_USER), "-j", "DROP"]
    subprocess.run(["iptables", "--wait", "30", action, "OUTPUT", *rule], check=True, capture_output=True)


def cut_off(s: Scenario) -> Verdict:
    """One of two workers loses its network, in mid-commit if it is in one, past its session timeout."""
    # A folder that this user can reach: a test's own is root's alone, all the way up.
    rig = dataclasses.replace(s, folder=Path(tempfile.mkdtemp(prefix="stepstream-cut-"))).rig()
    for path in (rig.folder.parent, rig.folder, *rig.folder.rglob("*")):
        path.chmod(0o777)
    publisher, verifier = s.flow(rig, int(s.rate * (12 + 18 * s.times)))
    user = str(CUT_USER)
    rig.worker(prefix=("setpriv", "--reuid", user, "--regid", user, "--clear-groups"))
    rig.worker("engine.kafka.snapshots=" + str(rig.folder / "snapshots-2"))
    s.until_output(rig, verifier, 20)
    deadline = time.monotonic() + 60
    while not all(worker.has_partitions for worker in rig.workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    had_partitions = int(rig.workers[0].has_partitions)
    for _ in range(s.times):
        time.sleep(s.random.uniform(1, 3))
        _firewall("-A")
        try:
            time.sleep(s.random.uniform(7, 10))
        finally:
            _firewall("-D")
        s.until_output(rig, verifier, 10)
    verdict = s.finish(rig, publisher, verifier)
    verdict.counts["cuts"] = s.times * had_partitions
    return verdict


def crash_before_commit(s: Scenario) -> Verdict:
    """The worker ends when a snapshot is in the store and no manifest names it."""
    rig = s.rig()
    publisher, verifier = s.flow(rig, int(s.rate * (15 + 8 * s.times)))
    worker = rig.worker()
    s.until_output(rig, verifier, 150)
    crashes = 0
    for _ in range(s.times):
        worker.kill()
        worker.program = (sys.executable, str(Path(__file__).with_name("crashing.py")), str(s.random.randint(2, 5)))
        worker.start()
        assert worker.process is not None
        try:
            crashes += worker.process.wait(timeout=40) == 137
        except subprocess.TimeoutExpired:
            worker.kill()
        worker.program = ()
        worker.start()
        s.until_output(rig, verifier, 20)
    verdict = s.finish(rig, publisher, verifier)
    verdict.counts["crashes"] = crashes
    return verdict


def spoilt(records: list[Record], s: Scenario) -> tuple[list[Record], Counter[str]]:
    """1 % corrupt, 5 % twice, 5 % out of order (a few places later)."""
    result: list[tuple[float, Record]] = []
    counts: Counter[str] = Counter()
    for number, record in enumerate(records):
        chance, place = s.random.random(), float(number)
        if chance < 0.01:
            counts["corrupt"] += 1
            record = dataclasses.replace(record, value=b"\x00 not a record")
        elif chance < 0.06:
            counts["twice"] += 1
            result.append((place + s.random.uniform(0, 30), record))
        elif chance < 0.11:
            counts["out of order"] += 1
            place += s.random.uniform(1, 40)
        result.append((place, record))
    return [record for _, record in sorted(result, key=lambda pair: pair[0])], counts


def bad_input(s: Scenario) -> Verdict:
    """Corrupt, repeated and disordered input under kills: outputs and dead letters as in an undisturbed run."""
    rig = s.rig(operators=ALIGNED)
    records, counts = spoilt(list(frames(int(s.rate * (20 + 4 * s.times)))), s)
    publisher, verifier = s.flow(rig, 0, records)
    rig.worker(), rig.worker()
    s.until_output(rig, verifier, 20)
    for _ in range(s.times):
        time.sleep(s.random.uniform(0.5, 4))
        s.random.choice(rig.workers).kill()
        rig.supervise()
    verdict = s.finish(rig, publisher, verifier)
    _, dead = rig.undisturbed()
    wanted = Counter((f"{d.record.origin.partition}/{d.record.origin.offset}", d.operator, d.reason) for d in dead)
    found = dead_letters(rig)
    verdict.counts |= {**counts, "dead letters": sum(found.values())}
    verdict.unexpected += sum((found - wanted).values())
    verdict.missing += sum((wanted - found).values())
    return verdict


def dead_letters(rig: Rig) -> Counter[tuple[str, str, str]]:
    """(partition/offset, operator, reason) of all committed dead letters."""
    consumer = kafka_client.consumer(rig.connection)
    topic = f"{rig.topic}.out.dead"
    places = [TopicPartition(topic, number) for number in range(rig.partitions)]
    consumer.assign(places)
    consumer.seek_to_beginning(*places)
    ends = consumer.end_offsets(places)
    found: Counter[tuple[str, str, str]] = Counter()
    while any((consumer.position(place) or 0) < ends[place] for place in places):
        for messages in consumer.poll(timeout_ms=500).values():
            for message in messages:
                headers = headers_of(message.headers)
                _, partition, offset = headers["origin"].rsplit("/", 2)
                found[f"{partition}/{offset}", headers["operator"], headers["reason"]] += 1
    consumer.close(autocommit=False)
    return found


def resident_mb(pid: int) -> float:
    """Resident memory of a process."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def no_answer(s: Scenario) -> Verdict:
    """Brokers that do not answer while a backlog waits: nothing more is read, and memory stays flat."""
    rig = s.rig()
    s.rate *= 20
    publisher, verifier = s.flow(rig, 0, list(frames(150 * (10 + 10 * s.times))))
    worker = rig.worker()
    s.until_output(rig, verifier, 300)
    assert worker.process is not None
    before, most = resident_mb(worker.process.pid), []
    for _ in range(s.times):
        for node in range(1, s.cluster.nodes + 1):
            s.cluster.pause(node)
        for _ in range(8):
            time.sleep(1)
            most.append(resident_mb(worker.process.pid))
        for node in range(1, s.cluster.nodes + 1):
            s.cluster.resume(node)
        s.until_output(rig, verifier, 50)
    verdict = s.finish(rig, publisher, verifier)
    verdict.counts |= {"MB before": round(before), "MB at most without answers": round(max(most))}
    return verdict


def put_out(s: Scenario) -> Verdict:
    """Members are put out of the group while they work: what they have polled is not theirs any more.

    kafka-python 3.0.12 then offers metadata without a member, and brokers check no commit that has none.
    """
    rig = s.rig()
    publisher, verifier = s.flow(rig, int(s.rate * (12 + 3 * s.times)))
    rig.worker(), rig.worker()
    s.until_output(rig, verifier, 20)
    client = kafka_client.admin(rig.connection)
    put = 0
    for _ in range(s.times):
        time.sleep(s.random.uniform(0.2, 2))
        members = [m["member_id"] for m in client.describe_groups([rig.group])[rig.group]["members"]]
        if members:
            client.remove_group_members(rig.group, [MemberToRemove(member_id=s.random.choice(members))])
            put += 1
    client.close()
    verdict = s.finish(rig, publisher, verifier)
    verdict.counts["put out"] = put
    return verdict


def warm_standby(s: Scenario) -> Verdict:
    """Workers that follow each other's partitions: what one leaves, the other goes on with, without a snapshot."""
    rig = s.rig()
    publisher, verifier = s.flow(rig, int(s.rate * (15 + 10 * s.times)))
    for _ in range(2):
        rig.worker("engine.kafka.standby=true")
    s.until_output(rig, verifier, 20)
    taken = []
    for turn in range(s.times):
        time.sleep(s.random.uniform(3, 5))
        rig.workers[turn % 2].kill()
        taken.append(s.until_output(rig, verifier, 30))
    verdict = s.finish(rig, publisher, verifier)
    verdict.seconds["longest until 30 more outputs"] = max(taken)
    verdict.counts["kills"] = s.times
    return verdict


def seek_back(s: Scenario) -> Verdict:
    """No snapshots at all: whoever takes over reads again as many frames as the model looks back on, and no more."""
    rig = s.rig()
    publisher, verifier = s.flow(rig, int(s.rate * (15 + 8 * s.times)))
    for _ in range(2):
        rig.worker("engine.kafka.snapshots=null")
    s.until_output(rig, verifier, 400)
    for turn in range(s.times):
        rig.workers[turn % 2].kill()
        s.until_output(rig, verifier, 150)
    verdict = s.finish(rig, publisher, verifier)
    logs = "".join(worker.log.read_text() for worker in rig.workers)
    again = [int(m[2]) - int(m[1]) for m in re.finditer(r"restored .*from=(\d+) committed=(\d+)", logs)]
    verdict.counts |= {"kills": s.times, "most records read again": max(again)}
    return verdict
