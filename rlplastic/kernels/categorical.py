"""Projection of a moved categorical distribution onto fixed atoms (C51, arXiv 1707.06887, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def project_categorical(probabilities: Tensor, targets: Tensor, support: float) -> Tensor:
    """Distribute the mass at moved atoms onto the fixed ones.

    Args:
        probabilities: (B, K) mass of each atom.
        targets: (B, K) where each atom moved to; clipped to [-support, support].
        support: the fixed atoms are linspace(-support, support, K).

    Returns:
        (B, K): each mass split linearly between the two neighbouring fixed atoms; rows with a NaN hold a NaN.
    """
    last = probabilities.shape[-1] - 1
    position = (targets.clamp(-support, support) + support) * (last / (2 * support))
    position = position.clamp(0, last)
    lower = position.floor().clamp(max=last - 1)
    upper_share = position - lower
    # A NaN must reach the loss, where it is named, and not end here as an index out of range.
    index = lower.nan_to_num().long()
    projected = torch.zeros_like(probabilities)
    projected.scatter_add_(-1, index, probabilities * (1 - upper_share))
    return projected.scatter_add_(-1, index + 1, probabilities * upper_share)
