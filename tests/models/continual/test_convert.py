"""Trained torch modules become step forms with the same outputs, or say which part cannot and why."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equality import assert_close, check_ragged_clocks, check_step_equals_window, stepped
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stepstream.models.continual.base import NotSteppable, outputs_after
from stepstream.models.continual.containers import Sequential
from stepstream.models.continual.convert import continual


def randomised(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """As if trained: no parameter or statistic at its initial value."""
    torch.manual_seed(0)
    for name, tensor in module.state_dict().items():
        if "num_batches" in name:
            continue
        if "running_var" in name:
            tensor.uniform_(0.5, 2.0)
        else:
            tensor.normal_(std=scale)
    return module.double().eval()


def check(module: nn.Module, x: Tensor, channels: bool = True, **options: Any) -> None:
    """X [B, C, T, ...] (or [B, T, C]): emitted are the module's outputs, but for those that look past the end."""
    ours = continual(module, **options)
    window = x.transpose(1, 2) if channels else x
    with torch.no_grad():
        wanted = module(x).transpose(1, 2) if channels else module(x)
        found = ours(window)
    emitted = outputs_after(ours, window.shape[1])
    assert 0 < found.shape[1] == emitted <= wanted.shape[1]
    assert_close(found, wanted[:, :emitted])
    check_step_equals_window(ours, window)
    if ours.upsampling == 1:
        check_ragged_clocks(ours, window)


class Block(nn.Module):
    """A residual block as published: convolutions, norms, a shortcut that fits."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(inputs, outputs, 5, stride, padding=2)
        self.norm1 = nn.BatchNorm1d(outputs)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, padding=2, dilation=2)
        self.norm2 = nn.BatchNorm1d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut: nn.Module = nn.Identity() if same else nn.Conv1d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class Cropped(nn.Module):
    """A residual around a convolution without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.conv(x) + x[:, :, 2:-2]


class Branches(nn.Module):
    """Inception: branches of different reach, concatenated, with a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.short, self.long = nn.Conv1d(4, 3, 1), nn.Conv1d(4, 5, 7, padding=3)
        self.pool, self.gate = nn.MaxPool1d(3, 1, 1), nn.Conv1d(4, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.short(x), self.long(x), self.pool(x)], dim=1) * torch.sigmoid(self.gate(x))


class ConvThenAttention(nn.Module):
    """Convolutions on [B, C, T], an encoder on [B, T, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.conv(x).transpose(1, 2)))


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv1d(4, 6, 3), (4, 40)),
    "stack": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5),
            nn.Conv1d(8, 6, 5, padding=2, groups=2), nn.PReLU(6), nn.AvgPool1d(3, 1, 1),
        ),
        (4, 60),
    ),
    "strided": (
        lambda: nn.Sequential(nn.Conv1d(4, 8, 3, 2, 1), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(8, 4, 3)),
        (4, 90),
    ),
    "two-d": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.AvgPool2d((1, 2)),
                              nn.MaxPool2d((3, 2), (1, 1), (1, 0))),
        (3, 30, 9),
    ),
    "three-d": (
        lambda: nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.SiLU(), nn.MaxPool3d((2, 2, 2))),
        (2, 24, 6, 5),
    ),
    "same": (lambda: nn.Conv1d(4, 4, 5, padding="same", dilation=2), (4, 60)),
    "residual": (lambda: nn.Sequential(Block(4, 4), Block(4, 4)), (4, 90)),
    "residual-with-shortcut": (lambda: Block(4, 6), (4, 60)),
    "residual-strided": (lambda: nn.Sequential(Block(4, 6, 2), Block(6, 6)), (4, 90)),
    "cropped": (Cropped, (4, 50)),
    "branches": (Branches, (4, 60)),
    "transposed": (lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 3, 4, 2, 1)), (4, 40)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_convolutional_modules(name: str) -> None:
    make, shape = MODULES[name]
    module = randomised(make())
    features = (shape[0], *shape[2:])
    check(module, torch.randn(2, *shape, dtype=torch.float64), features=features)


def test_a_chain_is_a_sequential() -> None:
    assert isinstance(continual(nn.Sequential(nn.Conv1d(4, 4, 3), nn.ReLU())), Sequential)


def test_the_module_is_left_alone() -> None:
    module = nn.Sequential(nn.Conv1d(4, 4, 3), nn.BatchNorm1d(4)).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    ours = continual(module)
    for parameter in ours.parameters():
        nn.init.zeros_(parameter)
    assert module.training and not ours.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 1, 2]), st.integers(0, 3)),
        min_size=1,
        max_size=4,
    )
)
def test_stacks_of_any_kernel_dilation_stride_and_padding(sizes: list[tuple[int, int, int, int]]) -> None:
    layers: list[nn.Module] = []
    for kernel, dilation, stride, padding in sizes:
        reach = dilation * (kernel - 1)
        layers += [nn.Conv1d(3, 3, kernel, stride, min(padding, reach), dilation), nn.Tanh()]
    check(randomised(nn.Sequential(*layers)), torch.randn(2, 3, 130, dtype=torch.float64))


