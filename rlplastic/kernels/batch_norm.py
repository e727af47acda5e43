"""Batch normalisation and ReLU over activations that lie features first (Ioffe and Szegedy, arXiv 1502.03167).

Features first, ``(..., dim, B)``: the sums over the batch run along memory, and a row of the batch stays in the
first-level cache from its sums to its result.

Eager code calls torch's operator, one pass each way. For a compiler that one is a chain of sums, so compiled code gets
the step written out, with its gradient: two sums and one pass over a row, up to 4 % of an update of FlashSAC.

Arithmetic is float32 (or wider), whatever the activations are stored in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """``x`` in at least float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Written(torch.autograd.Function):
    """`normalise` for a compiler, with its gradient; what it saves is constant for a second derivative."""

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
        """The result, and the batch's mean and biased variance."""
        wide = widened(x)
        mean = wide.mean(-1)
        variance = (wide - mean.unsqueeze(-1)).square().mean(-1)
        inverse = torch.rsqrt(variance + eps)
        scale = gamma * inverse
        shift = beta - mean * scale
        ctx.save_for_backward(x, mean, inverse, scale, shift)
        ctx.relu = relu
        ctx.mark_non_differentiable(mean, variance)
        return affine(x, scale, shift, relu, dtype), mean, variance

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401 - torch's context
        gradient: Tensor,
        _mean: Tensor,
        _variance: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x, gamma and beta."""
        x, mean, inverse, scale, shift = ctx.saved_tensors
        wide, gradient = widened(x), widened(gradient)
        if ctx.relu:
            gradient = torch.where(_affine(wide, scale, shift) > 0, gradient, 0.0)
        normalised = (wide - mean.unsqueeze(-1)) * inverse.unsqueeze(-1)
        to_beta = gradient.sum(-1)
        to_gamma = (gradient * normalised).sum(-1)
        to_x = None
        if ctx.needs_input_grad[0]:
            rows = x.shape[-1]
            centred = gradient - (to_beta / rows).unsqueeze(-1) - normalised * (to_gamma / rows).unsqueeze(-1)
            to_x = (scale.unsqueeze(-1) * centred).sum_to_size(x.shape).to(x.dtype)
        return to_x, to_gamma, to_beta, None, None, None


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
        The result (..., dim, B), and the batch's mean and biased variance: (..., dim), not differentiable.
    """
    if torch.compiler.is_compiling():
        written: tuple[Tensor, Tensor, Tensor] = Written.apply(x, gamma, beta, eps, relu, dtype)  # type: ignore[no-untyped-call]
        return written
    wide = widened(x).expand(*gamma.shape, x.shape[-1])
    channels = wide.reshape(1, gamma.numel(), x.shape[-1])
    y, mean, inverse = torch.native_batch_norm(channels, gamma.flatten(), beta.flatten(), None, None, True, 0.0, eps)
    y = y.view(wide.shape)
    mean, inverse = (each.detach().view(gamma.shape) for each in (mean, inverse))
    variance = (inverse.square().reciprocal() - eps).clamp(min=0)
    return (y.relu() if relu else y).to(dtype), mean, variance


def affine(x: Tensor, scale: Tensor, shift: Tensor, relu: bool, dtype: torch.dtype) -> Tensor:
    """scale x + shift, then perhaps a ReLU: normalisation with statistics that do not depend on the batch.

    Shapes as in `normalise`.
    """
    y = _affine(widened(x), scale, shift)
    return (y.relu() if relu else y).to(dtype)


def _affine(wide: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return wide * scale.unsqueeze(-1) + shift.unsqueeze(-1)
