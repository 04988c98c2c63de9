"""Matrices of a fixed graph that graph convolutions use."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["chebyshev_polynomials"]


def chebyshev_polynomials(
    sensors: int,
    row: npt.NDArray[np.integer],
    column: npt.NDArray[np.integer],
    weight: npt.NDArray[np.floating],
    order: int,
) -> Tensor:
    """T_1 .. T_{order-1} of the scaled Laplacian of a weighted graph: float32 [order - 1, N, N].

    A directed graph is made symmetric by the larger of the two weights. L~ = 2 L / l_max - I with the normalised
    Laplacian L = I - D^-1/2 A D^-1/2; T_k = 2 L~ T_{k-1} - T_{k-2} (Defferrard et al., arXiv:1606.09375).
    A sensor without an edge has an all-zero row in D^-1/2 A D^-1/2, so nothing becomes non-finite.
    """
    adjacency = np.zeros((sensors, sensors))
    adjacency[np.asarray(row, dtype=np.int64), np.asarray(column, dtype=np.int64)] = weight
    np.fill_diagonal(adjacency, 0)
    adjacency = np.maximum(adjacency, adjacency.T)
    degree = adjacency.sum(axis=1)
    scale = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0)
    laplacian = np.eye(sensors) - scale[:, None] * adjacency * scale[None]
    largest = float(np.linalg.eigvalsh(laplacian)[-1])
    scaled = 2 * laplacian / largest - np.eye(sensors)
    polynomials = [np.eye(sensors), scaled]
    while len(polynomials) < order:
        polynomials.append(2 * scaled @ polynomials[-1] - polynomials[-2])
    return torch.from_numpy(np.stack(polynomials[1:order]) if order > 1 else np.zeros((0, sensors, sensors))).float()
