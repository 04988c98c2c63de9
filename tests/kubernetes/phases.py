"""What is done to a running deployment. Each phase returns what it measured and raises where something did not hold."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable

from kube_cluster import NODE, STATE
from stage import WORKLOAD, Stage

__all__ = ["PHASES", "Measured"]

Measured = dict[str, float | int | str]


def come_up(stage: Stage) -> Measured:
    """From `apply` to ready, and to the first forecast."""
    ready = stage.until_ready(2)
    first = stage.until_outputs(1)
    return {"ready after s": ready, "first forecast after s": ready + first}


def delete_pod(stage: Stage) -> Measured:
    """Deleted as a person deletes it: preStop and SIGTERM drain it, within the grace period, with exit code 0."""
    began = time.monotonic()
    before = stage.pods()["stepstream-0"].uid
    stage.kubectl("delete", "pod", "stepstream-0", "--wait=false")
    stage.until_another("stepstream-0", before)
    stage.until_ready(2)
    return {"ready again after s": time.monotonic() - began, **_stopping(stage, began)}


def kill_pod(stage: Stage) -> Measured:
    """Deleted by force: the API server forgets it at once, and its successor has the same transactional id."""
    before = stage.pods()["stepstream-1"].uid
    began = time.monotonic()
    stage.kubectl("delete", "pod", "stepstream-1", "--force", "--grace-period=0")
    stage.until_another("stepstream-1", before)
    stage.until_ready(2)
    return {"ready again after s": time.monotonic() - began}


def new_image(stage: Stage) -> Measured:
    """Rolled out one by one, each ready before the next; and back."""
    began = time.monotonic()
    stage.apply(stage.images[1])
    forth = stage.until_rolled_out()
    images = stage.kubectl("get", "pods", "-o", "jsonpath={.items[*].spec.containers[0].image}").split()
    assert images == [stage.images[1]] * 2, images
    stage.kubectl("rollout", "undo", WORKLOAD)
    back = stage.until_rolled_out()
    images = stage.kubectl("get", "pods", "-o", "jsonpath={.items[*].spec.containers[0].image}").split()
    assert images == [stage.images[0]] * 2, images
    return {"rollout s": forth, "rollback s": back, **_stopping(stage, began)}


def scale(stage: Stage) -> Measured:
    """1, 3, 2."""
    began = time.monotonic()
    measured: Measured = {}
    for count in (1, 3, 2):
        stage.kubectl("scale", WORKLOAD, f"--replicas={count}")
        measured[f"to {count} s"] = stage.until_ready(count)
        stage.until_outputs(40)
    return measured | _stopping(stage, began)


def drain_node(stage: Stage) -> Measured:
    """One pod goes, the budget holds the other until the first is ready elsewhere (here: on the node, uncordoned)."""
    began = time.monotonic()
    log = stage.folder / "drain.log"
    with log.open("w") as out:
        selector = "--pod-selector=app.kubernetes.io/name=stepstream"
        drain = stage.start_kubectl("drain", NODE, "--delete-emptydir-data", selector, "--timeout=300s", log=out)
        stage.until("the budget refuses the second eviction", lambda: "disruption budget" in log.read_text())
        stage.until("the evicted pod waits for a node", lambda: any(not p.ip for p in stage.pods().values()))
        time.sleep(5)
        pods = list(stage.pods().values())
        assert [pod.ready and not pod.deleting for pod in pods].count(True) == 1, pods
        assert "disruption budget" in log.read_text().splitlines()[-1], log.read_text()
        stage.kubectl("uncordon", NODE)
        # kubectl drains what it found at the beginning: both pods of then.
        stage.until("the drain is done", lambda: drain.poll() is not None)
    assert drain.returncode == 0, log.read_text()
    stage.kubectl("uncordon", NODE)
    stage.until_ready(2)
    assert log.read_text().count("evicted") >= 2, log.read_text()
    return {"drain s": time.monotonic() - began, **_stopping(stage, began)}


def restore(stage: Stage) -> Measured:
    """Without its snapshots a pod computes its state again from the log: alive, not ready, then ready."""
    stage.kubectl("scale", WORKLOAD, "--replicas=0")
    stage.until("no pods", lambda: not stage.pods())
    shutil.rmtree(STATE / "rig" / "snapshots")
    stage.kubectl("scale", WORKLOAD, "--replicas=2")
    ready = stage.until_ready(2)
    restoring = [stage.prober.restoring_s(pod.uid) for pod in stage.pods().values()]
    assert max(restoring) > 0, "no pod ever said that it is alive and not ready"
    stage.until_outputs(40)
    return {"ready after s": ready, "alive and not ready s": max(restoring)}


def _stopping(stage: Stage, since: float) -> Measured:
    took = stage.watch.stopping_s(since)
    codes = stage.watch.exits(since)
    assert took and max(took) < 55, took
    assert codes and set(codes.values()) == {0}, codes
    return {"stopped": len(took), "longest stop s": max(took)}


PHASES: dict[str, Callable[[Stage], Measured]] = {
    "come-up": come_up,
    "new-image": new_image,
    "delete-pod": delete_pod,
    "kill-pod": kill_pod,
    "scale": scale,
    "drain": drain_node,
    "restore": restore,
}
