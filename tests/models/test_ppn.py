from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from stepstream.models.ppn import PPN, SIZES, PPNConfig

SMALL: dict[str, Any] = {
    "classes": ("none", "car", "road", "person"),
    "cells": (32, 32, 4),
    "low": (-16.0, -16.0, -1.0),
    "size": (1.0, 1.0, 1.0),
    "above": 1,
    "widths": (8, 8, 8),
    "expecting": (8, 8, 8),
    "hidden": 8,
}
ARCHITECTURES = ("ppn", "pyramid")


def config(architecture: str, **changes: Any) -> PPNConfig:
    return PPNConfig(**{**SMALL, "architecture": architecture, **changes})


def network(architecture: str, seed: int = 0, **changes: Any) -> PPN:
    """With batch norms that do something."""
    torch.manual_seed(seed)
    model = PPN(config(architecture, **changes))
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            assert part.running_mean is not None and part.running_var is not None
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 2)
    return model.eval()


def stream(frames: int, batch: int = 1, points: int = 20, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "map": (torch.rand(batch, frames, 32, 32, 4, generator=generator) < 0.1).to(torch.uint8),
        "cell": torch.randint(-1, 256, (batch, frames, points), generator=generator),
        "points": torch.rand(batch, frames, points, 12, generator=generator),
    }


