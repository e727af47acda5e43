"""What a network says and how its features lie: changes of outputs, batch-norm lag, value bias, geometry.

All results are float64 and NaN where an input is not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity.units import wide


def churn(before: Tensor, after: Tensor) -> Tensor:
    """Mean over held-out states of ||f_after(x) - f_before(x)|| (Tang and Berseth, arXiv 2409.04792).

    For Q in units of the value, for a policy in units of its mean; divide by the outputs' spread to compare tasks.

    Args:
        before: (..., rows, outputs) before one update: Q as (rows, 1), policy means as (rows, A).
        after: the same states after it; none of them was in the update's batch.

    Returns:
        (...).

    Raises:
        ConfigurationError: the shapes differ.
    """
    if before.shape != after.shape:
        raise ConfigurationError(
            f"outputs have shapes {tuple(before.shape)} and {tuple(after.shape)}; expected the same states twice"
        )
    moved: Tensor = torch.linalg.vector_norm(wide(after) - wide(before), dim=-1)
    return moved.mean(-1)


def relative_churn(before: Tensor, after: Tensor) -> Tensor:
    """`churn` in units of the outputs' spread over the states, sqrt(E ||f(x) - E f||^2): comparable between tasks.

    Args:
        before: (..., rows, outputs), as for `churn`.
        after: the same states later.

    Returns:
        (...): 0.01 means that outputs moved by 1 % of their spread; not finite where all states had the same output.

    Raises:
        ConfigurationError: the shapes differ.
    """
    return churn(before, after) / wide(before).var(-2, correction=0).sum(-1).sqrt()


def batch_norm_lag(running_mean: Tensor, inputs: Tensor, eps: float = 1e-5) -> Tensor:
    """|running mean - batch mean| / batch standard deviation, mean over units.

    Args:
        running_mean: (..., units).
        inputs: what enters the batch norm, (..., rows, units); members may share one (rows, units).
        eps: added to the variance, as the batch norm does; a constant unit would divide by 0.

    Returns:
        (...), in standard deviations of the batch.
    """
    x = wide(inputs)
    mean, variance = x.mean(-2), x.var(-2, correction=0)
    return ((running_mean.detach().double() - mean).abs() / (variance + eps).sqrt()).mean(-1)


def value_bias(values: Tensor, returns: Tensor) -> Tensor:
    """E[Q - G] / E|G| over visited state-action pairs (after van Hasselt et al., arXiv 1509.06461).

    Args:
        values: Q, (..., rows).
        returns: discounted Monte-Carlo returns in the same scale, (rows,).

    Returns:
        (...): 0.1 means 10 % too high; NaN where all returns are 0.
    """
    q, g = values.detach().double(), returns.detach().double()
    return (q - g).mean(-1) / g.abs().mean(-1)


def logit_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of a categorical critic's value distribution in nats, (...) of (..., rows, atoms).

    Between 0 (all mass on one atom) and log(atoms).
    """
    log_p = torch.log_softmax(wide(logits), -1)
    return -(log_p.exp() * torch.where(log_p.isneginf(), 0.0, log_p)).sum(-1).mean(-1)


def average_ranks(values: Tensor) -> Tensor:
    """Ranks 1..n along the last dimension of (..., n), ties sharing their mean: what Spearman's rho correlates."""
    ordered, order = values.sort(-1)
    place = torch.arange(values.shape[-1], device=values.device).expand_as(ordered)
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    first = torch.where(starts, place, 0).cummax(-1).values
    ends = starts.roll(-1, -1)
    last = torch.where(ends, place, values.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    return torch.zeros_like(values, dtype=torch.float64).scatter(-1, order, (first + last).double() / 2 + 1)


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's rho along the last dimension, (...) of (..., n); NaN where one side is constant or not finite."""
    finite = first.isfinite().all(-1) & second.isfinite().all(-1)
    a, b = average_ranks(first), average_ranks(second)
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    scale = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return torch.where(finite & (scale > 0), (a * b).sum(-1) / scale, torch.nan)


def distances(features: Tensor) -> Tensor:
    """Euclidean distances between all pairs of rows, (..., rows (rows - 1) / 2) of (..., rows, units).

    From differences, not from the Gram matrix, so that equal rows have distance exactly 0 and remain tied.
    """
    h = wide(features)
    rows = h.shape[-2]
    first, second = torch.triu_indices(rows, rows, 1, device=h.device)
    full = torch.cdist(h, h, compute_mode="donot_use_mm_for_euclid_dist")
    return full[..., first, second]


def geometric_stability(features: Tensor, splits: int = 8, seed: int = 0) -> Tensor:
    """Rank correlation of the distance matrices of two random halves of the units, mean over ``splits``.

    Near 1 where the geometry is spread over many units, near 0 where the halves do not agree (split-half reliability of
    representational dissimilarity matrices; Kriegeskorte et al., doi 10.3389/neuro.06.004.2008).

    Args:
        features: (..., rows, units); cost and memory grow with the square of rows: 256 do.
        splits: how many random halves.
        seed: of the halves.

    Returns:
        (...), in [-1, 1]; NaN for fewer than 2 units or 3 rows, or where all rows are alike.
    """
    h = wide(features)
    rows, units = h.shape[-2:]
    if units < 2 or rows < 3:
        return torch.full(h.shape[:-2], torch.nan, dtype=torch.float64, device=h.device)
    rng = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(splits):
        order = torch.randperm(units, generator=rng).to(h.device)
        half = units // 2
        values.append(rank_correlation(distances(h[..., order[:half]]), distances(h[..., order[half : 2 * half]])))
    return torch.stack(values).mean(0)


def representation_drift(before: Tensor, after: Tensor) -> Tensor:
    """1 - rank correlation of the distance matrices of the same states at two times (sources as above).

    Rotations and scalings of the features do not count as drift, and the widths may differ.

    Args:
        before: (..., rows, units).
        after: (..., rows, units).

    Returns:
        (...), 0 for the same geometry, about 1 for an unrelated one; NaN where one has no geometry.

    Raises:
        ConfigurationError: the numbers of rows differ.
    """
    if before.shape[-2] != after.shape[-2]:
        raise ConfigurationError(
            f"features have {before.shape[-2]} and {after.shape[-2]} rows; expected those of the same states twice"
        )
    return 1 - rank_correlation(distances(before), distances(after))
