"""How many directions the features of a layer use: three ranks that the literature calls by one name.

Each takes features ``(..., rows, units)``, not centred, and returns ``(...)`` in float64, NaN for a member that is not
finite and 0 for one that is all zero. A rank is at most min(rows, units), so take at least ``2 * units`` rows. The same
functions apply to features at initialisation and to Gram matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlplastic.plasticity.units import where_finite, wide

DELTA = 0.01


def singular_values(features: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (..., min(rows, units)), descending, as fractions of the largest; and float64 features.

    Features that are not finite count as 0 here, since a decomposition would raise or hang on them.
    """
    h = wide(features)
    clean = torch.where(h.isfinite(), h, 0.0)
    values = torch.linalg.svdvals(clean)
    return values / values[..., :1].clamp_min(1e-300), h


def effective_rank(features: Tensor) -> Tensor:
    """exp(H(p)), p_i = sigma_i / sum_j sigma_j (Roy and Vetterli, "The effective rank", EUSIPCO 2007).

    At initialisation it tells a rich from a lazy regime: measure it on the fresh network, on the same batch.

    Args:
        features: (..., rows, units).

    Returns:
        (...), in [1, min(rows, units)], or 0.
    """
    values, h = singular_values(features)
    return where_finite(_effective(values), h)


def srank(features: Tensor, delta: float = DELTA) -> Tensor:
    """Smallest k whose k largest singular values hold 1 - delta of their sum (Kumar et al., arXiv 2010.14498).

    Args:
        features: (..., rows, units).
        delta: 0.01.

    Returns:
        (...), a whole number as float64.
    """
    values, h = singular_values(features)
    return where_finite(_srank(values, delta), h)


def stable_rank(features: Tensor) -> Tensor:
    """||H||_F^2 / ||H||_2^2 (Rudelson and Vershynin, arXiv math/0503442): not `srank`, and often much smaller.

    Args:
        features: (..., rows, units).

    Returns:
        (...), in [1, min(rows, units)], or 0.
    """
    values, h = singular_values(features)
    return where_finite(_stable(values), h)


def all_ranks(features: Tensor) -> dict[str, Tensor]:
    """The three of them by name, (...) each, from one decomposition, which is nearly all that they cost."""
    values, h = singular_values(features)
    found = {"effective_rank": _effective(values), "srank_0.01": _srank(values, DELTA), "stable_rank": _stable(values)}
    return {name: where_finite(rank, h) for name, rank in found.items()}


def _effective(values: Tensor) -> Tensor:
    total = values.sum(-1, keepdim=True)
    entropy = torch.special.entr(values / total.clamp_min(1e-300)).sum(-1)
    return torch.where(total.squeeze(-1) > 0, entropy.exp(), 0.0)


def _srank(values: Tensor, delta: float) -> Tensor:
    mass = values.cumsum(-1)
    # The rounding of a sum must not ask for one more direction: equal values reach exactly 1 - delta.
    short = mass < (1 - delta) * mass[..., -1:] * (1 - 1e-12)
    return torch.where(mass[..., -1] > 0, short.sum(-1) + 1.0, 0.0)


def _stable(values: Tensor) -> Tensor:
    return values.square().sum(-1)