def at(x: dict[str, Tensor], t: int, rows: list[int] | None = None) -> dict[str, Tensor]:
    return {name: leaf[slice(None) if rows is None else rows, t] for name, leaf in x.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_step_equals_window_far_past_the_first_for_streams_on_their_own_clocks(architecture: str) -> None:
    model = network(architecture)
    frames = 4 * int(model.receptive_field or 0)
    x = stream(frames, batch=3)
    with torch.no_grad():
        whole = model(x)
        state, clocks = model.initial_state(3), [0, 0, 0]
        while min(clocks) < frames:
            # Slots take turns in different companies; each has its own time.
            for rows in ([2], [0, 2], [1, 0], [1], [0, 1, 2]):
                due = [row for row in rows if clocks[row] < frames]
                if not due:
                    continue
                given = {name: torch.stack([leaf[row, clocks[row]] for row in due]) for name, leaf in x.items()}
                y = model.step(given, state, torch.tensor(due))
                for i, row in enumerate(due):
                    for name, leaf in y.items():
                        torch.testing.assert_close(leaf[i], whole[name][row, clocks[row]], rtol=1e-5, atol=1e-5)
                    clocks[row] += 1


@pytest.mark.parametrize("temporal", [1, 2, 3])
@pytest.mark.parametrize("rows", [None, [1, 0]])
def test_step_equals_window_whatever_the_kernel_over_time(temporal: int, rows: list[int] | None) -> None:
    model = network("pyramid", temporal=temporal)
    frames = 2 * int(model.receptive_field or 0) + 1
    x = stream(frames, batch=2)
    with torch.no_grad():
        whole, state = model(x), model.initial_state(2)
        for t in range(frames):
            y = model.step(at(x, t, rows), state, None if rows is None else torch.tensor(rows))
            for name, leaf in y.items():
                torch.testing.assert_close(
                    leaf, whole[name][slice(None) if rows is None else rows, t], rtol=1e-5, atol=1e-5
                )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_outputs_depend_on_the_receptive_field_and_on_nothing_before(architecture: str) -> None:
    model = network(architecture)
    field = int(model.receptive_field or 0)
    assert field == {"ppn": 4, "pyramid": 4}[architecture]
    x = stream(field + 2)
    for back, matters in ((field - 1, True), (1, True), (0, True), (field, False)):
        changed = {name: leaf.clone() for name, leaf in x.items()}
        changed["map"][:, -1 - back] ^= 1
        with torch.no_grad():
            before, after = model(x, 1), model(changed, 1)
        for name in ("classes", "occupied"):
            assert torch.equal(before[name], after[name]) != matters, (back, name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cell_reaches_outputs_beside_it(architecture: str) -> None:
    model = network(architecture)
    x = stream(1)
    changed = {name: leaf.clone() for name, leaf in x.items()}
    changed["map"][0, 0, 16, 16] ^= 1
    with torch.no_grad():
        differs = (model(x)["occupied"] != model(changed)["occupied"])[0, 0]
    assert differs[:, 16, 16].all() and differs[0].sum() > 100


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_two_networks_share_nothing(architecture: str) -> None:
    model = network(architecture)
    x = stream(3)
    model(x)["classes"].sum().backward()
    assert all(p.grad is None for p in model.reconstruction.parameters())
    model.zero_grad()
    model(x)["occupied"].sum().backward()
    assert all(p.grad is None for p in model.segmentation.parameters())
    assert {id(p) for p in model.parameters()} == {id(p) for part in model.networks.values() for p in part.parameters()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folding_the_norms_keeps_the_function(architecture: str) -> None:
    model = network(architecture)
    folded = model.folded()
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in folded.modules())
    assert any(isinstance(part, torch.nn.BatchNorm2d) for part in model.modules())
    x = stream(5)
    with torch.no_grad():
        for name, y in model(x).items():
            torch.testing.assert_close(folded(x)[name], y, rtol=1e-4, atol=1e-5)


def test_a_world_that_stands_still_is_kept_exactly_by_stacked_maps_that_move() -> None:
    """Cells of a fixed world, seen through a map that goes on by strides: the history is as if it had stood there."""
    model = network("ppn")
    assert model.config.stride == 8
    generator = torch.Generator().manual_seed(3)
    world = (torch.rand(4, 96, 96, 4, generator=generator) < 0.1).to(torch.uint8)
    corners = [(32, 32), (40, 32), (40, 24), (40, 24)]
    state, rows = model.initial_state(2), torch.tensor([1])
    for t, corner in enumerate(corners):
        if t:
            last = corners[t - 1]
            model.move(state, 1, (last[0] - corner[0], last[1] - corner[1]))
        x, y = corner
        model.take({"map": world[None, t, x : x + 32, y : y + 32], "cell": None, "points": None}, state, rows)
    kept = state["shared"]["maps"][1].unflatten(2, (3, 4)).permute(2, 0, 1, 3)
    x, y = corners[-1]
    for i, t in enumerate((1, 2, 3)):
        expected = world[t, x : x + 32, y : y + 32].clone()
        seen = torch.zeros(32, 32, dtype=torch.bool)
        dx, dy = corners[t][0] - x, corners[t][1] - y
        seen[max(0, dx) : 32 + min(0, dx), max(0, dy) : 32 + min(0, dy)] = True
        expected[~seen] = 0
        assert torch.equal(kept[i], expected), t
    assert not state["shared"]["maps"][0].any()


def test_what_a_pyramid_keeps_moves_by_its_own_strides() -> None:
    model = network("pyramid")
    state = model.initial_state(2)
    with torch.no_grad():
        model.step(at(stream(1, batch=2), 0), state)
    before = {name: leaf["past"].clone() for name, leaf in state["segmentation"].items()}
    model.move(state, 0, (8, -16))
    for level, old in before.items():
        new, stride = state["segmentation"][level]["past"], 2 ** (int(level) + 1)
        a, b = 8 // stride, 16 // stride
        assert torch.equal(new[0, ..., a:, : new.shape[-1] - b], old[0, ..., :-a, b:])
        assert not new[0, ..., :a, :].any() and not new[0, ..., new.shape[-1] - b :].any()
        assert torch.equal(new[1], old[1])
    model.move(state, 0, (32, 0))
    assert not any(leaf["past"][0].any() for leaf in state["segmentation"].values())
    with pytest.raises(ValueError, match="multiples of 8"):
        model.move(state, 0, (4, 0))


@pytest.mark.parametrize("size", SIZES)
def test_every_size_can_be_built(size: str) -> None:
    with torch.device("meta"):
        for architecture in ARCHITECTURES:
            sizes = {**SIZES[size], "architecture": architecture}
            model = PPN(PPNConfig(classes=("none", "a", "b"), **sizes))
            state = model.initial_state(1, "meta")
            cells = model.config.cells
            x = {
                "map": torch.zeros(1, *cells, dtype=torch.uint8),
                "cell": torch.zeros(1, 10, dtype=torch.int64),
                "points": torch.zeros(1, 10, model.config.features),
            }
            y = model.step(x, state)
            assert y["classes"].shape == (1, 10, 2) and y["occupied"].shape == (1, 2, *cells[:2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": ("car", "road", "person")}, "'none' and at least two more"),
        ({"cells": (36, 32, 4)}, "multiples of 8"),
        ({"above": 4}, "one of 4 slices"),
        ({"expecting": (8, 8)}, "as many levels"),
        ({"history": 0}, "at least 1"),
        ({"architecture": "unet"}, "ppn or pyramid"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PPNConfig(**{**SMALL, **changes})


def test_a_card_from_json_gives_the_same_network() -> None:
    made = network("pyramid")
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(made.config).items()}
    again = PPN.from_card({"config": listed})
    assert again.config == made.config and again.state_dict().keys() == made.state_dict().keys()