def encoder(layers: int, norm_first: bool, norm: bool = True) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 24, activation="gelu", norm_first=norm_first, batch_first=True)
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm(16) if norm else None, enable_nested_tensor=False)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_one_and_two_encoder_layers_are_exact(layers: int, norm_first: bool) -> None:
    """At every step the newest output of the module over the last 6 inputs."""
    module = randomised(encoder(layers, norm_first))
    ours = continual(module, memory=6)
    x = torch.randn(2, 50, 16).double()
    found = stepped(ours, x)
    with torch.no_grad():
        for t in range(50):
            assert_close(found[:, t], module(x[:, max(0, t - 5) : t + 1])[:, -1])
    check_step_equals_window(ours, x)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_deep_encoder_is_refused_unless_banded(norm_first: bool) -> None:
    module = randomised(encoder(3, norm_first, norm=False))
    with pytest.raises(NotSteppable, match=r"encoder is a TransformerEncoder of 3 layers.*banded=True"):
        continual(nn.Sequential(OrderedDict(encoder=module)), memory=6)
    ours = continual(module, memory=6, banded=True)
    x = torch.randn(2, 60, 16).double()
    age = torch.arange(60)[:, None] - torch.arange(60)
    with torch.no_grad():
        assert_close(stepped(ours, x), module(x, mask=(age < 0) | (age >= 6)))
    assert ours.receptive_field == 16


def test_a_single_encoder_layer_module() -> None:
    module = randomised(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True))
    ours = continual(module, memory=5)
    x = torch.randn(1, 30, 16).double()
    with torch.no_grad():
        assert_close(stepped(ours, x)[:, 29], module(x[:, 25:])[:, -1])


def test_convolutions_and_an_encoder_with_axes_swapped_between_them() -> None:
    module = randomised(ConvThenAttention())
    ours = continual(module, memory=7)
    x = torch.randn(2, 4, 40).double()
    found = stepped(ours, x.transpose(1, 2))
    assert ours.delay == 1 and found.shape == (2, 39, 3)
    with torch.no_grad():
        hidden = module.conv(x).transpose(1, 2)
        for t in range(39):
            assert_close(found[:, t], module.head(module.encoder(hidden[:, max(0, t - 6) : t + 1]))[:, -1])


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_recurrent_modules(kind: Any) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = kind(5, 7, 2, batch_first=True), nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    check(randomised(Recurrent()), torch.randn(2, 40, 5).double(), channels=False)


class Looks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Reshapes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.flip(x, (2,))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fast(x) + self.slow(x)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "group norm": (lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.GroupNorm(2, 4)), {}, "^1 is a GroupNorm: it norm"),
    "instance norm": (lambda: nn.Sequential(nn.InstanceNorm1d(4)), {}, "^0 is a InstanceNorm1d: it normalises"),
    "no statistics": (lambda: nn.BatchNorm1d(4, track_running_stats=False), {}, "without running statistics"),
    "reflect": (lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"), {}, "padding_mode='reflect'"),
    "too much padding": (lambda: nn.Conv1d(4, 4, 3, padding=4), {}, "Conv1d: padding over time is 4"),
    "linear over time": (lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(8, 8)), {}, "acts on the last axis"),
    "no memory": (lambda: encoder(1, False), {}, "Give `memory`"),
    "bidirectional": (lambda: nn.GRU(4, 4, batch_first=True, bidirectional=True), {}, "bidirectional"),
    "time first": (lambda: nn.GRU(4, 4), {}, "batch_first=False"),
    "ceil": (lambda: nn.MaxPool1d(3, 2, ceil_mode=True), {}, "ceil_mode"),
    "unknown": (lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.AdaptiveAvgPool1d(1)), {}, "^1 is a AdaptiveAvgPool1d"),
    "conv of tokens": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3)), {}, "takes .B, T, C. for .B, C, T."),
    "branch on data": (Looks, {}, "Looks: its forward cannot be traced"),
    "two inputs": (TwoInputs, {}, "TwoInputs takes x, y: one stream"),
    "flip": (Reshapes, {}, "calls flip"),
    "mixed rates": (Mixed, {}, "outputs of different rates do not meet"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_stepped_is_named_with_its_reason(name: str) -> None:
    make, options, reason = REFUSED[name]
    with pytest.raises(NotSteppable, match=reason):
        continual(make(), **options)


def test_logits_of_a_hundred_survive_conversion() -> None:
    module = randomised(encoder(2, True), 0.3)
    with torch.no_grad():
        for layer in module.layers:
            layer.self_attn.in_proj_weight *= math.sqrt(12)
    ours = continual(module, memory=6)
    x = torch.randn(1, 60, 16).double()
    with torch.no_grad():
        assert_close(stepped(ours, x)[:, -1], module(x[:, -6:])[:, -1])
