"""Every model and baseline by name: a new model is one file beside this one and one line in `_ENTRIES`."""

from __future__ import annotations

import difflib
import hashlib
import importlib
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from stepstream.models.base import StreamModel
from stepstream.models.detection.base import Backbone
from stepstream.models.dyngraph.base import GraphModel
from stepstream.models.weights import Card, WeightsError, find_weights, load_into, read_card, shipped_weights

__all__ = ["LoadedModel", "ModelEntry", "catalogue", "load_model", "model_class", "model_entry"]

ENTRY_POINTS = "stepstream.models"


@dataclass(frozen=True)
class ModelEntry:
    """One line of `stepstream models`. `exactness`: which window form `step` equals, and within what."""

    name: str
    target: str
    task: str
    kind: str
    receptive_field: str
    exactness: str
    summary: str


_ENTRIES = (
    ModelEntry(
        "sttn",
        "stepstream.models.sttn:STTN",
        "traffic",
        "model",
        "blocks (M - 1) + input frames",
        "causal window form, to 1e-5 in float32",
        "spatial-temporal transformer, banded-causal in time",
    ),
    ModelEntry(
        "dcrnn",
        "stepstream.models.dcrnn:DCRNN",
        "traffic",
        "model",
        "unbounded",
        "unrolled steps, to 1e-5 in float32",
        "diffusion-convolutional recurrent network over the roads",
    ),
    ModelEntry(
        "graph-cell",
        "stepstream.models.graph_cells:GraphCellModel",
        "traffic",
        "model",
        "unbounded; A3TGCN: periods - 1 + max age",
        "unrolled steps, to 1e-5 in float32",
        "a recurrent cell of torch-geometric-temporal: DCRNN, GConvGRU, GConvLSTM, GCLSTM, TGCN, A3TGCN",
    ),
    ModelEntry(
        "eventtransact",
        "stepstream.models.eventtransact:EventTransAct",
        "events",
        "model",
        "continual: layers (memory - 1) + 1; exact: memory",
        "window form, to 1e-5 in float32",
        "transformer along time over embeddings of event frames",
    ),
    ModelEntry(
        "persistence",
        "stepstream.models.persistence:Persistence",
        "traffic",
        "baseline",
        "unbounded",
        "exact",
        "the last observed value",
    ),
    ModelEntry(
        "weekly-average",
        "stepstream.models.weekly_average:WeeklyAverage",
        "traffic",
        "baseline",
        "1",
        "exact",
        "the training part's mean of the same slot of the week",
    ),
    ModelEntry(
        "sltt",
        "stepstream.models.sltt:SpikingNet",
        "events",
        "model",
        "unbounded",
        "unrolled steps, exact but for potentials at their threshold",
        "spiking network on event frames, trained with memory independent of time",
    ),
    ModelEntry(
        "convs5-events",
        "stepstream.models.convs5_events:ConvS5Classifier",
        "events",
        "model",
        "unbounded",
        "parallel scan, to 1e-4 in float32",
        "convolutional state spaces on event frames",
    ),
    ModelEntry(
        "ppn",
        "stepstream.models.ppn:PPN",
        "lidar",
        "model",
        "ppn: history; pyramid: levels (temporal - 1) + 1",
        "window form, to 1e-5 in float32",
        "two networks over a history of maps: classes of points, and the next map",
    ),
    ModelEntry(
        "dsvt",
        "stepstream.models.detection.dsvt:DSVT",
        "detection",
        "model",
        "1",
        "no state: every sweep by itself",
        "boxes from pillars: attention within rotated sets, and a centre head",
    ),
    ModelEntry(
        "edgebank",
        "stepstream.models.dyngraph.edgebank:EdgeBank",
        "graph",
        "baseline",
        "unbounded",
        "exact",
        "a link is likely if it was there before",
    ),
    ModelEntry(
        "edgebank-window",
        "stepstream.models.dyngraph.edgebank:EdgeBankWindow",
        "graph",
        "baseline",
        "a window of time",
        "exact",
        "a link is likely if it was there within the window",
    ),
    ModelEntry(
        "recency",
        "stepstream.models.dyngraph.recency:Recency",
        "graph",
        "baseline",
        "unbounded",
        "exact",
        "a source's earlier destinations, the latest first",
    ),
    ModelEntry(
        "nat",
        "stepstream.models.dyngraph.nat:NAT",
        "graph",
        "model",
        "unbounded",
        "one by one, to 1e-5 in float32",
        "links from joint neighbourhoods, kept in caches of constant size",
    ),
    ModelEntry(
        "tgn",
        "stepstream.models.dyngraph.tgn:TGN",
        "graph",
        "model",
        "unbounded",
        "batch by batch, exact",
        "memories of nodes, and attention over their latest neighbours",
    ),
    ModelEntry(
        "jodie",
        "stepstream.models.dyngraph.jodie:JODIE",
        "graph",
        "model",
        "unbounded",
        "batch by batch, exact",
        "memories of nodes, projected to the time asked about",
    ),
    ModelEntry(
        "apan",
        "stepstream.models.dyngraph.apan:APAN",
        "graph",
        "model",
        "unbounded",
        "batch by batch, exact",
        "mails to neighbours, and attention over a node's mailbox",
    ),
    ModelEntry(
        "pres",
        "stepstream.models.dyngraph.backbones:PRES",
        "graph",
        "model",
        "unbounded",
        "batch by batch, exact",
        "a memory network whose memory is predicted and corrected, for large batches",
    ),
)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to serve: eval mode, no gradients wanted. `weights_hash` names the parameters it runs with."""

    name: str
    model: StreamModel
    card: Card
    weights_hash: str


def model_entry(name: str) -> ModelEntry:
    """The entry of a registered name. Raises WeightsError with a suggestion if there is none."""
    for entry in _ENTRIES:
        if entry.name == name:
            return entry
    close = difflib.get_close_matches(name, [entry.name for entry in _ENTRIES], 1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(entry.name for entry in _ENTRIES)}"
    raise WeightsError(f"no model is called {name!r}: {hint}")


def model_class(name: str) -> type[StreamModel | GraphModel | Backbone]:
    """The class of a registered name, an entry point of group `stepstream.models`, or `package.module:Name`."""
    if ":" in name:
        target = name
    else:
        extra = [point.value for point in entry_points(group=ENTRY_POINTS) if point.name == name]
        target = extra[0] if extra else model_entry(name).target
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise WeightsError(f"model {name!r} cannot be imported: {error}") from None
    if not (isinstance(found, type) and issubclass(found, StreamModel | GraphModel | Backbone)):
        raise WeightsError(f"model {name!r} is {found!r}: a StreamModel, GraphModel or Backbone class was expected")
    return found


def load_model(name: str, weights: str | Path) -> LoadedModel:
    """A model with the weights of a folder or of a shipped set.

    The folder's card gives sizes and sensors. A model without parameters (persistence) takes those from the card of
    any weights and leaves the tensors alone. Raises WeightsError if name, card and tensors do not fit.
    """
    cls = model_class(name)
    if not issubclass(cls, StreamModel):
        raise WeightsError(f"model {name!r} is for {cls.task}: one that steps over windows was expected")
    found = find_weights(weights)
    if cls.needs_weights and found.card.model != name:
        raise WeightsError(f"{found.folder} holds weights of {found.card.model!r}, not of {name!r}")
    try:
        model = cls.from_card(found.card.model_dump(mode="json"))
    except WeightsError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        raise WeightsError(
            f"{found.folder / 'card.json'} does not describe a {name!r} that can be built: {error}"
        ) from None
    if cls.needs_weights:
        load_into(model, found)
        digest = found.card.weights_sha256
    else:
        digest = hashlib.sha256(name.encode()).hexdigest()
    model.eval().requires_grad_(False)
    return LoadedModel(name, model, found.card, digest)


def catalogue() -> list[dict[str, Any]]:
    """Every registered model, for `stepstream models`: the fields of ModelEntry but the target, and its weights."""
    cards = {name: read_card(folder) for name, folder in shipped_weights().items()}
    rows = []
    for entry in _ENTRIES:
        row = {key: value for key, value in vars(entry).items() if key != "target"}
        row["weights"] = [name for name, card in cards.items() if card.model == entry.name]
        rows.append(row)
    return rows
