"""Rendered manifests: by kustomize (through kubectl) and by Helm, as the objects that a cluster would be given."""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from programs import helm, kubectl

__all__ = [
    "CHART",
    "CHART_VALUES",
    "CRDS",
    "DEPLOY",
    "OVERLAYS",
    "comparable",
    "containers",
    "kustomized",
    "objects",
    "rendered_chart",
]

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CHART = DEPLOY / "helm" / "stepstream"
OVERLAYS = ("base", "overlays/dev", "overlays/production", "overlays/gpu", "strimzi")
CHART_VALUES: dict[str, tuple[str, ...]] = {
    "base": (),
    "overlays/dev": ("values-dev.yaml",),
    "overlays/production": ("values-production.yaml",),
    "overlays/gpu": ("values-production.yaml", "values-gpu.yaml"),
}
"""Which values files of the chart say what an overlay says."""
CRDS = sorted(Path(__file__).with_name("crds").glob("*.yaml"))

Object = dict[str, Any]
_AS = ("--kube-version=1.34",)  # a helm that `go install` built takes the cluster for 1.20


def kustomized(overlay: str) -> str:
    """An overlay of deploy/kubernetes, as YAML. Raises RuntimeError with what kustomize said."""
    return _output([str(kubectl()), "kustomize", str(DEPLOY / "kubernetes" / overlay)])


def rendered_chart(
    *values: str, release: str = "stepstream", namespace: str = "stepstream", options: tuple[str, ...] = ()
) -> str:
    """The chart with values files of its own, as YAML. Raises RuntimeError with what Helm said."""
    files = [f"--values={CHART / name}" for name in values]
    return _output([str(helm()), "template", release, str(CHART), "--namespace", namespace, *_AS, *files, *options])


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    return done.stdout


def objects(text: str) -> list[Object]:
    """The objects of a YAML stream."""
    return [found for found in yaml.safe_load_all(text) if found]


def containers(found: Object) -> Iterator[tuple[Object, Object]]:
    """(pod's spec, container) of an object that has pods."""
    pod = found.get("spec", {}).get("template", {}).get("spec")
    if pod is not None:
        for container in (*pod.get("initContainers", ()), *pod["containers"]):
            yield pod, container


def comparable(text: str) -> dict[tuple[str, str], Object]:
    """Objects by kind and name, without what only one of the two tools writes: namespace, Helm's labels and checksum,
    the hash in a ConfigMap's name. A Namespace is no part of a chart.
    """
    plain = re.sub(r"\b(stepstream-(?:pipeline|settings))-[a-z0-9]{10}\b", r"\1", text)
    result: dict[tuple[str, str], Object] = {}
    for found in objects(plain):
        if found["kind"] == "Namespace":
            continue
        one = copy.deepcopy(found)
        one["metadata"].pop("namespace", None)
        for label in ("helm.sh/chart", "app.kubernetes.io/managed-by"):
            one["metadata"].get("labels", {}).pop(label, None)
        for pod in [one.get("spec", {}).get("template")] if one["kind"] == "StatefulSet" else []:
            pod["metadata"]["annotations"].pop("checksum/config", None)
        result[one["kind"], one["metadata"]["name"]] = one
    return result
