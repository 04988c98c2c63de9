"""deploy/helm/stepstream says the same as deploy/kubernetes, refuses what makes no sense, and keeps to its names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("kubernetes_validate")
sys.path.insert(0, str(Path(__file__).parent))

from programs import helm, kubectl, wait_for_builds
from rendering import CHART, CHART_VALUES, DEPLOY, Object, comparable, kustomized, objects, rendered_chart
from schemas import problems

needs_helm = pytest.mark.usefixtures("a_helm")
needs_kubectl = pytest.mark.skipif(kubectl() is None, reason="no kubectl to render kustomizations with")


@pytest.fixture(scope="module")
def a_helm() -> None:
    """One that is there or is being built right now (tests/prepare.py)."""
    wait_for_builds()
    if helm() is None:
        pytest.skip("no helm; `python -m tests.kubernetes.programs helm` builds it with Go")


@needs_helm
@needs_kubectl
@pytest.mark.parametrize("overlay", CHART_VALUES)
def test_chart_and_overlay_are_the_same_objects(overlay: str) -> None:
    ours, theirs = comparable(rendered_chart(*CHART_VALUES[overlay])), comparable(kustomized(overlay))
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert ours[name] == wanted, name


@needs_helm
@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_what_no_overlay_says_is_valid_too(version: str) -> None:
    options = (
        "--set=image.digest=sha256:" + "0" * 64,
        "--set=imagePullSecrets[0].name=registry",
        "--set=priorityClassName=high",
        "--set=podAnnotations.team=traffic",
        "--set=serviceAccount.annotations.role=arn",
        "--set=extraEnv[0].name=TZ",
        "--set=extraEnv[0].value=UTC",
        "--set=snapshots.volume.storageClass=nfs",
        '--set-json=affinity={"podAntiAffinity": {}}',
        "--set=serviceMonitor.enabled=true",
        "--set=serviceMonitor.labels.release=prometheus",
        "--set=keda.enabled=true",
        "--set=keda.sasl=false",
    )
    found = objects(rendered_chart(release="la", options=options))
    for one in found:
        assert not problems(one, version), one
    (stateful,) = [one for one in found if one["kind"] == "StatefulSet"]
    assert stateful["metadata"]["name"] == "la-stepstream"
    (container,) = stateful["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "stepstream@sha256:" + "0" * 64
    assert container["env"][-1] == {"name": "TZ", "value": "UTC"}
    (scaled,) = [one for one in found if one["kind"] == "ScaledObject"]
    assert "authenticationRef" not in scaled["spec"]["triggers"][0]
    assert scaled["spec"]["scaleTargetRef"]["name"] == "la-stepstream"
    assert not [one for one in found if one["kind"] == "TriggerAuthentication"]


@needs_helm
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("replica=3", "replica"),
        ("image.tag=latest", "tag"),
        ("resources.limits.memory=null", "memory"),
        ("terminationGracePeriodSeconds=5", "terminationGracePeriodSeconds"),
        ("keda.lagThreshold=0", "lagThreshold"),
        ("kafka.credentialsSecret=Not_A_Name", "credentialsSecret"),
    ],
)
def test_values_that_make_no_sense_are_refused(option: str, said: str) -> None:
    with pytest.raises(RuntimeError, match=said):
        rendered_chart(options=(f"--set={option}",))


@needs_helm
def test_keda_with_sasl_asks_for_the_secret() -> None:
    with pytest.raises(RuntimeError, match="credentialsSecret"):
        rendered_chart(options=("--set=keda.enabled=true",))


@needs_helm
def test_a_changed_pipeline_changes_the_pods() -> None:
    def annotations(*options: str) -> Object:
        (found,) = [o for o in objects(rendered_chart(options=options)) if o["kind"] == "StatefulSet"]
        return found["spec"]["template"]["metadata"]["annotations"]

    assert annotations() == annotations()
    assert annotations() != annotations("--set=settings.KAFKA_SERVERS=other:9092")


def test_the_values_files_hold_the_overlays_pipelines() -> None:
    """Also where there is no Helm: the two copies of a pipeline file are one text."""
    for values, place in (("values.yaml", "base"), ("values-production.yaml", "overlays/production")):
        text = (DEPLOY / "kubernetes" / place / "pipeline.yaml").read_text()
        assert yaml.safe_load((CHART / values).read_text())["pipeline"] == text
