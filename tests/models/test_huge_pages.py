"""Weights and rings in huge pages: the same numbers, objects and life, elsewhere in memory."""

from __future__ import annotations

import copy
import gc
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stepstream.models.continual.encoder import EncoderLayer
from stepstream.models.huge_pages import LINE, PAGE, settle, zeros
from stepstream.models.weights import Card, find_weights, load_into, save_weights

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def layer() -> EncoderLayer:
    torch.manual_seed(0)
    return EncoderLayer(128, 4, 5, 1024).eval()


def places(module: nn.Module) -> list[int]:
    return [t.data_ptr() for t in (*module.parameters(), *module.buffers())]


def test_what_is_settled_is_what_it_was() -> None:
    before, module = layer(), layer()
    parameters = list(module.parameters())
    assert settle(module) is module
    assert [id(p) for p in module.parameters()] == [id(p) for p in parameters]
    assert all(p.requires_grad and p.is_leaf for p in parameters)
    for name, tensor in before.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor)
    x, states = torch.randn(9, 2, 128), (before.initial_state(2), module.initial_state(2))
    with torch.no_grad():
        for now in x:
            assert torch.equal(before.step(now, states[0]), module.step(now, states[1]))


def test_weights_lie_side_by_side() -> None:
    module = settle(layer())
    found = sorted(places(module))
    total = sum(p.nbytes for p in module.parameters())
    assert found[0] % PAGE == 0
    assert all(place % LINE == 0 for place in found)
    assert found[-1] - found[0] < total + len(found) * LINE


def flags_at(address: int) -> list[str]:
    """The flags of the mapping that holds an address: proc(5), /proc/PID/smaps, VmFlags."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"{address:x} is in no mapping")


@pytest.mark.skipif(not ENABLED.is_file(), reason="the system has no transparent huge pages")
def test_the_system_is_asked_for_huge_pages() -> None:
    ring = zeros((64, 8, 64, 64), torch.float32, "cpu").fill_(1)
    module = settle(layer())
    for place in (ring.data_ptr(), ring.data_ptr() + ring.nbytes - 1, min(places(module)), max(places(module))):
        assert "hg" in flags_at(place)


def test_the_step_follows_weights_that_settle_between_two_steps() -> None:
    before, module = layer(), layer()
    states = before.initial_state(1), module.initial_state(1)
    x = torch.randn(4, 1, 128)
    with torch.no_grad():
        for t, now in enumerate(x):
            if t == 2:
                settle(module)
                for one in (before, module):
                    one.linear1.weight.mul_(2)
            assert torch.equal(before.step(now, states[0]), module.step(now, states[1]))


def test_what_shares_memory_stays() -> None:
    one, tied, viewed = nn.Linear(600, 600), nn.Linear(600, 600), nn.Linear(600, 600)
    tied.weight = one.weight  # one parameter twice: it moves, and is still one
    module = nn.ModuleList([one, tied, viewed])
    view, turned = viewed.weight.detach()[:3], torch.randn(600, 500).t()
    module.register_buffer("view", view)
    module.register_buffer("turned", turned)
    moved, kept, still = (t.data_ptr() for t in (one.weight, view, turned))
    settle(module)
    assert tied.weight is one.weight
    assert one.weight.data_ptr() != moved
    assert viewed.weight.data_ptr() == kept == view.data_ptr()
    assert turned.data_ptr() == still


def test_little_stays_where_it_is() -> None:
    module = nn.Linear(100, 100)
    before = places(module)
    assert places(settle(module)) == before


def test_numbers_of_all_kinds() -> None:
    module = nn.Linear(700, 700).double()
    module.register_buffer("mask", torch.rand(7) < 0.5)
    module.register_buffer("rounded", torch.randn(33).bfloat16())
    module.register_buffer("count", torch.arange(5))
    module.register_buffer("none", torch.zeros(0))
    before = copy.deepcopy(module.state_dict())
    settle(module)
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_training_copies_and_files_go_on(tmp_path: Path) -> None:
    module = settle(layer().train())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.randn(1, 5, 128)).sum().backward()
    before = module.linear1.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(module.linear1.weight, before)
    other = copy.deepcopy(module)
    assert not set(places(other)) & set(places(module))
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    torch.save(module.linear1.bias, tmp_path / "bias.pt")
    assert (tmp_path / "bias.pt").stat().st_size < 20_000, "one parameter does not bring all memory along"
    for name, tensor in load_file(tmp_path / "weights.safetensors").items():
        assert torch.equal(tensor, module.state_dict()[name])


def test_loaded_weights_settle(tmp_path: Path) -> None:
    save_weights(layer(), tmp_path, Card(model="sttn", task="forecast", config={}))
    module = EncoderLayer(128, 4, 5, 1024)
    load_into(module, find_weights(str(tmp_path)))
    assert min(places(module)) % PAGE == 0
    assert torch.equal(module.linear1.weight, layer().linear1.weight)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int8])
def test_large_zeros(kind: torch.dtype) -> None:
    ring = zeros((3, 5, 1 << 19), kind, "cpu")
    assert ring.shape == (3, 5, 1 << 19)
    assert ring.dtype == kind
    assert not ring.any()
    assert ring.is_contiguous()
    assert ring.data_ptr() % PAGE == 0
    ring[-1, -1, -1] = 1
    assert ring.sum(dtype=torch.float64) == 1


def test_small_zeros_and_those_of_another_device() -> None:
    assert zeros((3, 2), torch.float32, "cpu").tolist() == [[0, 0]] * 3
    assert zeros((1 << 20, 8), torch.float32, "meta").is_meta


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="no /proc")
def test_memory_is_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    zeros((8 << 20,), torch.float32, "cpu").fill_(1)
    gc.collect()
    before = resident()
    for _ in range(20):
        zeros((8 << 20,), torch.float32, "cpu").fill_(1)
    assert resident() - before < 3 * (32 << 20)
