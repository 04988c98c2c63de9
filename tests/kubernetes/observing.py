"""What happens to pods while something is done to them: their states as the API server tells them, and their probes."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from kube_cluster import KubeCluster
from rig import Verifier

__all__ = ["Answer", "PodState", "PodWatch", "Prober", "TimedVerifier"]


@dataclass(frozen=True)
class PodState:
    """A pod at a moment, as the API server tells it; `exit_code` once its container has ended."""

    at: float
    name: str
    uid: str
    ip: str | None
    ready: bool
    deleting: bool
    exit_code: int | None
    gone: bool


class PodWatch(threading.Thread):
    """`kubectl get pods --watch`, kept."""

    def __init__(self, cluster: KubeCluster, namespace: str) -> None:
        super().__init__(daemon=True)
        arguments = ("get", "pods", "-n", namespace, "--watch", "--output-watch-events", "-o", "json")
        self._process = subprocess.Popen(cluster.command(*arguments), stdout=subprocess.PIPE, text=True)
        self.states: list[PodState] = []

    def run(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            self.states.append(_state(event["type"], event["object"]))

    def stop(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.wait()

    def now(self) -> dict[str, PodState]:
        """The last known state of each pod that is there, by name."""
        last: dict[str, PodState] = {}
        for state in list(self.states):
            last[state.name] = state
        return {name: state for name, state in last.items() if not state.gone}

    def exits(self, since: float) -> dict[str, int]:
        """Exit codes of containers that ended since then, by the pod's uid."""
        return {s.uid: s.exit_code for s in list(self.states) if s.at >= since and s.exit_code is not None}

    def stopping_s(self, since: float) -> list[float]:
        """How long each pod took from the request to end to its end, of those that were asked since then."""
        asked: dict[str, float] = {}
        took: dict[str, float] = {}
        for state in list(self.states):
            if state.at >= since and state.deleting:
                asked.setdefault(state.uid, state.at)
            if state.uid in asked and (state.exit_code is not None or state.gone):
                took.setdefault(state.uid, state.at - asked[state.uid])
        return list(took.values())


def _state(event: str, pod: dict[str, Any]) -> PodState:
    status = pod.get("status", {})
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", ()))
    ended = [
        c["state"]["terminated"]["exitCode"] for c in status.get("containerStatuses", ()) if "terminated" in c["state"]
    ]
    return PodState(
        at=time.monotonic(),
        name=pod["metadata"]["name"],
        uid=pod["metadata"]["uid"],
        ip=status.get("podIP"),
        ready=ready,
        deleting="deletionTimestamp" in pod["metadata"],
        exit_code=ended[0] if ended else None,
        gone=event == "DELETED",
    )


@dataclass(frozen=True)
class Answer:
    """What a pod's probes said at a moment: HTTP statuses, None where nothing answered."""

    at: float
    uid: str
    healthz: int | None
    readyz: int | None


class Prober(threading.Thread):
    """Asks /healthz and /readyz of every pod, all the time, as the kubelet does."""

    def __init__(self, watch: PodWatch, every_s: float = 0.25) -> None:
        super().__init__(daemon=True)
        self._watch, self._every_s, self._ended = watch, every_s, threading.Event()
        self.answers: list[Answer] = []

    def run(self) -> None:
        while not self._ended.wait(self._every_s):
            for state in self._watch.now().values():
                if state.ip is not None:
                    base = f"http://{state.ip}:9464"
                    self.answers.append(
                        Answer(time.monotonic(), state.uid, _status(f"{base}/healthz"), _status(f"{base}/readyz"))
                    )

    def stop(self) -> None:
        """Ends it."""
        self._ended.set()
        self.join()

    def restoring_s(self, uid: str) -> float:
        """How long a pod said that it is alive and not ready."""
        at = [a.at for a in list(self.answers) if a.uid == uid and a.healthz == 200 and a.readyz == 503]
        return at[-1] - at[0] if at else 0.0


def _status(url: str) -> int | None:
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


class TimedVerifier(Verifier):
    """A verifier that remembers when outputs of each partition came."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.arrivals: list[tuple[float, int]] = []

    def _take(self, headers: dict[str, str], value: bytes) -> None:
        super()._take(headers, value)
        self.arrivals.append((self.newest, int(headers["origin"].split("/")[1])))

    def pauses_s(self, begin: float, end: float) -> dict[int, float]:
        """The longest time without an output, for each partition that had any, between two moments."""
        last: dict[int, float] = {}
        longest: dict[int, float] = {}
        for at, partition in [arrival for arrival in list(self.arrivals) if begin - 5 <= arrival[0] <= end]:
            if partition in last and at >= begin:
                longest[partition] = max(longest.get(partition, 0.0), at - max(last[partition], begin))
            last[partition] = at
        return longest
