"""What single hidden units do on a batch: active, saturated, dormant, dead, linearised, duplicated.

Every function takes activations *after* the nonlinearity, ``(..., rows, units)`` with leading dimensions for members of
an ensemble, and returns one number per member, ``(...)`` in float64. Pre-activations are not needed: ReLU and its
relatives (leaky, ELU, GELU, SiLU) are positive exactly where their input is.

A layer that holds a NaN or an infinity gives NaN: a comparison with NaN is false, and a broken layer would otherwise
count as one without dormant units. Arithmetic is float64, so that tiny activations do not underflow when squared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlplastic.errors import ConfigurationError

SATURATION = 0.95
"""|tanh| above this counts as saturated: its slope 1 - h^2 is then below a tenth."""
DORMANT = 0.025
GRADIENT_DORMANT = 0.01
DUPLICATE = 0.95


def wide(activations: Tensor) -> Tensor:
    """Detached float64 activations.

    Raises:
        ConfigurationError: fewer than two dimensions, or no row or no unit.
    """
    if activations.dim() < 2 or 0 in activations.shape:
        raise ConfigurationError(
            f"activations have shape {tuple(activations.shape)}; expected (..., rows, units), none of them 0"
        )
    return activations.detach().double()


def where_finite(value: Tensor, *sources: Tensor) -> Tensor:
    """``value`` (...), NaN for every member whose (..., rows, units) is not finite throughout."""
    finite = torch.stack([source.isfinite().all(-1).all(-1) for source in sources]).all(0)
    return torch.where(finite, value, torch.nan)


def active_fraction(activations: Tensor) -> Tensor:
    """Mean over units of E_x[h > 0] (FAU; Ma et al., arXiv 2310.07418).

    Args:
        activations: of a rectifier, (..., rows, units).

    Returns:
        (...), in [0, 1].
    """
    h = wide(activations)
    return where_finite((h > 0).double().mean((-1, -2)), h)


def unsaturated_fraction(activations: Tensor, threshold: float = SATURATION) -> Tensor:
    """The active fraction of a tanh layer: mean over units of E_x[|h| < threshold].

    Args:
        activations: of a tanh, (..., rows, units).
        threshold: from which on a unit hardly passes gradients.

    Returns:
        (...), in [0, 1].
    """
    h = wide(activations)
    return where_finite((h.abs() < threshold).double().mean((-1, -2)), h)


def unit_scores(values: Tensor) -> Tensor:
    """s_i = E_x|v_i| / mean_j E_x|v_j| (Sokar et al., arXiv 2302.12902).

    Args:
        values: activations or gradients, (..., rows, units).

    Returns:
        (..., units); zeros where the whole layer is silent, NaN where it is not finite.
    """
    v = wide(values).abs()
    # Dividing by the largest first keeps sums of huge values finite; the score does not notice.
    largest = v.amax((-1, -2), keepdim=True)
    v = torch.where(largest > 0, v / largest, v)
    size = v.mean(-2)
    layer = size.mean(-1, keepdim=True)
    return torch.where(layer == 0, torch.zeros_like(size), size / layer)


def dormant_ratio(activations: Tensor, tau: float = DORMANT) -> Tensor:
    """Fraction of units whose score is at most ``tau`` (Sokar et al., arXiv 2302.12902).

    Args:
        activations: (..., rows, units).
        tau: 0.025; 0.1 at high replay ratios.

    Returns:
        (...), in [0, 1]; 1 for a silent layer. For a module see `weighted_by_units`.
    """
    scores = unit_scores(activations)
    return torch.where(scores.isnan().any(-1), torch.nan, (scores <= tau).double().mean(-1))


def gradient_dormant_ratio(gradients: Tensor, tau: float = GRADIENT_DORMANT) -> Tensor:
    """Fraction of units whose E_x|dL/dh_i|, over the layer's mean, is at most ``tau`` (GraMa, arXiv 2505.24061).

    Args:
        gradients: of the loss with respect to each activation, (..., rows, units).
        tau: 0.01.

    Returns:
        (...), in [0, 1]; 1 where no gradient arrives. The scale of the loss does not matter.
    """
    return dormant_ratio(gradients, tau)


def dead_fraction(activations: Tensor) -> Tensor:
    """Fraction of rectified units that are never above 0, (...) of (..., rows, units)."""
    h = wide(activations)
    return where_finite((h.amax(-2) <= 0).double().mean(-1), h)


def linearised_fraction(activations: Tensor) -> Tensor:
    """Fraction of rectified units that are above 0 on every row, (...) of (..., rows, units).

    Such a unit is an affine map of its input: it adds no nonlinearity (Lyle et al., arXiv 2402.18762).
    """
    h = wide(activations)
    return where_finite((h.amin(-2) > 0).double().mean(-1), h)


def duplicate_fraction(activations: Tensor, cosine: float = DUPLICATE) -> Tensor:
    """Fraction of units whose activations, as a vector over rows, have a cosine above ``cosine`` with another's.

    Clones get the same gradients and stay clones (Joudaki et al., arXiv 2510.00304). Silent units are dead, not
    duplicates. Few rows make accidental duplicates, one row makes all active units equal: take at least as many rows as
    units.

    Args:
        activations: (..., rows, units).
        cosine: 0.95, met to 1e-6.

    Returns:
        (...), in [0, 1].
    """
    h = wide(activations)
    h = h / h.abs().amax(-2, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny)
    # Unit vectors no longer underflow, and this product is most of what a forward tier costs: float32 halves it.
    unit = torch.nn.functional.normalize(h, dim=-2, eps=torch.finfo(h.dtype).tiny).float()
    similar = unit.mT @ unit
    similar.diagonal(dim1=-2, dim2=-1).fill_(-1)
    return where_finite((similar.amax(-1) > cosine).double().mean(-1), wide(activations))


def weighted_by_units(ratios: list[Tensor], units: list[int]) -> Tensor:
    """A module's ratio from its layers': sum_l n_l r_l / sum_l n_l (as arXiv 2302.12902 counts them).

    Args:
        ratios: one (...) per layer.
        units: n_l.
    """
    weights = torch.tensor(units, dtype=torch.float64, device=ratios[0].device)
    return (torch.stack(ratios, -1) * weights).sum(-1) / weights.sum()
