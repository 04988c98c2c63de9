"""The Arrow form of interactions and link scores: one IPC stream with one record batch, as in `codec_arrow`.

An interaction is one row of source and destination, int64 or string by the kind of the id, and of features (a list of
float32) and event_id (string) where it has them. Link scores are one row a destination: `integer` (int64) or `text`
(string), the other one null, and `score`; what belongs to all of them is in the metadata.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from stepstream.connectors.base import InputError
from stepstream.connectors.codec_arrow import read_batch, read_only, write_batch
from stepstream.connectors.codec_json import read_freshness, read_node
from stepstream.connectors.node_ids import interaction_fault
from stepstream.connectors.records import Interaction, LinkScores, NodeId

__all__ = ["decode_interaction", "decode_link_scores", "encode_interaction", "encode_link_scores"]

_KINDS = {int: pa.int64(), str: pa.string()}
_FEATURES = pa.list_(pa.float32())
_SCORES = pa.schema([("integer", pa.int64()), ("text", pa.string()), ("score", pa.float32())])


def _expect(batch: pa.RecordBatch, schema: pa.Schema) -> None:
    if not batch.schema.equals(schema, check_metadata=False):
        found = ", ".join(f"{field.name}: {field.type}" for field in batch.schema)[:200]
        wanted = ", ".join(f"{field.name}: {field.type}" for field in schema)
        raise InputError(f"expected the columns {wanted}; got {found}")


def encode_interaction(interaction: Interaction) -> bytes:
    """An interaction as Arrow IPC. Raises InputError for one that is not valid."""
    fault = interaction_fault(interaction)
    if fault is not None:
        raise InputError(fault)
    columns = {
        name: pa.array([node], _KINDS[type(node)])
        for name, node in (("source", interaction.source), ("destination", interaction.destination))
    }
    if interaction.features is not None:
        flat = pa.array(np.ascontiguousarray(interaction.features))
        offsets = pa.array(np.array([0, len(interaction.features)], np.int32))
        columns["features"] = pa.ListArray.from_arrays(offsets, flat)
    if interaction.event_id is not None:
        columns["event_id"] = pa.array([interaction.event_id], pa.string())
    schema = pa.schema([(name, column.type) for name, column in columns.items()])
    return write_batch(list(columns.values()), schema, {})


def decode_interaction(body: bytes) -> Interaction:
    """The interaction of `encode_interaction`. Raises InputError saying what is wrong with the body."""
    batch, _ = read_batch(body)
    names = batch.schema.names
    if len(names) != len(set(names)) or not {"source", "destination"} <= set(names):
        raise InputError(f"expected the columns source and destination, got {', '.join(names)[:200]}")
    fields: list[tuple[str, pa.DataType]] = []
    for name in ("source", "destination"):
        kind = batch.schema.field(name).type
        if kind not in _KINDS.values():
            raise InputError(f"{name}: expected int64 or string, got {str(kind)[:60]}")
        fields.append((name, kind))
    fields += [(name, type_) for name, type_ in (("features", _FEATURES), ("event_id", pa.string())) if name in names]
    _expect(batch, pa.schema(fields))
    if batch.num_rows != 1:
        raise InputError(f"expected one row, got {batch.num_rows}")
    for name, column in zip(names, batch.columns, strict=True):
        if column.null_count:
            raise InputError(f"{name}: a null value is not expected")
    features = None
    if "features" in names:
        flat = batch.column("features").flatten()
        if flat.null_count:
            raise InputError("features: null values are not expected")
        features = read_only(flat.to_numpy(zero_copy_only=True))
    interaction = Interaction(
        batch.column("source")[0].as_py(),
        batch.column("destination")[0].as_py(),
        features,
        batch.column("event_id")[0].as_py() if "event_id" in names else None,
    )
    fault = interaction_fault(interaction)
    if fault is not None:
        raise InputError(fault)
    return interaction


def encode_link_scores(scores: LinkScores) -> bytes:
    """Link scores as Arrow IPC; float32 scores keep their bits. Raises InputError for what is no node id."""
    nodes: tuple[NodeId, ...] = tuple(read_node("destinations", node) for node in scores.destinations)
    if np.shape(scores.scores) != (len(nodes),):
        raise InputError(f"scores: expected {len(nodes)}, got shape {list(np.shape(scores.scores))}")
    arrays = [
        pa.array([node if type(node) is int else None for node in nodes], pa.int64()),
        pa.array([node if type(node) is str else None for node in nodes], pa.string()),
        pa.array(np.ascontiguousarray(scores.scores, np.float32)),
    ]
    meta = {
        "source": read_node("source", scores.source),
        "freshness": read_freshness(scores.freshness),
        "model": scores.model,
        "weights": scores.weights,
    }
    return write_batch(arrays, _SCORES, meta)


def decode_link_scores(body: bytes) -> LinkScores:
    """The scores of `encode_link_scores`. Raises InputError saying what is wrong with the body."""
    batch, meta = read_batch(body)
    _expect(batch, _SCORES)
    integers, texts, values = batch.columns
    if values.null_count:
        raise InputError("score: null values are not expected")
    destinations: list[NodeId] = []
    for row, (integer, text) in enumerate(zip(integers.to_pylist(), texts.to_pylist(), strict=True)):
        if (integer is None) == (text is None):
            raise InputError(
                f"destinations: row {row}: expected an integer or a text, got {integer!r} and {text!r:.60}"
            )
        destinations.append(read_node("destinations", text if integer is None else integer))
    model, weights = meta.get("model"), meta.get("weights")
    if not isinstance(model, str) or not isinstance(weights, str):
        raise InputError("model, weights: expected texts")
    return LinkScores(
        read_node("source", meta.get("source")),
        tuple(destinations),
        read_only(values.to_numpy(zero_copy_only=True)),
        read_freshness(meta.get("freshness")),
        model,
        weights,
    )
