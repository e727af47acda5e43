"""Batch normalisation and ReLU as one step forward and one step back (Ioffe and Szegedy, arXiv 1502.03167).

Activations lie features first, ``(..., dim, B)``: the sums over the batch then run along memory, and a row of the
batch stays in the first-level cache from its sums to its result. The gradient is written out, so that a compiler finds
two sums and one pass over a row instead of a chain of saved intermediates; where the ReLU was active is found again
from the input, which is cheaper than reading a saved mask.

Arithmetic is float32 (or wider), whatever the activations are stored in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlplastic.errors import ConfigurationError
from rlplastic.kernels.relu import step


def widened(x: Tensor) -> Tensor:
    """``x`` in at least float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _active(wide: Tensor, scale: Tensor, shift: Tensor, gradient: Tensor, relu: bool) -> Tensor:
    """The gradient before the ReLU; with a comparison, 2 x 1024 x 1024 took 33 ms both ways, and 1.75 without."""
    gradient = widened(gradient)
    if not relu:
        return gradient
    return gradient * step(wide * scale.unsqueeze(-1) + shift.unsqueeze(-1))


class _Underived(torch.autograd.Function):
    """Passes a gradient on that was made by hand; asked for a derivative of it, it says that there is none."""

    @staticmethod
    def forward(_: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:  # noqa: ANN401 - torch's context
        return gradient.view_as(gradient)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401 - torch's context
        raise ConfigurationError(
            "a batch norm with batch statistics has no second derivative; expected a loss with first derivatives only, "
            "or running statistics: evaluate the network with those"
        )


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        eps: float,
        relu: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = widened(x)
        mean = wide.mean(-1)
        variance = (wide - mean.unsqueeze(-1)).square().mean(-1)
        inverse = torch.rsqrt(variance + eps)
        scale = gamma * inverse
        shift = beta - mean * scale
        y = wide * scale.unsqueeze(-1) + shift.unsqueeze(-1)
        ctx.save_for_backward(x, gamma, mean, inverse, scale, shift)
        ctx.relu = relu
        ctx.mark_non_differentiable(mean, variance)
        return (y.relu() if relu else y).to(dtype), mean, variance

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401 - torch's context
        gradient: Tensor,
        _mean: Tensor,
        _variance: Tensor,
    ) -> tuple[Tensor | None, ...]:
        x, gamma, mean, inverse, scale, shift = ctx.saved_tensors
        inputs = (gradient, x, gamma)
        wide = widened(x)
        gradient = _active(wide, scale, shift, gradient, ctx.relu)
        normalised = (wide - mean.unsqueeze(-1)) * inverse.unsqueeze(-1)
        to_beta = gradient.sum(-1)
        to_gamma = (gradient * normalised).sum(-1)
        to_x = None
        if ctx.needs_input_grad[0]:
            rows = x.shape[-1]
            centred = gradient - (to_beta / rows).unsqueeze(-1) - normalised * (to_gamma / rows).unsqueeze(-1)
            to_x = (scale.unsqueeze(-1) * centred).sum_to_size(x.shape).to(x.dtype)
        found: tuple[Tensor | None, ...] = (to_x, to_gamma, to_beta)
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            # The statistics were saved as numbers: a derivative of these gradients would miss what depends on them.
            found = tuple(None if each is None else _Underived.apply(each, *inputs) for each in found)  # type: ignore[no-untyped-call]
        return *found, None, None, None


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context
        x: Tensor,
        scale: Tensor,
        shift: Tensor,
        relu: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, shift)
        ctx.relu = relu
        y = widened(x) * scale.unsqueeze(-1) + shift.unsqueeze(-1)
        return (y.relu() if relu else y).to(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, scale, shift = ctx.saved_tensors
        wide = widened(x)
        gradient = _active(wide, scale, shift, gradient, ctx.relu)
        to_x = (scale.unsqueeze(-1) * gradient).sum_to_size(x.shape).to(x.dtype) if ctx.needs_input_grad[0] else None
        to_scale = (gradient * wide).sum(-1) if ctx.needs_input_grad[1] else None
        to_shift = gradient.sum(-1) if ctx.needs_input_grad[2] else None
        return to_x, to_scale, to_shift, None, None


def normalise(
    x: Tensor, gamma: Tensor, beta: Tensor, eps: float, relu: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """gamma (x - mean) / sqrt(variance + eps) + beta over the batch, then perhaps a ReLU.

    Args:
        x: (..., dim, B); an ensemble may share one (dim, B) input.
        gamma: (..., dim).
        beta: (..., dim).
        eps: added to the variance.
        relu: whether to cut off below 0.
        dtype: of the result.

    Returns:
        The result (..., dim, B), and the batch's mean and biased variance: as ``x`` without B, not differentiable.
    """
    result: tuple[Tensor, Tensor, Tensor] = _Normalise.apply(  # type: ignore[no-untyped-call]
        x, gamma, beta, eps, relu, dtype
    )
    return result


def affine(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, dtype: torch.dtype) -> Tensor:
    """scale x + shift, then perhaps a ReLU: normalisation with statistics that do not depend on the batch.

    Shapes as in `normalise`.
    """
    result: Tensor = _Affine.apply(x, scale, shift, relu, dtype)  # type: ignore[no-untyped-call]
    return result
