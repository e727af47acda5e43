"""Size and reliability of a loss's gradient, from separate backward passes that leave ``.grad`` alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlplastic.errors import ConfigurationError

MICRO_BATCHES = 8
"""Fewest micro-batches that a covariance is estimated from."""


def flat_gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient of a scalar as one float64 vector (P,), zeros for parameters the loss does not reach."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).detach().double().reshape(-1) for g, p in pairs])


def micro_batch_gradients(
    loss: Callable[[Any], Tensor], micro_batches: Iterable[Any], parameters: Sequence[Tensor]
) -> Tensor:
    """One gradient per micro-batch, (K, P): disjoint batches of one size, from one distribution.

    Wrap it in `rlplastic.plasticity.activations.untouched` where the loss moves batch-norm statistics.
    """
    with torch.enable_grad():
        return torch.stack([flat_gradient(loss(batch), parameters) for batch in micro_batches])


def gradient_norm(gradients: Tensor) -> Tensor:
    """Euclidean norm of the mean gradient: () of (K, P) or of one (P,)."""
    gradients = gradients.double()
    norm: Tensor = torch.linalg.vector_norm(gradients if gradients.dim() == 1 else gradients.mean(0))
    return norm


def gradient_signal_to_noise(gradients: Tensor) -> Tensor:
    """||E g||^2 / tr Cov(g), both unbiased (McCandlish et al., arXiv 1812.06162, appendix A.1).

    The squared norm of a mean over K is too large by tr Cov / K, which alone would give pure noise a ratio of 1/K; it
    is subtracted, so noise gives 0 on average and a single value may be slightly negative. Noise is that of one
    micro-batch: compare only ratios of equal micro-batch size.

    Args:
        gradients: (K, P), K >= 8.

    Returns:
        (); infinity for gradients without noise, 0 where all are zero, NaN where one is not finite.

    Raises:
        ConfigurationError: fewer than 8 micro-batches.
    """
    count = gradients.shape[0]
    if gradients.dim() != 2 or count < MICRO_BATCHES:
        raise ConfigurationError(
            f"gradients have shape {tuple(gradients.shape)}; expected (K, P) with K >= {MICRO_BATCHES} micro-batches"
        )
    gradients = gradients.double()
    mean = gradients.mean(0)
    noise = (gradients - mean).square().sum() / (count - 1)
    signal = mean.square().sum() - noise / count
    return torch.where((signal == 0) & (noise == 0), torch.zeros_like(noise), signal / noise)
