"""The step form of one torch module: which layer it is, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from stepstream.models.continual import conv, conv_transpose, norm, pool
from stepstream.models.continual.base import Layer, NotSteppable
from stepstream.models.continual.containers import Pointwise, Sequential
from stepstream.models.continual.encoder import Encoder
from stepstream.models.continual.recurrent import GRU, LSTM
from stepstream.models.continual.two_block_encoder import TwoBlockEncoder

__all__ = ["Layout", "Wanted", "convert_module", "layout_of"]

Layout: TypeAlias = Literal["channels", "tokens"]
"""[B, C, T, ...] or [B, T, C]."""

_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh,
    nn.Softplus, nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid,
)  # fmt: skip
_CHANNELS = (_ConvNd, _BatchNorm, _MaxPoolNd, _AvgPoolNd)
_TOKENS = (
    nn.Linear,
    nn.LayerNorm,
    nn.RNNBase,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.MultiheadAttention,
)


@dataclass(frozen=True)
class Wanted:
    """See `continual`."""

    memory: int | None
    banded: bool


def layout_of(module: nn.Module) -> Layout | None:
    """What a module takes its input for, if it tells."""
    if isinstance(module, _CHANNELS):
        return "channels"
    return "tokens" if isinstance(module, _TOKENS) else None


def convert_module(name: str, module: nn.Module, layout: Layout, wanted: Wanted) -> Layer | None:
    """The layer of a torch module; None for one that does nothing in serving. Raises NotSteppable."""
    if isinstance(module, nn.Identity | _DropoutNd):
        return None
    if isinstance(module, Layer):
        return module
    if isinstance(module, _ELEMENTWISE):
        return Pointwise(module)
    expected = layout_of(module)
    if expected == "channels" and layout == "tokens":
        raise NotSteppable(f"{name} is a {_kind(module)}, which takes [B, T, C] for [B, C, T]: transpose its input")
    if isinstance(module, _ConvTransposeNd):
        return _transposed(name, module)
    if isinstance(module, _ConvNd):
        return _convolution(name, module)
    if isinstance(module, _MaxPoolNd | _AvgPoolNd):
        return _pool(name, module)
    if isinstance(module, _BatchNorm):
        if not module.track_running_stats:
            raise NotSteppable(f"{name} is a {_kind(module)} without running statistics: it normalises over time")
        return _batch_norm(module)
    if isinstance(module, nn.GroupNorm | _InstanceNorm):
        raise NotSteppable(
            f"{name} is a {_kind(module)}: it normalises over time, so every output changes with every new input; "
            "train with one that normalises within a step (stepstream.models.continual.norm)"
        )
    if layout == "tokens":
        return _of_tokens(name, module, wanted)
    if isinstance(module, nn.Linear | nn.LayerNorm):
        return _last_axis(name, module)
    raise NotSteppable(f"{name} is a {_kind(module)}, of which no step form is known")


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _axes(module: nn.Module) -> int:
    return int(_kind(module).removesuffix("d")[-1])


def _convolution(name: str, module: _ConvNd) -> Layer:
    if module.padding_mode != "zeros":
        raise NotSteppable(
            f"{name} is a {_kind(module)} with padding_mode={module.padding_mode!r}: it repeats inputs "
            "that a stream has not had"
        )
    kind = {1: conv.Conv1d, 2: conv.Conv2d, 3: conv.Conv3d}[_axes(module)]
    padding: Any = module.padding
    if padding == "same":
        reach = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        if any(r % 2 for r in reach):
            raise NotSteppable(f"{name} is a {_kind(module)} with padding='same' and an even kernel: not understood")
        padding = tuple(r // 2 for r in reach)
    try:
        layer = kind(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            stride=module.stride,
            padding=padding,
            dilation=module.dilation,
            groups=module.groups,
            bias=module.bias is not None,
        )
    except ValueError as error:
        raise NotSteppable(f"{name} is a {_kind(module)}: {error}") from None
    return _loaded(layer, module)


def _transposed(name: str, module: _ConvTransposeNd) -> Layer:
    kinds = (conv_transpose.ConvTranspose1d, conv_transpose.ConvTranspose2d, conv_transpose.ConvTranspose3d)
    try:
        layer = kinds[_axes(module) - 1](
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            stride=module.stride,
            padding=cast("tuple[int, ...]", module.padding),
            output_padding=module.output_padding,
            groups=module.groups,
            bias=module.bias is not None,
            dilation=module.dilation,
        )
    except ValueError as error:
        raise NotSteppable(f"{name} is a {_kind(module)}: {error}") from None
    return _loaded(layer, module)


def _batch_norm(module: _BatchNorm) -> Layer:
    kind = (norm.BatchNorm1d, norm.BatchNorm2d, norm.BatchNorm3d)[_axes(module) - 1]
    layer = kind(module.num_features, eps=module.eps, affine=module.affine)
    assert module.running_mean is not None
    layer.to(module.running_mean.device, module.running_mean.dtype)
    layer.load_state_dict(module.state_dict())
    return layer


def _pool(name: str, module: _MaxPoolNd | _AvgPoolNd) -> Layer:
    """Maxima and means over a box are maxima and means over time of those over space."""
    axes = _axes(module)
    kernel, stride, padding = (_by_axis(value, axes) for value in (module.kernel_size, module.stride, module.padding))
    if module.ceil_mode:
        raise NotSteppable(
            f"{name} is a {_kind(module)} with ceil_mode: its last window is cut by the end of the stream"
        )
    parts: dict[str, Layer] = {}
    try:
        if isinstance(module, _MaxPoolNd):
            dilation = _by_axis(module.dilation, axes)
            parts["time"] = pool.MaxPool(kernel[0], stride[0], padding[0], dilation[0])
            if axes > 1:
                kind = nn.MaxPool1d if axes == 2 else nn.MaxPool2d
                parts["space"] = Pointwise(kind(kernel[1:], stride[1:], padding[1:], dilation[1:]))
        else:
            counts = bool(getattr(module, "count_include_pad", True))
            if getattr(module, "divisor_override", None):
                raise NotSteppable(f"{name} is a {_kind(module)} with divisor_override: not understood")
            parts["time"] = pool.AvgPool(kernel[0], stride[0], padding[0], count_include_pad=counts)
            if axes > 1:
                averages: Any = nn.AvgPool1d if axes == 2 else nn.AvgPool2d
                parts["space"] = Pointwise(averages(kernel[1:], stride[1:], padding[1:], count_include_pad=counts))
    except NotSteppable:
        raise
    except ValueError as error:
        raise NotSteppable(f"{name} is a {_kind(module)}: {error}") from None
    return Sequential(parts) if len(parts) > 1 else parts["time"]


def _by_axis(value: Any, axes: int) -> tuple[int, ...]:
    return (value,) * axes if isinstance(value, int) else tuple(value)


def _loaded(layer: Layer, module: nn.Module) -> Layer:
    parameter = next(module.parameters())
    layer.to(parameter.device, parameter.dtype)
    layer.load_state_dict(module.state_dict())
    return layer


def _last_axis(name: str, module: nn.Linear | nn.LayerNorm) -> Layer:
    raise NotSteppable(
        f"{name} is a {_kind(module)} on [B, C, T, ...]: it acts on the last axis, which is time or space and not the "
        "channels; transpose(1, 2) before it"
    )


def _of_tokens(name: str, module: nn.Module, wanted: Wanted) -> Layer:
    if isinstance(module, nn.Linear):
        return Pointwise(module)
    if isinstance(module, nn.LayerNorm):
        if len(module.normalized_shape) > 1:
            raise NotSteppable(f"{name} is a LayerNorm over {tuple(module.normalized_shape)}: it normalises over time")
        return Pointwise(module)
    if isinstance(module, nn.GRU | nn.LSTM):
        if not module.batch_first:
            raise NotSteppable(f"{name} is a {_kind(module)} with batch_first=False: [B, T, C] was expected")
        try:
            return GRU.from_torch(module) if isinstance(module, nn.GRU) else LSTM.from_torch(module)
        except NotSteppable as error:
            raise NotSteppable(f"{name}: {error}") from None
    if isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer):
        return _encoder(name, module, wanted)
    raise NotSteppable(f"{name} is a {_kind(module)}, of which no step form is known")


def _encoder(name: str, module: nn.TransformerEncoder | nn.TransformerEncoderLayer, wanted: Wanted) -> Layer:
    whole = isinstance(module, nn.TransformerEncoder)
    layers = list(module.layers) if isinstance(module, nn.TransformerEncoder) else [module]
    last: Any = module.norm if whole else None
    first = cast("nn.TransformerEncoderLayer", layers[0])
    if wanted.memory is None:
        raise NotSteppable(f"{name} is a {_kind(module)}: over how many steps? Give `memory`, its window in training")
    if not first.self_attn.batch_first:
        raise NotSteppable(f"{name} is a {_kind(module)} with batch_first=False: [B, T, C] was expected")
    if last is not None and not isinstance(last, nn.LayerNorm):
        raise NotSteppable(f"{name}.norm is a {_kind(last)}: a LayerNorm was expected")
    if len(layers) > 2 and not wanted.banded:
        raise NotSteppable(
            f"{name} is a {_kind(module)} of {len(layers)} layers that look both ways: with every new step all "
            "outputs of all layers but the last change, so that nothing but the whole window is exact; banded=True "
            "takes its banded-causal form, which is another function of the same weights"
        )
    options: dict[str, Any] = {
        "feedforward": first.linear1.out_features,
        "activation": _activation(name, first),
        "norm_first": first.norm_first,
        "norm_eps": first.norm1.eps,
        "bias": first.linear1.bias is not None,
        "final_norm": last is not None,
    }
    sizes = (first.self_attn.embed_dim, first.self_attn.num_heads, wanted.memory)
    layer: Layer
    if len(layers) == 2 and not wanted.banded:
        layer = TwoBlockEncoder(*sizes, **options)
    else:
        layer = Encoder(len(layers), *sizes, **options)
    if last is not None:
        cast("Any", layer).norm.eps = last.eps
    state = module.state_dict()
    parameter = next(module.parameters())
    layer.to(parameter.device, parameter.dtype)
    layer.load_state_dict(state if whole else {f"layers.0.{key}": value for key, value in state.items()})
    return layer


def _activation(name: str, layer: nn.TransformerEncoderLayer) -> str:
    chosen = layer.activation
    if chosen is F.relu or isinstance(chosen, nn.ReLU):
        return "relu"
    if chosen is F.gelu or (isinstance(chosen, nn.GELU) and chosen.approximate == "none"):
        return "gelu"
    raise NotSteppable(f"{name} has the activation {chosen}: relu or gelu was expected")
