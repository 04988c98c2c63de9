"""The memory networks by name, and PRES over any of them."""

from __future__ import annotations

from typing import Any

from stepstream.models.dyngraph.apan import APAN
from stepstream.models.dyngraph.jodie import JODIE
from stepstream.models.dyngraph.memory import MemoryConfig, MemoryModel
from stepstream.models.dyngraph.tgn import TGN

__all__ = ["BACKBONES", "PRES"]

BACKBONES: dict[str, type[MemoryModel]] = {"tgn": TGN, "jodie": JODIE, "apan": APAN}


class PRES(MemoryModel):
    """A memory network whose memory is smoothed: never made itself, only a name under which its backbones are made."""

    @classmethod
    def over(cls, backbone: str = "tgn", **config: Any) -> MemoryModel:
        """A backbone with PRES; `config`: of `MemoryConfig`. Raises ValueError for a backbone that is not known."""
        if backbone not in BACKBONES:
            raise ValueError(f"backbone {backbone!r} is not known: {', '.join(BACKBONES)} were expected")
        return BACKBONES[backbone](MemoryConfig(**{**config, "pres": True}))

    @classmethod
    def from_card(cls, card: dict[str, Any]) -> MemoryModel:
        """The model of a card, whose `config` is that of `MemoryConfig` with the name of the backbone."""
        return cls.over(**card["config"])
