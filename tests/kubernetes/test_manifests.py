"""deploy/kubernetes without a cluster: every overlay renders, is valid in several Kubernetes versions, is closed."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("kubernetes_validate")
sys.path.insert(0, str(Path(__file__).parent))

from programs import kubectl
from rendering import DEPLOY, OVERLAYS, Object, containers, kustomized, objects
from schemas import problems

from stepstream.connectors.kafka import KafkaSource
from stepstream.pipeline.config import PipelineConfig
from stepstream.pipeline.pipeline import Pipeline
from stepstream.pipeline.topics import needed_topics

pytestmark = pytest.mark.skipif(kubectl() is None, reason="no kubectl to render kustomizations with")
VERSIONS = ("1.30", "1.34", "1.37")
WORKLOADS = ("base", "overlays/dev", "overlays/production", "overlays/gpu")
ENVIRONMENT = {"POD_NAME": "stepstream-0", "KAFKA_USERNAME": "u", "KAFKA_PASSWORD": "secret"}


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Object]]:
    return {overlay: objects(kustomized(overlay)) for overlay in OVERLAYS}


def one(found: list[Object], kind: str, name: str = "stepstream") -> Object:
    (match,) = [o for o in found if o["kind"] == kind and re.sub(r"-[a-z0-9]{10}$", "", o["metadata"]["name"]) == name]
    return match


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(rendered: dict[str, list[Object]], overlay: str, version: str) -> None:
    assert rendered[overlay]
    for found in rendered[overlay]:
        assert not problems(found, version), f"{found['kind']} {found['metadata']['name']}"


def test_the_example_secrets_are_valid_and_hold_no_secret() -> None:
    found = objects((DEPLOY / "kubernetes" / "examples" / "secrets.yaml").read_text())
    assert {o["metadata"]["name"] for o in found} == {"stepstream-kafka", "stepstream-kafka-ca", "stepstream-s3"}
    for secret in found:
        assert not problems(secret, VERSIONS[0])
        assert all(name == "username" or "REPLACE-ME" in value for name, value in secret["stringData"].items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["spec"].update(replica=3), "replica"),
        (lambda s: s["spec"]["template"]["spec"]["containers"][0].update(image=7), "image"),
    ],
)
def test_the_validation_sees_a_wrong_field(rendered: dict[str, list[Object]], change: Any, said: str) -> None:
    wrong = yaml.safe_load(yaml.safe_dump(one(rendered["base"], "StatefulSet")))
    change(wrong)
    assert said in " ".join(problems(wrong, "1.34"))


def test_the_validation_sees_a_wrong_field_of_a_custom_resource(rendered: dict[str, list[Object]]) -> None:
    wrong = yaml.safe_load(yaml.safe_dump(one(rendered["overlays/production"], "ScaledObject")))
    wrong["spec"]["maxReplicas"] = 3
    wrong["spec"]["triggers"][0]["metadata"]["lagThreshold"] = 5
    assert "maxReplicas" in " ".join(problems(wrong, "1.34"))
    assert "lagThreshold" in " ".join(problems(wrong, "1.34"))


@pytest.mark.parametrize("overlay", WORKLOADS)
def test_the_pods_are_closed(rendered: dict[str, list[Object]], overlay: str) -> None:
    pods = [(pod, container) for o in rendered[overlay] for pod, container in containers(o)]
    assert pods
    for pod, container in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert not any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))
        assert not any("hostPath" in volume for volume in pod["volumes"])
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert "privileged" not in security
        for kind in ("requests", "limits"):
            assert {"cpu", "memory", "ephemeral-storage"} <= container["resources"][kind].keys()
        assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
        name, _, tag = container["image"].rpartition(":")
        assert name and re.fullmatch(r"\d+\.\d+\.\d+(-cuda)?", tag)
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert writable == {"/tmp", "/var/lib/stepstream"}


@pytest.mark.parametrize("overlay", WORKLOADS)
def test_secrets_come_by_reference(rendered: dict[str, list[Object]], overlay: str) -> None:
    assert not [o for o in rendered[overlay] if o["kind"] == "Secret"]
    for o in rendered[overlay]:
        for _, container in containers(o):
            plain = [e["name"] for e in container["env"] if "value" in e]
            assert not [name for name in plain if re.search("PASSWORD|SECRET|TOKEN|KEY", name)]


@pytest.mark.parametrize("overlay", WORKLOADS)
def test_probes_and_grace(rendered: dict[str, list[Object]], overlay: str) -> None:
    stateful = one(rendered[overlay], "StatefulSet")
    ((pod, container),) = containers(stateful)
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
    assert (
        container["livenessProbe"]["httpGet"]
        == container["startupProbe"]["httpGet"]
        == {"path": "/healthz", "port": "metrics"}
    )
    options = _pipeline(rendered[overlay]).engine.options
    pre_stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    # The last batch may take as long again as the last snapshots.
    assert (
        pod["terminationGracePeriodSeconds"]
        >= pre_stop + 2 * options.stop_within_s + options.transaction_timeout_ms / 1000
    )
    starting = container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"]
    assert starting >= 120


@pytest.mark.parametrize("overlay", WORKLOADS)
def test_names_and_selectors_meet(rendered: dict[str, list[Object]], overlay: str) -> None:
    found = rendered[overlay]
    stateful = one(found, "StatefulSet")
    labels = stateful["spec"]["template"]["metadata"]["labels"]
    assert stateful["spec"]["selector"]["matchLabels"] == labels
    service = one(found, "Service")
    assert service["metadata"]["name"] == stateful["spec"]["serviceName"]
    assert service["spec"]["selector"] == labels and service["spec"]["clusterIP"] == "None"
    assert one(found, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert one(found, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    pod = stateful["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == one(found, "ServiceAccount")["metadata"]["name"]
    names = {o["metadata"]["name"] for o in found if o["kind"] == "ConfigMap"}
    used = {v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v}
    used |= {e["configMapRef"]["name"] for e in pod["containers"][0]["envFrom"] if "configMapRef" in e}
    assert used == names
    claims = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    assert claims == {o["metadata"]["name"] for o in found if o["kind"] == "PersistentVolumeClaim"}
    for spread in pod["topologySpreadConstraints"]:
        assert spread["labelSelector"]["matchLabels"] == labels
    namespaces = {o["metadata"].get("namespace") for o in found if o["kind"] != "Namespace"}
    assert namespaces == {one(found, "Namespace", found[0]["metadata"]["name"])["metadata"]["name"]}


def test_a_changed_pipeline_changes_the_pods(rendered: dict[str, list[Object]]) -> None:
    """Else `apply` would leave pods on the old pipeline."""
    named = [o["metadata"]["name"] for o in rendered["base"] if o["kind"] == "ConfigMap"]
    assert all(re.fullmatch(r"stepstream-(pipeline|settings)-[a-z0-9]{10}", name) for name in named)
    production = [o["metadata"]["name"] for o in rendered["overlays/production"] if o["kind"] == "ConfigMap"]
    assert not set(named) & set(production)


def test_the_network_policy_lets_through_what_is_needed_and_no_more(rendered: dict[str, list[Object]]) -> None:
    for overlay in WORKLOADS:
        spec = one(rendered[overlay], "NetworkPolicy")["spec"]
        assert spec["policyTypes"] == ["Ingress", "Egress"]
        assert [port["port"] for rule in spec["ingress"] for port in rule["ports"]] == [9464]
        assert all(rule.get("from") for rule in spec["ingress"])
        ports = [(p["port"], p.get("endPort", p["port"])) for rule in spec["egress"] for p in rule["ports"]]
        servers = one(rendered[overlay], "ConfigMap", "stepstream-settings")["data"]["KAFKA_SERVERS"].split(",")
        for server in servers:
            assert any(low <= int(server.rpartition(":")[2]) <= high for low, high in ports)
        snapshots = one(rendered[overlay], "ConfigMap", "stepstream-settings")["data"]["SNAPSHOTS"]
        assert ((443, 443) in ports) == snapshots.startswith("s3://")


def test_keda_and_partitions_agree(rendered: dict[str, list[Object]]) -> None:
    partitions = one(rendered["strimzi"], "KafkaTopic", "traffic.readings")["spec"]["partitions"]
    for overlay, most in (("overlays/production", partitions), ("overlays/gpu", 4)):
        scaled = one(rendered[overlay], "ScaledObject")["spec"]
        assert scaled["scaleTargetRef"]["name"] == "stepstream"
        assert "replicas" not in one(rendered[overlay], "StatefulSet")["spec"]
        assert scaled["minReplicaCount"] <= scaled["maxReplicaCount"] == most <= partitions
        (trigger,) = scaled["triggers"]
        pipeline = _pipeline(rendered[overlay])
        source = pipeline.source.options
        assert isinstance(source, KafkaSource.Options)
        assert trigger["metadata"]["topic"] == source.topic
        assert trigger["metadata"]["consumerGroup"] == (source.group or pipeline.name)
        assert trigger["metadata"]["bootstrapServers"] == source.servers
        assert trigger["metadata"]["limitToPartitionsWithLag"] == "true"
        assert trigger["metadata"]["allowIdleConsumers"] == "false"
    for overlay in ("base", "overlays/dev"):
        assert one(rendered[overlay], "StatefulSet")["spec"]["replicas"] <= partitions


def test_strimzi_has_the_topics_and_rights_that_the_pipeline_needs(rendered: dict[str, list[Object]]) -> None:
    config = _pipeline(rendered["overlays/production"])
    topics = {o["metadata"]["name"]: o["spec"] for o in rendered["strimzi"] if o["kind"] == "KafkaTopic"}
    needed = needed_topics(config)
    assert topics.keys() == {topic.name for topic in needed}
    for topic in needed:
        spec = topics[topic.name]
        assert {name: str(spec["config"][name]) for name in topic.configs} == topic.configs
        assert spec["partitions"] == topics["traffic.readings"]["partitions"]
        rights = {
            op for acl in _acls(rendered, "topic") if _covers(acl["resource"], topic.name) for op in acl["operations"]
        }
        wanted = {"source": {"Read"}, "outputs": {"Write"}, "dead letters": {"Write"}, "manifests": {"Read", "Write"}}
        assert rights == wanted[topic.role] | {"Describe"}
    (transactional,) = _acls(rendered, "transactionalId")
    stateful = one(rendered["overlays/production"], "StatefulSet")["metadata"]["name"]
    assert _covers(transactional["resource"], f"{config.name}-{stateful}-11")
    (group,) = _acls(rendered, "group")
    assert group["resource"]["name"] == config.name


def _acls(rendered: dict[str, list[Object]], kind: str) -> list[dict[str, Any]]:
    acls = one(rendered["strimzi"], "KafkaUser")["spec"]["authorization"]["acls"]
    return [acl for acl in acls if acl["resource"]["type"] == kind]


def _covers(resource: dict[str, str], name: str) -> bool:
    if resource.get("patternType") == "prefix":
        return name.startswith(resource["name"])
    return name == resource["name"]


def _pipeline(found: list[Object]) -> PipelineConfig:
    """The pipeline as a pod would read it, every option checked."""
    stateful = one(found, "StatefulSet")
    ((_, container),) = containers(stateful)
    settings = one(found, "ConfigMap", "stepstream-settings")["data"]
    secrets = {e["name"] for e in container["env"] if "secretKeyRef" in e.get("valueFrom", {})}
    environment = {name: ENVIRONMENT[name] for name in {"POD_NAME", *secrets}} | settings
    text = one(found, "ConfigMap", "stepstream-pipeline")["data"]["pipeline.yaml"]
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return Pipeline.from_file(file.name, [], environment).config
