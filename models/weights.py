"""A folder of weights: `model.safetensors` and `card.json`, which says what they are and for whom."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import nn

from stepstream.models.huge_pages import settle

__all__ = [
    "Card",
    "Weights",
    "WeightsError",
    "find_weights",
    "load_into",
    "read_card",
    "save_weights",
    "shipped_weights",
]

MAX_WEIGHTS_BYTES = 1 << 30
MAX_CARD_BYTES = 16 << 20


class WeightsError(ValueError):
    """A folder of weights cannot be used: says which file, what it holds, and what was expected."""


class Card(BaseModel):
    """What a folder of weights is: which model and sizes, trained for which sensors, on what, and how well it did.

    `sensors`: N names, in the order of the model's axis. `step_s`: seconds between frames. `weights_sha256`: of
    model.safetensors ("" where the model has no parameters).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = Field(1, ge=1, le=1)
    model: str
    task: str
    config: dict[str, Any]
    sensors: tuple[str, ...] = ()
    step_s: int = Field(0, ge=0)
    unit: str = ""
    mean: float = 0.0
    weights_sha256: str = ""
    training: dict[str, Any] = Field(default_factory=dict)
    scores: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class Weights:
    """A folder of weights and its card."""

    folder: Path
    card: Card
    name: str = field(default="")


def shipped_weights() -> dict[str, Path]:
    """The weights inside the package: name -> folder."""
    root = Path(str(resources.files("stepstream.weights")))
    return {card.parent.name: card.parent for card in sorted(root.glob("*/card.json"))}


def read_card(folder: Path) -> Card:
    """The card of a folder. Raises WeightsError if it is missing or not a card."""
    path = folder / "card.json"
    try:
        if path.stat().st_size > MAX_CARD_BYTES:
            raise WeightsError(f"{path} has {path.stat().st_size} bytes: at most {MAX_CARD_BYTES} were expected")
        return Card.model_validate_json(path.read_bytes())
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read ({error.strerror}): a folder made by `stepstream train` was expected"
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise WeightsError(f"{path}: {where}: {first['msg']}") from None


def find_weights(weights: str | Path) -> Weights:
    """Weights by the name of a shipped set, or the path of a folder. Raises WeightsError naming what there is."""
    shipped = shipped_weights()
    folder = shipped.get(str(weights), Path(weights))
    if not folder.is_dir():
        close = difflib.get_close_matches(str(weights), list(shipped), 1)
        hint = f"did you mean {close[0]!r}?" if close else f"shipped: {', '.join(shipped) or 'none'}"
        raise WeightsError(f"weights {str(weights)!r}: neither a folder nor shipped with stepstream; {hint}")
    return Weights(folder, read_card(folder), folder.name)


def load_into(model: nn.Module, weights: Weights) -> None:
    """Loads parameters and buffers, which then lie in huge pages if they fill one.

    Raises WeightsError unless every name, shape and the checksum fit.
    """
    path = weights.folder / "model.safetensors"
    try:
        if path.stat().st_size > MAX_WEIGHTS_BYTES:
            raise WeightsError(f"{path} has {path.stat().st_size} bytes: at most {MAX_WEIGHTS_BYTES} were expected")
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror})") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != weights.card.weights_sha256:
        raise WeightsError(
            f"{path} has sha256 {digest[:12]}..., but its card says {weights.card.weights_sha256[:12]}..."
        )
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a whole safetensors file: {error}") from None
    expected = model.state_dict()
    for name in sorted(tensors.keys() | expected.keys()):
        if name not in tensors or name not in expected:
            side = "lacks" if name not in tensors else "has an unexpected"
            raise WeightsError(
                f"{path} {side} {name!r}: these are not weights of {weights.card.model} with this configuration"
            )
        if tensors[name].shape != expected[name].shape:
            shapes = f"{list(tensors[name].shape)}: {list(expected[name].shape)} was expected"
            raise WeightsError(f"{path}: {name!r} has shape {shapes}")
    model.load_state_dict(tensors)
    settle(model)


def save_weights(model: nn.Module, folder: Path, card: Card) -> Card:
    """Writes a folder of weights; returns the card with its checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    temporary = folder / "model.safetensors.tmp"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)
    temporary.replace(path)
    card = card.model_copy(update={"weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    (folder / "card.json").write_text(json.dumps(card.model_dump(mode="json"), indent=1) + "\n")
    return card
