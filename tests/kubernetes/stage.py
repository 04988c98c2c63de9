"""The stage of the cluster run: a Kafka that pods reach, the shipped base with a small pipeline, load, and a judge."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self

import yaml
from cluster import Cluster
from kube_cluster import NODE_IP, STATE, KubeCluster, wait_until
from observing import PodState, PodWatch, Prober, TimedVerifier
from rendering import DEPLOY
from rig import Publisher, Rig, Verdict, frames

__all__ = ["NAMESPACE", "Stage", "kafka_for_pods"]

NAMESPACE, WORKLOAD = "stepstream", "statefulset/stepstream"
PARTITIONS, RATE = 4, 10.0
READY_S = 300.0

VOLUME = {
    "apiVersion": "v1",
    "kind": "PersistentVolume",
    "metadata": {"name": "stepstream"},
    "spec": {
        "capacity": {"storage": "10Gi"},
        "accessModes": ["ReadWriteMany"],
        "storageClassName": "test",
        "persistentVolumeReclaimPolicy": "Retain",
        "hostPath": {"path": str(STATE), "type": "Directory"},
    },
}
KUSTOMIZATION = """\
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: {namespace}
resources: [{base}, volume.json]
replicas: [{{name: stepstream, count: {replicas}}}]
configMapGenerator:
  - {{name: stepstream-pipeline, behavior: replace, files: [pipeline.yaml]}}
images: [{{name: stepstream, newName: {name}, newTag: "{tag}"}}]
patches:
  - target: {{kind: PersistentVolumeClaim}}
    patch: |
      - {{op: add, path: /spec/storageClassName, value: test}}
  # Three pods and their Kafka share two cores with whatever else this machine does.
  - target: {{kind: StatefulSet}}
    patch: |
      - {{op: replace, path: /spec/template/spec/containers/0/resources/requests/cpu, value: 100m}}
      - {{op: replace, path: /spec/template/spec/containers/0/resources/limits/cpu, value: "1"}}
"""


def kafka_for_pods(folder: Path) -> Cluster:
    """One broker that listens on every address of these namespaces and is known by the node's, which pods reach."""
    kafka = Cluster(folder, 1)
    ports = kafka.ports[1]
    kafka.options |= {
        "listeners": f"PLAINTEXT://0.0.0.0:{ports['PLAINTEXT']},CONTROLLER://127.0.0.1:{ports['CONTROLLER']}",
        "advertised.listeners": f"PLAINTEXT://{NODE_IP}:{ports['PLAINTEXT']}",
    }
    return kafka


class Stage:
    """Everything up inside a `with`: pods ready, records flowing, outputs read along."""

    def __init__(self, cluster: KubeCluster, kafka: Cluster, folder: Path, images: tuple[str, str]) -> None:
        self.cluster, self.folder, self.images = cluster, folder, images
        shutil.rmtree(STATE / "rig", ignore_errors=True)
        self.rig = Rig(STATE / "rig", f"{NODE_IP}:{kafka.ports[1]['PLAINTEXT']}", PARTITIONS)
        self.publisher = Publisher(self.rig.connection, self.rig.topic, frames(), RATE, 1)
        self.verifier = TimedVerifier(self.rig.connection, f"{self.rig.topic}.out")
        self.watch: PodWatch
        self.prober: Prober

    def __enter__(self) -> Self:
        for path in (STATE, *STATE.rglob("*")):
            os.chown(path, 10001, 10001)
        self.apply(self.images[0])
        self.watch = PodWatch(self.cluster, NAMESPACE)
        self.watch.start()
        self.prober = Prober(self.watch)
        self.prober.start()
        self.publisher.start()
        self.verifier.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.publisher.enough.set()
        self.prober.stop()
        self.watch.stop()

    def apply(self, image: str, replicas: int = 2) -> list[str]:
        """The shipped base with this pipeline and image, server-side."""
        place = self.folder / "overlay"
        place.mkdir(parents=True, exist_ok=True)
        (place / "pipeline.yaml").write_text(self._pipeline())
        (place / "volume.json").write_text(json.dumps(VOLUME))
        base = os.path.relpath((DEPLOY / "kubernetes" / "base").resolve(), place.resolve())
        name, _, tag = image.rpartition(":")
        content = KUSTOMIZATION.format(namespace=NAMESPACE, base=base, name=name, tag=tag, replicas=replicas)
        (place / "kustomization.yaml").write_text(content)
        return self.cluster.apply(self.cluster.kubectl("kustomize", str(place)))

    def _pipeline(self) -> str:
        """The fault run's pipeline; the engine as the shipped file has it, with snapshots more often."""
        pipeline = yaml.safe_load(self.rig.file.read_text())
        own = {"snapshots": f"{STATE}/rig/snapshots", "snapshot_every_s": 2, "instance": "${POD_NAME}", "max_batch": 32}
        return yaml.safe_dump(pipeline | {"engine": {"kafka": own}})

    # ---- what phases do and ask

    def kubectl(self, *arguments: str) -> str:
        """kubectl in our namespace."""
        return self.cluster.kubectl("-n", NAMESPACE, *arguments, timeout_s=READY_S + 60)

    def pods(self) -> dict[str, PodState]:
        """Pods that are there."""
        return self.watch.now()

    def until(self, what: str, reached: Callable[[], Any], timeout_s: float = READY_S) -> float:
        """Waits; the seconds it took. Raises TimeoutError with what the pods said last."""
        began = time.monotonic()
        try:
            wait_until(what, reached, timeout_s, every_s=0.1)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.report()}") from error
        return time.monotonic() - began

    def until_ready(self, count: int) -> float:
        """Until there are exactly so many pods and all are ready."""

        def reached() -> bool:
            pods = self.pods().values()
            return len(pods) == count and all(pod.ready and not pod.deleting for pod in pods)

        return self.until(f"{count} pods ready", reached)

    def until_another(self, name: str, uid: str) -> float:
        """Until a pod of this name is there that is not the one with this uid."""
        return self.until(f"another {name}", lambda: name in self.pods() and self.pods()[name].uid != uid)

    def until_rolled_out(self) -> float:
        """Until the update is done in every pod."""
        began = time.monotonic()
        self.kubectl("rollout", "status", WORKLOAD, f"--timeout={READY_S:.0f}s")
        return time.monotonic() - began

    def until_outputs(self, more: int) -> float:
        """Until so many more outputs are committed."""
        goal = len(self.verifier.outputs) + more
        return self.until(f"{more} more outputs", lambda: len(self.verifier.outputs) >= goal)

    def report(self) -> str:
        """What a person would look at first."""
        found = [str(state) for state in self.pods().values()]
        for arguments in (
            ("get", "events", "--sort-by=.lastTimestamp"),
            ("logs", "-l", "app.kubernetes.io/name=stepstream", "--tail=20"),
        ):
            try:
                found.append("\n".join(self.kubectl(*arguments).splitlines()[-30:]))
            except RuntimeError as error:
                found.append(str(error))
        return "\n".join(found)

    def start_kubectl(self, *arguments: str, log: IO[str]) -> subprocess.Popen[str]:
        """A kubectl in the background."""
        return subprocess.Popen(self.cluster.command("-n", NAMESPACE, *arguments), stdout=log, stderr=log, text=True)

    def judge(self) -> Verdict:
        """Ends the load and compares all that came out with an undisturbed run."""
        self.publisher.enough.set()
        self.publisher.join(120)
        return self.rig.judge(self.verifier, wait_s=90)
