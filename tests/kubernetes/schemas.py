"""Strict validation without a cluster: built-in kinds by Kubernetes' own schemas, others by their CRD."""

from __future__ import annotations

from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from rendering import CRDS, Object

__all__ = ["problems"]


def problems(found: Object, version: str) -> list[str]:
    """What is wrong with an object in a Kubernetes version such as 1.34; unknown fields are."""
    group, _, kind_version = found["apiVersion"].rpartition("/")
    if "." in group and not group.endswith(".k8s.io"):
        schema = _crd_schema(group, kind_version, found["kind"])
        if schema is None:
            return [f"no CRD for {found['apiVersion']} {found['kind']}"]
        return [
            f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(schema).iter_errors(found)
        ]
    try:
        kubernetes_validate.validate(found, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


def _crd_schema(group: str, version: str, kind: str) -> dict[str, Any] | None:
    for path in CRDS:
        for crd in yaml.safe_load_all(path.read_text()):
            spec = crd["spec"]
            if (spec["group"], spec["names"]["kind"]) == (group, kind):
                for served in spec["versions"]:
                    if served["name"] == version and served["served"]:
                        return _strict(served["schema"]["openAPIV3Schema"], top=True)
    return None


def _strict(schema: Any, top: bool = False) -> Any:
    """A CRD's schema as JSON Schema that refuses fields it does not name, as the API server does when strict."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {name: _strict(value) for name, value in schema.items() if not name.startswith("x-kubernetes")}
    if schema.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
    if "properties" in schema:
        strict["properties"] = {name: _strict(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            strict["additionalProperties"] = False
        if top:
            strict["properties"]["metadata"] = {"type": "object"}
    return strict
