"""What the two forms ask of every layer: they are one function, on any clocks; nothing public is left out of this."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import torch
from equality import assert_close
from every_layer import LAYERS, build, each, emitted, every_layer, leaves, steps, window_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stepstream.models import continual
from stepstream.models.base import StreamModel, Tree, close_rows, copy_rows
from stepstream.models.continual.base import Layer, outputs_after
from stepstream.models.dcrnn import DCRNN
from stepstream.models.graph_cells import GraphCellModel

PAGE = Path(__file__).parents[3] / "docs/continual.md"
TIME = 14
"""Steps of a stream that comes and goes."""
EXACT = [name for name, case in LAYERS.items() if case.exact]


def public_layers() -> dict[str, type[Layer]]:
    """Everything with a step form that a module of models/continual offers."""
    found = {}
    for module in pkgutil.iter_modules(continual.__path__, f"{continual.__name__}."):
        loaded = importlib.import_module(module.name)
        for name in getattr(loaded, "__all__", ()):
            offered = getattr(loaded, name)
            if inspect.isclass(offered) and issubclass(offered, Layer) and not inspect.isabstract(offered):
                found[name] = offered
    return found


def test_every_public_layer_is_tested() -> None:
    made = {type(build(name)) for name in LAYERS if not name.startswith("GraphCellModel")} | {GraphCellModel}
    assert made == {*public_layers().values(), DCRNN, GraphCellModel}
    for name, kind in public_layers().items():
        assert any(key.split("-")[0] == name for key in LAYERS), kind


def test_every_public_layer_stands_in_the_table_of_exactness() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("## What is exact")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    named = re.findall(r"`([^`]+)`", " ".join(rows))
    once = {name for name in named if named.count(name) == 1}
    # torch's norms of the same names stand in the table as well.
    assert {*public_layers(), "DCRNN", "GraphCellModel"} - once <= {"GroupNorm", "InstanceNorm"}
    assert set(named) <= {*public_layers(), "DCRNN", "GraphCellModel", "STTN"}


def length_of(model: StreamModel) -> int:
    """Steps that go more than five receptive fields far, or what stands for it where memory has no end."""
    field = model.receptive_field
    return 40 if field is None else 5 * field + 2 * getattr(model, "stride", 1) + model.delay


def tolerance_of(dtype: torch.dtype) -> float:
    return {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]


dtypes = st.sampled_from([torch.float32, torch.float64])


@every_layer(EXACT)
@settings(max_examples=5, deadline=None)
@given(dtype=dtypes, streams=st.sampled_from([1, 2, 7]), more=st.integers(0, 3), seed=st.integers(0, 999))
def test_step_equals_window(name: str, dtype: torch.dtype, streams: int, more: int, seed: int) -> None:
    model = build(name, dtype)
    window = window_of(name, streams, length_of(model) + more, dtype, seed)
    with torch.no_grad():
        wanted = model(window)
    assert wanted.shape[1] == outputs_after(model, length_of(model) + more) > 0
    assert wanted.dtype == dtype
    assert float(wanted.std()) > 0.05, "what is always the same would pass anything"
    found = steps(model, window, model.initial_state(streams))
    for i in range(streams):
        assert_close(emitted(found[i], model), wanted[i], tolerance_of(dtype))


@every_layer()
@settings(max_examples=4, deadline=None)
@given(dtype=dtypes, seed=st.integers(0, 999))
def test_streams_come_and_go_on_clocks_of_their_own(name: str, dtype: torch.dtype, seed: int) -> None:
    """Stepped in random company, moved to other slots, ended and begun again: each gives what it gives alone."""
    model, window = build(name, dtype), window_of(name, 3, TIME, dtype, seed)
    streams = [each(window, lambda part, i=i: part[i : i + 1]) for i in range(3)]
    if LAYERS[name].exact:
        with torch.no_grad():
            alone = [model(stream)[0] for stream in streams]
    else:
        alone = [emitted(steps(model, stream, model.initial_state(1))[0], model) for stream in streams]
    found = _stepped_at_random(model, window, seed)
    for i in range(3):
        assert_close(emitted(torch.stack(found[i]), model), alone[i], tolerance_of(dtype))


def _stepped_at_random(model: StreamModel, window: Tree, seed: int) -> list[list[Tensor]]:
    """What each of three streams gives at each of its steps, in a state of five slots."""
    random = torch.Generator().manual_seed(seed)
    slots, clock = torch.randperm(5, generator=random)[:3].tolist(), [0, 0, 0]
    found: list[list[Tensor]] = [[], [], []]
    state, fresh = model.initial_state(5), model.initial_state(1)
    ended = False
    while min(clock) < TIME:
        chosen = [i for i in range(3) if clock[i] < TIME and torch.rand((), generator=random) < 0.6]
        if not chosen:
            continue
        x = each(window, lambda part, chosen=chosen: torch.stack([part[i, clock[i]] for i in chosen]))
        with torch.no_grad():
            y = model.step(x, state, torch.tensor([slots[i] for i in chosen]))
        for i, output in zip(chosen, y, strict=True):
            found[i].append(output.clone())
            clock[i] += 1
        if clock[0] == 7 and not ended:
            ended = True
            close_rows(state, fresh, torch.tensor([slots[0]]))
            clock[0], found[0] = 0, []
        if clock[1] in (3, 9):
            free = next(slot for slot in range(5) if slot not in slots)
            close_rows(state, copy_rows(state, torch.tensor([slots[1]])), torch.tensor([free]))
            slots[1] = free
            # What is left behind is nobody's.
            close_rows(state, fresh, torch.tensor([next(slot for slot in range(5) if slot not in slots)]))
    return found


@every_layer()
def test_a_step_without_rows_gives_no_rows_and_changes_nothing(name: str) -> None:
    model, window = build(name), window_of(name, 3, 9)
    state = model.initial_state(3)
    wanted = steps(model, window, state).shape
    before = leaves(copy_rows(state, torch.arange(3)))
    found = steps(model, each(window, lambda part: part[:0]), state, torch.arange(0))
    assert found.shape == (0, *wanted[1:])
    assert all(torch.equal(leaf, before[key]) for key, leaf in leaves(state).items())


@every_layer()
def test_a_slot_that_has_no_input_keeps_its_bits(name: str) -> None:
    model, window = build(name), window_of(name, 3, 8)
    state = model.initial_state(3)
    steps(model, window, state)
    before = leaves(copy_rows(state, torch.tensor([0, 2])))
    steps(model, each(window, lambda part: part[1:2]), state, torch.tensor([1]))
    after = leaves(copy_rows(state, torch.tensor([0, 2])))
    assert all(torch.equal(leaf, before[key]) for key, leaf in after.items())


@every_layer([name for name in EXACT if LAYERS[name].features is not None])
def test_gradients_of_the_window_form(name: str) -> None:
    model: Any = build(name, torch.float64)
    x = window_of(name, 1, min(8, (model.receptive_field or 4) + model.stride + 1), torch.float64).requires_grad_()
    weights = dict(model.requires_grad_(True).named_parameters())

    def window_form(x: Tensor, *parameters: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(model, dict(zip(weights, parameters, strict=True)), (x,))
        return result

    assert model(x).shape[1] > 0
    assert torch.autograd.gradcheck(window_form, (x, *weights.values()), fast_mode=True)
