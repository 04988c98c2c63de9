"""Losses of a perception network: classes of points, occupied cells, and the edges between those and free ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["edge_loss", "lovasz_loss", "occupancy_loss", "point_loss"]


def point_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy plus Lovász-softmax over points [P, K] with a class, int64 [P] from 0.

    `weights`: of each class, float32 [K].
    """
    loss: Tensor = F.cross_entropy(logits, labels, weights, label_smoothing=0.02)
    return loss + lovasz_loss(logits.softmax(1), labels)


def lovasz_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    """What is lacking of the mean intersection over union, extended to probabilities [P, K] so that it has a gradient.

    Berman et al., "The Lovász-Softmax loss", CVPR 2018, algorithm 1, over the classes that are there.
    """
    losses = []
    for k in torch.unique(labels).tolist():
        truth = (labels == k).float()
        errors, order = torch.sort((truth - probabilities[:, k]).abs(), descending=True)
        ordered = truth[order]
        total = ordered.sum()
        jaccard = 1 - (total - ordered.cumsum(0)) / (total + (1 - ordered).cumsum(0))
        losses.append((errors * torch.cat([jaccard[:1], jaccard[1:] - jaccard[:-1]])).sum())
    return torch.stack(losses).mean()


def occupancy_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy plus soft intersection over union of maps [M, X, Y], the mean over them."""
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((1, 2))
    p = logits.sigmoid()
    both = (p * truth).sum((1, 2))
    union = (p + truth - p * truth).sum((1, 2))
    return (4 * entropy + 1 - (both + 1) / (union + 1)).mean()


def edge_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute difference of the Sobel gradients of the probabilities and of the truth, maps [M, X, Y].

    On probabilities and not on thresholded cells, so that it has a gradient everywhere.
    """
    kernel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], device=logits.device) / 8
    sobel = torch.stack([kernel, kernel.t()])[:, None]
    edges = F.conv2d((logits.sigmoid() - truth)[:, None], sobel, padding=1)
    return edges.abs().mean()
