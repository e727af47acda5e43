"""How large weights are, how far they went, and how fast their rows turn.

Tensors are a module's parameters; with ``members=N`` their first dimension holds the members of a batched ensemble, and
results are ``(N,)`` instead of ``()``. Results are float64; a NaN among the weights gives NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity.units import where_finite

Snapshot = Mapping[str, Tensor]
"""Detached copies of parameters by name."""


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters, to measure distances and angles from."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def weight_norm(weights: Sequence[Tensor], members: int | None = None) -> Tensor:
    """Euclidean norm of all weights together, () or (members,).

    Raises:
        ConfigurationError: no weights, or one that has no dimension of ``members``.
    """
    if not weights:
        raise ConfigurationError("no weights were given; expected the parameters of a module or layer")
    flat = []
    for weight in weights:
        if members is not None and (weight.dim() == 0 or weight.shape[0] != members):
            raise ConfigurationError(
                f"a weight has shape {tuple(weight.shape)}; expected {members} members first, or members=None"
            )
        flat.append(weight.detach().double().reshape(*(() if members is None else (members,)), -1))
    norm: Tensor = torch.linalg.vector_norm(torch.cat(flat, -1), dim=-1)
    return norm


def distance(weights: Sequence[Tensor], references: Sequence[Tensor], members: int | None = None) -> Tensor:
    """Euclidean distance from ``references``, such as the weights at initialisation; () or (members,).

    Raises:
        ConfigurationError: shapes differ from the references'.
    """
    if [weight.shape for weight in weights] != [reference.shape for reference in references]:
        raise ConfigurationError("weights and references differ in shape; expected a snapshot of the same module")
    pairs = zip(weights, references, strict=True)
    return weight_norm([weight.detach().double() - reference.double() for weight, reference in pairs], members)


def row_angles(weight: Tensor, reference: Tensor) -> Tensor:
    """Angle in radians between each row and the same row of ``reference``.

    2 atan2(|u - v|, |u + v|) of the unit vectors (Kahan, "How futile are mindless assessments of roundoff", 2006): an
    arc cosine would give 0 for any angle below 1e-8, less than one update moves.

    Args:
        weight: (..., out, in).
        reference: the same shape.

    Returns:
        (..., out), in [0, pi]; NaN for a row of zeros, which has no direction.
    """
    tiny = torch.finfo(torch.float64).tiny
    u, v = (
        torch.where(norm > tiny, wide / norm, torch.nan)
        for wide in (weight.detach().double(), reference.detach().double())
        for norm in [torch.linalg.vector_norm(wide, dim=-1, keepdim=True)]
    )
    return 2 * torch.atan2(torch.linalg.vector_norm(u - v, dim=-1), torch.linalg.vector_norm(u + v, dim=-1))


def mean_angle(weight: Tensor, reference: Tensor) -> Tensor:
    """Mean of `row_angles` over rows, (...); rows of zeros are left out, a NaN among the weights gives NaN."""
    return where_finite(row_angles(weight, reference).nanmean(-1), weight, reference)


def angular_speed(weight: Tensor, reference: Tensor, updates: int) -> Tensor:
    """Mean angle of rows from ``reference``, in radians per update over the ``updates`` that lie between.

    With ``updates=1`` this is the speed itself; over more it is the net speed, lower where rows wander to and fro. It
    is the effective learning rate of a network whose row norms are fixed (Kodryan et al., arXiv 2209.03695; Wan et al.,
    arXiv 2006.08419, "spherical motion dynamics").

    Args:
        weight: (..., out, in).
        reference: the same shape, from before.
        updates: at least 1.

    Returns:
        (...); as `mean_angle`.

    Raises:
        ConfigurationError: ``updates`` is below 1.
    """
    if updates < 1:
        raise ConfigurationError(f"updates={updates} lie between two snapshots; expected at least 1")
    return mean_angle(weight, reference) / updates
