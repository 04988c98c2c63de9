"""A packed product is torch's product: bits that no batch moves, weights that change, gradients, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from equality import assert_close
from torch import Tensor, nn

from stepstream.models.continual import encoder, packed
from stepstream.models.continual.adapters import adapt, adapters, mask_channels
from stepstream.models.continual.encoder import EncoderLayer
from stepstream.models.continual.packed import Packed, packable

needs_onednn = pytest.mark.skipif(not packable(torch.zeros(1)), reason="this torch comes without oneDNN")


def product(packed: Packed, layer: nn.Linear, x: Tensor) -> Tensor:
    with torch.no_grad():
        return packed.through(layer, x)


@needs_onednn
@pytest.mark.parametrize(("inputs", "outputs"), [(256, 1024), (1024, 256), (64, 192)])
def test_a_row_has_the_same_bits_in_any_batch(inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    packed, layer, x = Packed(), nn.Linear(inputs, outputs), torch.randn(70, inputs)
    whole = product(packed, layer, x)
    assert_close(whole, layer(x).detach())
    for first, count in [(0, 4), (1, 5), (7, 16), (3, 33), (5, 64)]:
        assert torch.equal(product(packed, layer, x[first : first + count].clone()), whole[first : first + count])
    assert torch.equal(product(packed, layer, x.view(2, 35, inputs)), whole.view(2, 35, outputs))


def test_it_follows_the_weights() -> None:
    torch.manual_seed(0)
    packed, layer, x = Packed(), nn.Linear(64, 128), torch.randn(9, 64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)

    def check() -> None:
        assert_close(product(packed, layer, x), layer(x).detach())

    check()
    layer(x).square().sum().backward()
    optimizer.step()
    check()
    layer.load_state_dict(nn.Linear(64, 128).state_dict())
    check()
    layer.weight.data = torch.randn(128, 64)
    check()
    layer.weight.data.mul_(2)  # which torch does not count
    packed.forget()
    check()
    with torch.inference_mode():
        other = nn.Linear(64, 128)
        assert_close(packed.through(other, x), nn.functional.linear(x, other.weight, other.bias))


def test_torch_multiplies_what_it_must_see() -> None:
    packed, layer, x = Packed(), nn.Linear(64, 128), torch.randn(9, 64)
    assert packed.through(layer, x).requires_grad
    layer.weight.requires_grad_(False)
    assert packed.through(layer, x).requires_grad, "of the bias"
    layer.requires_grad_(False)
    assert packed.through(layer, x.clone().requires_grad_()).requires_grad
    seen: list[int] = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    product(packed, layer, x)
    assert seen == [1]
    compiled = torch.compile(lambda x: packed.through(nn.Sequential(layer)[0], x), backend="eager")
    assert_close(compiled(x), layer(x))


@needs_onednn
def test_a_copy_packs_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(encoder, "READ", 0)  # else so few weights are for a kernel that packs nothing
    packs, pack = [], packed._mkldnn()._reorder_linear_weight
    monkeypatch.setattr(packed._mkldnn(), "_reorder_linear_weight", lambda weight: packs.append(weight) or pack(weight))
    layer, x = EncoderLayer(64, 4, 5, 64).eval(), torch.randn(8, 64)
    with torch.no_grad():
        layer.step(x, layer.initial_state(8))
        assert len(packs) == 4
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            other.linear1.weight.mul_(3)
            wanted = copy.deepcopy(other).double()
            found = other.step(x, other.initial_state(8))
            assert_close(found.double(), wanted.step(x.double(), wanted.initial_state(8)), 1e-5)
    assert len(packs) == 12


def test_a_gradient_to_one_part_is_kept() -> None:
    layer = EncoderLayer(64, 4, 5, 64).eval().requires_grad_(False)
    layer.linear2.bias.requires_grad_(True)
    for rows in (1, 8):
        y = layer.step(torch.randn(rows, 64), layer.initial_state(rows))
        assert y.requires_grad, f"{rows} rows"


def test_weights_that_are_made_when_asked_for_are_asked_for_at_every_step() -> None:
    torch.manual_seed(0)
    layer, x = EncoderLayer(64, 4, 5, 64).eval().requires_grad_(False), torch.randn(8, 64)
    adapt(layer)
    mask_channels(layer.self_attn, torch.arange(192) % 64 < 32, name="in_proj_weight")
    with torch.no_grad():
        for scale in (1.0, 2.0):
            for adapter in adapters(layer):
                nn.init.normal_(adapter.up, std=0.1 * scale)  # type: ignore[arg-type]
            exact = copy.deepcopy(layer).double()
            for rows in (1, 8):
                found = layer.step(x[:rows], layer.initial_state(rows))
                assert_close(found.double(), exact.step(x[:rows].double(), exact.initial_state(rows)), 1e-5)
