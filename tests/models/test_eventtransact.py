"""EventTransAct: both forms step as they are written over a window, whatever else is in the batch."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tests.models.continual.equality import assert_close, check_ragged_clocks
from torch import Tensor

from stepstream.models.base import copy_rows
from stepstream.models.eventtransact import EventTransAct, EventTransActConfig, FrameForm
from stepstream.models.registry import load_model
from stepstream.models.weights import Card, WeightsError, save_weights

FORMS: tuple[Literal["continual", "exact"], ...] = ("continual", "exact")
SMALL: dict[str, Any] = {
    "classes": ("a", "b", "c"),
    "frame": FrameForm(height=13, width=10),
    "stem": (4,),
    "width": 8,
    "heads": 2,
    "hidden": 16,
    "memory": 4,
    "pool": 2,
}
BLURRED = {
    "frame": FrameForm(kind="surface", height=13, width=10),
    "pool": 1,
    "spatial_layers": 2,
    "temporal_layers": 3,
}


def a_model(form: Literal["continual", "exact"], dtype: torch.dtype = torch.float64, **sizes: Any) -> EventTransAct:
    torch.manual_seed(0)
    model = EventTransAct(EventTransActConfig(**{**SMALL, "form": form, **sizes})).to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def counts(streams: int, steps: int, dtype: torch.dtype = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(streams + steps)
    rate = 3 * torch.rand(streams, steps, 2, 13, 1, generator=random, dtype=dtype) ** 4
    return torch.poisson(rate.expand(-1, -1, -1, -1, 10), random)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sizes", [{}, BLURRED], ids=["small", "deep"])
def test_step_is_the_window_form_far_past_the_first_window(
    form: Literal["continual", "exact"], dtype: torch.dtype, sizes: dict[str, Any]
) -> None:
    model, window = a_model(form, dtype, **sizes), counts(2, 45, dtype)
    assert model.receptive_field is not None and window.shape[1] > 4 * model.receptive_field
    state = model.initial_state(2)
    with torch.no_grad():
        wanted = model(window)
        assert_close(torch.stack([model.step(window[:, t], state) for t in range(45)], dim=1), wanted)
    assert float((wanted - wanted.mean(dim=1, keepdim=True)).abs().max()) > 0.01


@pytest.mark.parametrize("form", FORMS)
def test_streams_on_their_own_clocks_give_what_each_gives_alone(form: Literal["continual", "exact"]) -> None:
    check_ragged_clocks(a_model(form), counts(3, 12))


@pytest.mark.parametrize("form", FORMS)
def test_a_stream_without_an_input_keeps_its_state_to_the_bit(form: Literal["continual", "exact"]) -> None:
    model, window = a_model(form), counts(3, 6)
    state = model.initial_state(3)
    for t in range(5):
        model.step(window[:, t], state)
    before = copy_rows(state, torch.tensor([1]))
    model.step(window[[2, 0], 5], state, torch.tensor([2, 0]))
    after = copy_rows(state, torch.tensor([1]))
    assert all(torch.equal(a, b) for a, b in zip(leaves(before), leaves(after), strict=True))


def leaves(tree: Any) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [leaf for name in sorted(tree) for leaf in leaves(tree[name])]


@pytest.mark.parametrize("form", FORMS)
def test_the_receptive_field_is_what_the_newest_output_sees(form: Literal["continual", "exact"]) -> None:
    model, window = a_model(form), counts(1, 20).requires_grad_(True)
    model(window)[0, -1].sum().backward()
    assert window.grad is not None
    seen = window.grad[0].abs().amax(dim=(1, 2, 3)) > 0
    assert model.receptive_field == {"continual": 2 * 3 + 1, "exact": 4}[form]
    assert seen.tolist() == [t >= 20 - model.receptive_field for t in range(20)]


def test_the_exact_form_is_the_encoder_over_the_clip_alone() -> None:
    model, window = a_model("exact"), counts(2, 9)
    with torch.no_grad():
        for t in (0, 2, 8):
            clip = window[:, max(0, t - 3) : t + 1]
            assert_close(model(window)[:, t], model(clip)[:, -1])


def test_the_exact_form_knows_the_order_of_frames() -> None:
    model, window = a_model("exact"), counts(1, 4)
    with torch.no_grad():
        assert (model(window)[:, -1] - model(window[:, [1, 0, 2, 3]])[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_step_compiles_without_a_graph_break(form: Literal["continual", "exact"]) -> None:
    model, window = a_model(form, torch.float32), counts(2, 7, torch.float32)
    state, plain = model.initial_state(2), model.initial_state(2)
    compiled = torch.compile(model.step, fullgraph=True, backend="eager")
    rows = torch.tensor([1, 0])
    with torch.no_grad():
        for t in range(7):
            torch.testing.assert_close(compiled(window[:, t], state, rows), model.step(window[:, t], plain, rows))


def test_pixels_are_summed_before_the_logarithm() -> None:
    model = a_model("exact", frame=FrameForm(height=4, width=4), pool=2)
    spread, heaped = torch.zeros(2, 1, 1, 2, 4, 4, dtype=torch.float64)
    spread[..., :2, :2] = 1
    heaped[..., 0, 1] = 4
    with torch.no_grad():
        assert_close(model(spread), model(heaped))
        assert (model(spread) - model(2 * heaped)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"width": 9}, "width 9 is not a multiple of heads 2"),
        ({"classes": ("a", "a")}, "classes"),
        ({"memory": 0}, "memory is 0"),
        ({"encoder": "resnet18"}, "vit or timm:NAME"),
        ({"form": "both"}, "continual or exact"),
    ],
)
def test_sizes_that_make_no_model_are_named(sizes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        EventTransActConfig(**{**SMALL, **sizes})


def test_weights_are_loaded_by_their_card(tmp_path: Path) -> None:
    model = a_model("continual", torch.float32)
    config = {**SMALL, "frame": vars_of(SMALL["frame"]), "form": "continual"}
    save_weights(model, tmp_path, Card(model="eventtransact", task="events", config=config))
    loaded = load_model("eventtransact", tmp_path).model
    window = counts(1, 5, torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(window), model(window))
    broken = Card(model="eventtransact", task="events", config={**config, "form": "exact"})
    save_weights(model, tmp_path, broken)
    with pytest.raises(WeightsError, match="lacks 'ring.age'|unexpected"):
        load_model("eventtransact", tmp_path)


def vars_of(form: FrameForm) -> dict[str, Any]:
    return {name: getattr(form, name) for name in form.__dataclass_fields__}


def test_without_timm_its_networks_are_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"stepstream\[timm\]"):
        EventTransAct(EventTransActConfig(**{**SMALL, "encoder": "timm:resnet10t"}))


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs the extra timm")
@pytest.mark.parametrize("name", ["resnet10t", "test_vit"])
def test_a_network_of_timm_is_a_spatial_encoder(name: str) -> None:
    model = EventTransAct(EventTransActConfig(**{**SMALL, "encoder": f"timm:{name}", "form": "exact"})).eval()
    window, state = counts(1, 6, torch.float32), model.initial_state(1)
    with torch.no_grad():
        assert_close(torch.stack([model.step(window[:, t], state) for t in range(6)], dim=1), model(window), 1e-4)
    with pytest.raises(ValueError, match="no such network"):
        EventTransAct(EventTransActConfig(**{**SMALL, "encoder": "timm:no_such_net"}))
