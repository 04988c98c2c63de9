"""Adapters: what is trained is what is fused, the base stays, and a pruned channel takes its adapter along."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from equality import assert_close, check_step_equals_window
from test_attention import spread
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stepstream.models.continual.adapters import (
    SPLoRA,
    SPPaR,
    WeightAdapter,
    adapt,
    adapters,
    attach,
    fuse,
    mask_channels,
    shrunk,
)
from stepstream.models.continual.encoder import Encoder

FACTORIES: dict[str, Any] = {"splora": lambda w: SPLoRA(w, 3), "sppar": SPPaR}
every_kind = pytest.mark.parametrize("kind", FACTORIES)


def a_layer(kind: str, layer: nn.Module | None = None) -> tuple[Any, WeightAdapter]:
    """A layer whose adapter has learned something."""
    torch.manual_seed(0)
    layer = layer or nn.Linear(6, 5)
    adapter = attach(layer, FACTORIES[kind])
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    return layer, adapter


@every_kind
def test_a_fresh_adapter_changes_nothing(kind: str) -> None:
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    before = layer(x)
    attach(layer, FACTORIES[kind])
    assert torch.equal(layer(x), before)
    assert {name for name, p in layer.named_parameters() if not p.requires_grad} == {"parametrizations.weight.original"}


@every_kind
def test_fusing_gives_a_plain_layer_of_the_same_function(kind: str) -> None:
    layer, adapter = a_layer(kind)
    x, delta = torch.randn(4, 6), adapter.delta()
    base = layer.parametrizations.weight.original.clone()
    before = layer(x)
    assert_close(before, x @ (base + delta).T + layer.bias, 1e-6)
    assert float((before - (x @ base.T + layer.bias)).detach().abs().max()) > 0.1
    assert fuse(layer) is layer
    assert type(layer) is nn.Linear
    assert set(dict(layer.named_parameters())) == {"weight", "bias"}
    assert all(parameter.requires_grad for parameter in layer.parameters())
    assert torch.equal(layer(x), before)


@every_kind
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_beside_a_convolution_it_is_a_convolution_of_kernel_one(kind: str, dims: int) -> None:
    plain: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    layer = plain(4, 3, 3 if dims != 2 else (3, 5), padding=1 if dims != 2 else (1, 2))
    x = torch.randn(2, 4, *[7] * dims)
    alone = layer(x)
    layer, adapter = a_layer(kind, layer)
    beside = torch.einsum("oi,bi...->bo...", adapter.delta(), x)
    assert_close(layer(x), alone + beside)
    before = layer(x)
    assert torch.equal(fuse(copy.deepcopy(layer))(x), before)
    columns = torch.tensor([1, 0, 1, 0]).bool()
    mask_channels(layer, torch.tensor([1, 0, 1]).bool(), columns)
    y = layer(x)
    assert not y[:, 1].any() and y[:, 0].any()
    assert torch.equal(layer(x * columns.view(-1, *[1] * dims)), y)
    assert type(fuse(layer)) is plain
    assert torch.equal(layer(x), y)


@every_kind
def test_only_the_adapter_learns(kind: str) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    adapt(model, FACTORIES[kind], biases_and_norms=False)
    mine = {id(p) for adapter in adapters(model) for p in adapter.parameters()}
    assert len(adapters(model)) == 2
    assert {id(p) for p in model.parameters() if p.requires_grad} == mine
    before = model(torch.ones(1, 6)).detach()
    for _ in range(2):  # the first step of SPLoRA moves A alone: it starts at zero, and B's gradient with it
        model(torch.randn(16, 6)).square().sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p -= 0.1 * p.grad
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if id(p) in mine)
    for name, p in model.named_parameters():
        if id(p) not in mine:
            assert p.grad is None
            plain = name.replace("parametrizations.", "").replace(".original", "")
            assert torch.equal(p, frozen[plain]), name
    assert float((model(torch.ones(1, 6)) - before).detach().abs().max()) > 1e-3


def test_biases_and_norms_may_learn_too() -> None:
    model = adapt(nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Embedding(3, 8)))
    learning = {name for name, p in model.named_parameters() if p.requires_grad and "parametrizations" not in name}
    assert learning == {"0.bias", "1.weight", "1.bias"}
    assert not model[2].weight.requires_grad


@every_kind
def test_a_pruned_channel_takes_its_row_and_column_along(kind: str) -> None:
    layer, adapter = a_layer(kind)
    rows, columns = torch.tensor([1, 0, 1, 1, 0]).bool(), torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    whole = adapter.learned()
    mask_channels(layer, rows, columns)
    assert whole == {"splora": 3 * 11, "sppar": 30}[kind]
    assert adapter.learned() == {"splora": 3 * (3 + 4), "sppar": 12}[kind]
    x = torch.randn(4, 6)
    y = layer(x)
    assert not y[:, ~rows].any()
    assert y[:, rows].all()
    assert torch.equal(layer(x * columns), y)
    y.square().sum().backward()
    kept = {"up": (0, rows), "down": (1, columns), "residual": (0, rows)}
    for name, parameter in adapter.named_parameters():
        axis, mask = kept[name]
        grad: Any = parameter.grad
        assert not grad.movedim(axis, 0)[~mask].any(), name
        assert grad.movedim(axis, 0)[mask].any(), name
    small = shrunk(layer)
    assert tuple(small.weight.shape) == (3, 4)
    assert_close(small(x[:, columns]), y[:, rows])
    assert_close(fuse(layer)(x), y)
    assert type(layer) is nn.Linear


def test_an_adapted_encoder_steps_and_fuses() -> None:
    torch.manual_seed(0)
    encoder = Encoder(2, 16, 2, 4, feedforward=24)
    spread(encoder, 0.5)
    x = torch.randn(1, 20, 16)
    plain = encoder.eval()(x)
    adapt(encoder, FACTORIES["splora"])
    assert len(adapters(encoder)) == 2 * 4  # in_proj_weight, out_proj, linear1, linear2
    assert torch.equal(encoder(x), plain)
    for adapter in adapters(encoder):
        nn.init.normal_(adapter.up, std=0.3)  # type: ignore[arg-type]
    check_step_equals_window(encoder, x)
    before = encoder(x)
    assert float((before - plain).detach().abs().max()) > 0.1
    fuse(encoder)
    assert torch.equal(encoder(x), before)
    assert not [name for name in encoder.state_dict() if "parametrizations" in name]
    # Heads can be masked as well: their rows of the projections, with the bias.
    attach(encoder.layers[0].self_attn, FACTORIES["splora"], "in_proj_weight")  # type: ignore[arg-type]
    rows = (torch.arange(48) % 16) < 8
    mask_channels(encoder.layers[0].self_attn, rows, name="in_proj_weight")  # type: ignore[arg-type]
    q, k, v = encoder.layers[0].self_attn.project(x, torch.zeros(1))  # type: ignore[operator, union-attr]
    assert all(part[:, :, 0].all() and not part[:, :, 1].any() for part in (q, k, v))


def test_what_cannot_be_adapted_says_why() -> None:
    with pytest.raises(ValueError, match="in groups"):
        attach(nn.Conv1d(4, 4, 3, groups=4), SPPaR)
    with pytest.raises(ValueError, match="odd kernel"):
        attach(nn.Conv1d(4, 4, 2), SPPaR)
    with pytest.raises(ValueError, match="rank is 0"):
        SPLoRA(torch.zeros(3, 3), 0)
    with pytest.raises(ValueError, match="no layer that takes"):
        adapt(nn.LayerNorm(3))
    layer = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="has no adapter"):
        mask_channels(layer, torch.ones(3))
    attach(layer, SPLoRA)
    with pytest.raises(ValueError, match="already"):
        attach(layer, SPLoRA)
    # What it cannot take, adapt leaves alone.
    mixed = adapt(nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.Conv1d(4, 4, 2), nn.Linear(3, 3)))
    assert [parametrize.is_parametrized(part) for part in mixed] == [False, False, True]


def test_the_rank_is_at_most_that_of_the_weight() -> None:
    adapter = SPLoRA(torch.zeros(12, 2), 8)
    assert adapter.learned() == 2 * 14


@every_kind
def test_a_copy_of_an_adapted_layer_is_its_own(kind: str) -> None:
    """Fuse a copy to serve it, and train on: parametrize alone would take the original's weight away."""
    layer, _ = a_layer(kind)
    x = torch.randn(2, 6)
    before: Tensor = layer(x)
    other, fused = copy.deepcopy(layer), fuse(copy.deepcopy(layer))
    mask_channels(other, torch.zeros(5).bool())
    assert not other(x).any()
    assert type(fused) is nn.Linear
    assert torch.equal(fused(x), before)
    assert torch.equal(layer(x), before)
    assert torch.equal(fuse(layer)(x), before)
    assert not fuse(other)(x).any()


def test_fusing_leaves_other_parametrisations_alone() -> None:
    layer, _ = a_layer("splora", nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5), "bias"))
    fuse(layer)
    assert not parametrize.is_parametrized(layer, "weight")
    assert parametrize.is_parametrized(layer, "bias")
