"""What may stand in an interaction: the rules that codecs, readers and operators share.

A node is an integer of 64 bits with sign or a text of 1 to 1,024 characters, and keeps its kind: 7 and "7" are two
nodes. No rule here goes through a float: float32 names every second integer only above 2^24, float64 above 2^53.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stepstream.connectors.records import Interaction

__all__ = ["MAX_FEATURES", "MAX_ID", "MAX_ID_CHARACTERS", "MIN_ID", "interaction_fault", "node_fault", "text_fault"]

MIN_ID = -(2**63)
MAX_ID = 2**63 - 1

MAX_ID_CHARACTERS = 1024
"""Longest node or event id: what bounds the memory that one of them can ask for."""

MAX_FEATURES = 65_536
"""Widest features of one interaction."""


def text_fault(value: object) -> str | None:
    """What is wrong with a text that names something, for a message that names the field; None if nothing."""
    if type(value) is str and 0 < len(value) <= MAX_ID_CHARACTERS:
        return None
    return f"expected a text of 1 to {MAX_ID_CHARACTERS} characters, got {value!r:.60}"


def node_fault(value: object) -> str | None:
    """What is wrong with a node id, for a message that names the field; None if nothing."""
    if type(value) is int:
        if MIN_ID <= value <= MAX_ID:
            return None
    elif type(value) is str and 0 < len(value) <= MAX_ID_CHARACTERS:
        return None
    return f"expected an integer of 64 bits or a text of 1 to {MAX_ID_CHARACTERS} characters, got {value!r:.60}"


def _features_fault(features: Any) -> str | None:
    if not isinstance(features, np.ndarray) or features.ndim != 1 or features.dtype != np.float32:
        shape = f"{features.dtype} {list(features.shape)}" if isinstance(features, np.ndarray) else f"{features!r:.60}"
        return f"features: expected float32 [F], got {shape}"
    if len(features) > MAX_FEATURES:
        return f"features: expected at most {MAX_FEATURES} numbers, got {len(features)}"
    if not np.isfinite(features).all():
        at = int(np.flatnonzero(~np.isfinite(features))[0])
        return f"features: expected finite numbers, got {features[at]} at {at}"
    return None


def interaction_fault(value: Interaction) -> str | None:
    """What is wrong with an interaction: field, what was expected, what it holds; None if nothing."""
    for name, node in (("source", value.source), ("destination", value.destination)):
        fault = node_fault(node)
        if fault is not None:
            return f"{name}: {fault}"
    if value.features is not None:
        fault = _features_fault(value.features)
        if fault is not None:
            return fault
    if value.event_id is not None:
        fault = text_fault(value.event_id)
        if fault is not None:
            return f"event_id: {fault}"
    return None
