"""Draws two-forms.png: what a window computes, what a step computes, and what is cached in between.

uv run python docs/images/two_forms.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

STEPS, MEMORY, LAYERS = 9, 3, 2
NEW, KEPT, UNUSED = "#c8553d", "#3d6b8e", "#e9e9e4"


def cell(ax: Axes, t: int, level: int, colour: str) -> None:
    """One time step of one layer."""
    ax.add_patch(Rectangle((t - 0.36, level - 0.2), 0.72, 0.4, facecolor=colour, edgecolor="white", linewidth=1.5))


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """What an output is made from."""
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-", color=colour, linewidth=1.0, shrinkA=0, shrinkB=0))


def draw(ax: Axes, stepping: bool) -> None:
    """Inputs at the bottom, the outputs of two layers of memory 3 above them."""
    last = STEPS - 1
    for level in range(LAYERS + 1):
        reach = (LAYERS - level) * (MEMORY - 1)
        for t in range(STEPS):
            within = last - t <= reach
            cached = last - t < MEMORY and level < LAYERS
            kept = KEPT if cached else UNUSED
            colour = (NEW if t == last else kept) if stepping else (NEW if within else UNUSED)
            if level and (t == last if stepping else within):
                for back in range(MEMORY):
                    arrow(ax, (t - back, level - 0.8), (t, level - 0.2), NEW if not (stepping and back) else KEPT)
            cell(ax, t, level, colour)
    ax.set_xlim(-0.6, STEPS - 0.4)
    ax.set_ylim(-0.75, LAYERS + 0.45)
    ax.set_yticks(range(LAYERS + 1), ["input", *(f"layer {i + 1}" for i in range(LAYERS))])
    ax.set_xticks(range(STEPS), [f"t-{last - t}" if t < last else "t" for t in range(STEPS)])
    ax.tick_params(length=0, labelsize=9)
    for side in ax.spines.values():
        side.set_visible(False)


def main() -> None:
    """Writes the picture beside this file."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.0), layout="constrained")
    draw(left, stepping=False)
    left.set_title("forward(window): the newest output computes 9 cells", fontsize=10, loc="left")
    draw(right, stepping=True)
    right.set_title("step(x, state): it computes 3, and reads what is cached", fontsize=10, loc="left")
    handles = [Rectangle((0, 0), 1, 1, facecolor=c) for c in (NEW, KEPT, UNUSED)]
    figure.legend(handles, ["computed now", "cached: the state", "not needed"], loc="outside lower center", ncols=3,
                  frameon=False, fontsize=9)  # fmt: skip
    figure.savefig(Path(__file__).with_name("two-forms.png"), dpi=130)


if __name__ == "__main__":
    main()
