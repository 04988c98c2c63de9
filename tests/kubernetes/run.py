"""The cluster run: a real one-node Kubernetes, every shipped manifest applied, a deployment put through its life.

python -m tests.kubernetes.run [--image NAME:TAG --image-tar FILE [--new-image NAME:TAG]] [--only PHASE]...
    [--out FOLDER]

As root, with what programs.py says is needed. Without an image it makes a stand-in of this tree (stand_in.py).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / name) for name in ("kubernetes", "integration", "faults")]

from kube_cluster import KubeCluster, in_own_namespaces  # noqa: E402
from programs import CACHE, KUBERNETES, helm, missing  # noqa: E402
from rendering import CHART_VALUES, CRDS, DEPLOY, OVERLAYS, kustomized, rendered_chart  # noqa: E402

PAUSE = "docker.io/local/pause:1"
NAME = "docker.io/library/stepstream"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", help="a name of the image in --image-tar")
    parser.add_argument(
        "--new-image", help="another name in it, which is rolled out; else the same image under a new name"
    )
    parser.add_argument("--image-tar", type=Path, help="what `docker save` wrote")
    parser.add_argument("--only", action="append", help="a phase, or apply (every manifest); come-up is always one")
    parser.add_argument("--minutes", type=float, default=60, help="no phase is begun after so long")
    parser.add_argument("--out", type=Path, help="a folder that keeps logs and results.json")
    arguments = parser.parse_args()
    if (reason := missing()) is not None:
        sys.exit(reason)
    in_own_namespaces()
    folder = (arguments.out or Path(tempfile.mkdtemp(prefix="stepstream-kubernetes-"))).resolve()
    print(f"logs and results.json: {folder}", flush=True)
    chosen = Chosen(arguments.image, arguments.new_image, arguments.image_tar, arguments.only, arguments.minutes * 60)
    results = run(folder, chosen)
    sys.exit(0 if results["exact"] else 1)


@dataclass(frozen=True)
class Chosen:
    """What the command line says."""

    image: str | None
    new_image: str | None
    tar: Path | None
    only: list[str] | None
    longest_s: float

    def leaves_out(self, phase: str, seconds: float) -> bool:
        """Whether a phase is not run, so long after the first."""
        return seconds > self.longest_s or bool(self.only and phase not in ("come-up", *self.only))


def run(folder: Path, chosen: Chosen) -> dict[str, Any]:
    """Everything; what was measured, also in results.json."""
    from phases import PHASES
    from stage import NAMESPACE, Stage, kafka_for_pods

    results: dict[str, Any] = {
        "kubernetes": KUBERNETES,
        "image": chosen.image or "stand-in",
        "phases": {},
        "exact": False,
    }

    def keep() -> None:
        (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    folder.mkdir(parents=True, exist_ok=True)
    with KubeCluster(folder / "cluster", CACHE / "bin") as cluster:
        results["node ready after s"] = cluster.seconds["node ready"]
        print(f"node ready after {cluster.seconds['node ready']:.1f} s", flush=True)
        images = import_images(cluster, chosen)
        if not chosen.only or "apply" in chosen.only:
            results["applied"] = apply_everything(cluster)
        keep()
        cluster.kubectl("create", "namespace", NAMESPACE)
        with kafka_for_pods(folder / "kafka") as kafka, Stage(cluster, kafka, folder, images) as stage:
            first = time.monotonic()
            for name, phase in PHASES.items():
                if chosen.leaves_out(name, time.monotonic() - first):
                    continue
                print(f"{name}: {phase.__doc__}", flush=True)
                began = time.monotonic()
                try:
                    measured = phase(stage)
                except (AssertionError, TimeoutError, RuntimeError) as error:
                    measured = {"failed": f"{type(error).__name__}: {error}"}
                pauses = stage.verifier.pauses_s(began, time.monotonic())
                measured |= {
                    "longest pause of a partition s": max(pauses.values(), default=0.0),
                    "repeated": stage.verifier.repeated,
                }
                results["phases"][name] = measured
                print(f"  {measured}", flush=True)
                keep()
            verdict = stage.judge()
        results["verdict"] = asdict(verdict)
        results["exact"] = verdict.exact and not any("failed" in m for m in results["phases"].values())
    keep()
    print(f"{'exactly once' if verdict.exact else 'NOT exactly once'}: {verdict}", flush=True)
    return results


def import_images(cluster: KubeCluster, chosen: Chosen) -> tuple[str, str]:
    """Two names of images, the second for a rollout; the sandbox's image beside them."""
    from stand_in import pause_image, stand_in, write_archive

    if PAUSE not in cluster.images():
        cluster.import_image(lambda out: write_archive({PAUSE: pause_image()}, out))
    if (tar := chosen.tar) is not None and chosen.image is not None:
        with tar.open("rb") as content:
            cluster.import_image(lambda out: shutil.copyfileobj(content, out))
        image = _long_name(chosen.image)
        if chosen.new_image is not None:
            return image, _long_name(chosen.new_image)
        cluster.tag(image, again := f"{image}-again")
        return image, again
    names = (f"{NAME}:0.1.0", f"{NAME}:0.1.1")
    made = {name: stand_in(name) for name in names}
    there = cluster.contents()
    began = time.monotonic()
    cluster.import_image(lambda out: write_archive(made, out, there))
    print(f"imported {' and '.join(names)} in {time.monotonic() - began:.1f} s", flush=True)
    return names


def _long_name(image: str) -> str:
    """What containerd calls an image that `docker save` wrote under a short name."""
    return image if "/" in image else f"docker.io/library/{image}"


def apply_everything(cluster: KubeCluster) -> dict[str, int]:
    """Every overlay and the chart with each values file, server-side and strict; how many objects each has."""
    for crd in CRDS:
        cluster.apply(crd.read_text())
    for crd in cluster.get("crds")["items"]:
        cluster.kubectl("wait", "--for=condition=Established", f"crd/{crd['metadata']['name']}", "--timeout=60s")
    charts = {f"chart-{number}": values for number, values in enumerate(CHART_VALUES.values())}
    for namespace in ("kafka", "stepstream", *charts):
        cluster.apply(json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}))
    applied = {overlay: len(cluster.apply(kustomized(overlay))) for overlay in OVERLAYS}
    applied["examples"] = len(cluster.apply((DEPLOY / "kubernetes" / "examples" / "secrets.yaml").read_text()))
    for namespace, values in charts.items() if helm() is not None else ():
        rendered = rendered_chart(*values, namespace=namespace)
        applied[f"chart {' '.join(values) or 'values.yaml'}"] = len(cluster.apply(rendered, "-n", namespace))
    cluster.kubectl("delete", "namespace", "stepstream", "stepstream-dev", *charts, timeout_s=300)
    print(f"applied: {applied}", flush=True)
    return applied


if __name__ == "__main__":
    main()
