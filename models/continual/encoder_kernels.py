"""What follows the attention in an encoder layer: all of it for a few rows, or what stands around the products of many.

`table`, `eps`: the layer's, see `LayerTable`.
"""

from __future__ import annotations

from typing import Any

from numba.np.numpy_support import carray
from numpy.typing import NDArray

from stepstream.models.compiled import kernel
from stepstream.models.continual.addresses import floats_at
from stepstream.models.continual.kernels import feed_forward, layer_at, layer_norm

__all__ = ["encoder_end", "encoder_middle", "finish_step"]

Array = NDArray[Any]


@kernel
def encoder_middle(
    table: Array, eps: float, count: int, tokens_at: int, attended_at: int, residual_at: int, inner_at: int
) -> bool:
    """What the layer's feed-forward network is given, and what is added to its output.

    By address, all [count, width]: tokens, what out_proj made of their attention,
    the residual and, if the layer is pre-norm, its norm, inner; post-norm, both are one, and inner is not read.
    """
    weights, biases, _, _, _, _ = layer_at(table)
    width = table[0] * table[2]
    tokens = carray(floats_at(tokens_at), (count, width))
    attended = carray(floats_at(attended_at), (count, width))
    residual = carray(floats_at(residual_at), (count, width))
    inner = carray(floats_at(inner_at), (count if table[5] else 0, width))
    for t in range(count):
        for i in range(width):
            residual[t, i] = tokens[t, i] + attended[t, i]
        if table[5]:
            layer_norm(residual[t], weights[2], biases[2], eps, inner[t])
        else:
            layer_norm(residual[t], weights[1], biases[1], eps, residual[t])
    return True


@kernel
def encoder_end(table: Array, eps: float, batch: int, y_at: int, added_at: int) -> bool:
    """The end: y [batch, width] and what is added to it, normed if post-norm; in place."""
    weights, biases, _, _, _, _ = layer_at(table)
    width = table[0] * table[2]
    y = carray(floats_at(y_at), (batch, width))
    added = carray(floats_at(added_at), (batch, width))
    for b in range(batch):
        for i in range(width):
            y[b, i] += added[b, i]
        if not table[5]:
            layer_norm(y[b], weights[2], biases[2], eps, y[b])
    return True


@kernel
def finish_step(table: Array, eps: float, batch: int, x_at: int, attended_at: int, y_at: int) -> bool:
    """What follows the attention in an encoder layer, as in `encoder_step`: x, attended, y [batch, width]."""
    weights, biases, _, _, _, _ = layer_at(table)
    width = table[0] * table[2]
    x = carray(floats_at(x_at), (batch, width))
    attended = carray(floats_at(attended_at), (batch, width))
    y = carray(floats_at(y_at), (batch, width))
    for b in range(batch):
        feed_forward(x[b], attended[b], weights, biases, eps, table[5] != 0, table[6] != 0, y[b])
    return True
