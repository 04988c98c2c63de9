"""Models of dynamic graphs by name, with their weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from stepstream.models.dyngraph.base import GraphModel
from stepstream.models.registry import model_class
from stepstream.models.weights import Card, WeightsError, find_weights, load_into

__all__ = ["LoadedGraphModel", "load_graph_model"]


@dataclass(frozen=True)
class LoadedGraphModel:
    """A model ready to serve. `features`: the width that an interaction must have, None where they are not looked at.

    `weights_hash` names the parameters it runs with.
    """

    name: str
    model: GraphModel
    card: Card | None
    weights_hash: str
    features: int | None


def load_graph_model(name: str, weights: str | Path | None = None) -> LoadedGraphModel:
    """A registered model for graphs, with the weights of a folder or of a shipped set; baselines have none.

    Raises WeightsError if name, card and tensors do not fit.
    """
    cls = model_class(name)
    if not issubclass(cls, GraphModel):
        raise WeightsError(f"model {name!r} is for {cls.task}: one for graphs was expected")
    if not cls.needs_weights:
        if weights is not None:
            raise WeightsError(f"weights {str(weights)!r}: {name} has no parameters")
        try:
            model = cls()
        except TypeError:
            raise WeightsError(f"{name} is measured on a recording and cannot be served: see `evaluate`") from None
        return LoadedGraphModel(name, model, None, hashlib.sha256(name.encode()).hexdigest(), None)
    if weights is None:
        raise WeightsError(f"{name} needs weights: a folder made by `stepstream train {name}`, or a shipped set")
    found = find_weights(weights)
    if found.card.model != name:
        raise WeightsError(f"{found.folder} holds weights of {found.card.model!r}, not of {name!r}")
    try:
        model = cls.from_card(found.card.model_dump(mode="json"))
    except (TypeError, ValueError, KeyError) as error:
        raise WeightsError(
            f"{found.folder / 'card.json'} does not describe a {name!r} that can be built: {error}"
        ) from None
    assert isinstance(model, nn.Module)
    load_into(model, found)
    model.eval().requires_grad_(False)
    features = int(found.card.config.get("features", 0))
    return LoadedGraphModel(name, model, found.card, found.card.weights_sha256, features)
