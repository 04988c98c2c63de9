"""What `Pipeline.describe` returns, drawn: as text, and as an SVG or PNG file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepstream.connectors.base import InputError

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["draw", "text"]

# Of what an operator says of itself: shown in words of their own, or beside the drawing already.
_SAID = frozenset(
    {
        "type",
        "name",
        "options",
        "given",
        "consumes",
        "emits",
        "state_bytes",
        "state_bytes_per_stream",
        "receptive_field",
    }
)


def text(description: Mapping[str, Any]) -> Text:
    """A drawing of one line for each part and one for what flows from it to the next."""
    from rich.text import Text

    out = Text()
    out.append(description["name"], style="bold")
    out.append(f"   engine {description['engine']['type']}{_options(description['engine'], '  ')}\n", style="dim")
    parts = _parts(description)
    for index, (kind, part) in enumerate(parts):
        corner = "┌" if index == 0 else "└" if index == len(parts) - 1 else "├"
        out.append(f"{corner}─ ")
        out.append(_title(kind, part), style="bold cyan")
        out.append(f"{_options(part, '  ')}\n")
        for line in _facts(part):
            out.append("│     ")
            out.append(f"{line}\n", style="green")
        if index < len(parts) - 1:
            out.append("│\n│  ")
            out.append(", ".join(description["flow"][index]) or "nothing", style="yellow")
            out.append("\n▼\n" if index == len(parts) - 2 else "\n│\n")
    out.rstrip()
    return out


def _parts(description: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    operators = [("operator", operator) for operator in description["operators"]]
    return [("source", description["source"]), *operators, ("sink", description["sink"])]


def _title(kind: str, part: Mapping[str, Any]) -> str:
    if kind != "operator":
        return f"{kind} {part['type']}"
    name, type_name = str(part["name"]), str(part["type"])
    return name if name == type_name else f"{name} ({type_name})"


def _options(part: Mapping[str, Any], before: str) -> str:
    shown = [f"{name} {_short(value)}" for name, value in part["given"].items() if value is not None]
    return before + ", ".join(shown) if shown else ""


def _short(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) > 12:
        return f"[{len(value)} values]"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).replace("'", "") if not isinstance(value, str) or value else "''"


def _facts(part: Mapping[str, Any]) -> list[str]:
    """What an operator says of itself: first the numbers every operator has, then the rest."""
    facts: list[str] = []
    if "receptive_field" in part:
        field = part["receptive_field"]
        facts.append(f"receptive field {'unbounded' if field is None else field}")
    size = part.get("state_bytes", part.get("state_bytes_per_stream"))
    if size is not None:
        facts.append(f"state {_bytes(int(size))} a key")
    lines = [" · ".join(facts)] if facts else []
    rest = {name: value for name, value in part.items() if name not in _SAID and value is not None}
    # An operator may repeat its options in what it says: once is enough.
    rest = {name: value for name, value in rest.items() if name not in part["given"]}
    shown = [f"{name.replace('_', ' ')} {_short(value)}" for name, value in rest.items()]
    return [*lines, *([", ".join(shown)] if shown else [])]


def _bytes(size: int) -> str:
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= power:
            return f"{size / power:.3g} {unit}"
    return f"{size} B"


def draw(description: Mapping[str, Any], path: Path) -> None:
    """Draws boxes and arrows into `path`, SVG or PNG by its ending. Raises InputError if it cannot be written."""
    from textwrap import wrap

    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch

    parts = _parts(description)
    boxes = [(_title(kind, part), wrap(_options(part, ""), 74) + _wrapped(_facts(part))) for kind, part in parts]
    line, gap, pad = 0.20, 0.62, 0.16
    heights = [2 * pad + line * (1.2 + len(lines)) for _, lines in boxes]
    width, height = 7.4, sum(heights) + gap * (len(boxes) - 1) + 0.9
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    axes.text(0.3, height - 0.35, description["name"], fontsize=13, weight="bold", va="center")
    engine = f"engine: {description['engine']['type']}"
    axes.text(width - 0.3, height - 0.35, engine, fontsize=9, color="0.4", ha="right", va="center")
    top = height - 0.7
    for index, ((title, lines), tall) in enumerate(zip(boxes, heights, strict=True)):
        colour = "#e8f1fb" if 0 < index < len(boxes) - 1 else "#eef5ea"
        style = "round,pad=0,rounding_size=0.08"
        axes.add_patch(
            FancyBboxPatch((0.3, top - tall), width - 0.6, tall, boxstyle=style, facecolor=colour, edgecolor="0.35")
        )
        axes.text(0.5, top - pad - line / 2, title, fontsize=10.5, weight="bold", va="center")
        for row, content in enumerate(lines):
            y = top - pad - line * (row + 1.7)
            axes.text(0.5, y, content, fontsize=8, va="center", color="0.2", parse_math=False)
        top -= tall
        if index < len(boxes) - 1:
            axes.annotate("", (1.2, top - gap), (1.2, top), arrowprops={"arrowstyle": "-|>", "color": "0.25"})
            flowing = ", ".join(description["flow"][index]) or "nothing"
            axes.text(1.4, top - gap / 2, flowing, fontsize=9, va="center", style="italic", color="#8a5a00")
            top -= gap
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _wrapped(lines: list[str]) -> list[str]:
    from textwrap import wrap

    return [piece for content in lines for piece in wrap(content, 74)]
