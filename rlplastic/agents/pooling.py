"""Gradients and batch-norm statistics over several ranks: what an optimizer's `reduce` is.

`bn_sync=running`: every rank normalises with the moments of its own rows, and the moments travel in the message that
averages the gradients; running statistics, which act, evaluate and leave with the export, are then those of the whole
batch and the same everywhere. With r the running mean (equal on all ranks), each rank sends d = mean - r and
s = variance + d^2; over equally many rows the pooled mean is r + E[d] and the pooled variance E[s] - E[d]^2. The shift
by r keeps what is squared small.

`bn_sync=forward`: mean and variance themselves are averaged while normalising ("synchronised" batch norm), and so are
their gradients on the way back: up to rounding the update that one rank would do with all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlplastic.agents.layers import BatchNorm, Recorded
from rlplastic.distributed import Bucket, Group, Reduce, dense
from rlplastic.kernels.batch_norm import widened


def reduction(group: Group, bn_sync: str, *modules: nn.Module) -> Reduce:
    """What averages the gradients of one optimizer, and pools the batch norms of ``modules`` that its loss runs.

    Args:
        group: the ranks; alone, nothing is done and the modules stay as they are.
        bn_sync: ``running`` or ``forward``.
        modules: networks that see batch statistics in that loss.
    """
    if group.size == 1:
        return dense
    layers = [layer for module in modules for layer in module.modules() if isinstance(layer, BatchNorm)]
    for layer in layers:
        if bn_sync == "forward":
            layer.normalise, layer.ranks = partial(normalise_over_ranks, group.average), group.size
        else:
            layer.recording = True
    bucket = Bucket(group.average)
    return bucket if bn_sync == "forward" else PooledReduction(bucket, layers, group.size)


class PooledReduction:
    """Averages tensors, and carries the moments of batch norms along."""

    def __init__(self, bucket: Reduce, layers: list[BatchNorm], ranks: int) -> None:
        self._bucket, self._layers, self._ranks = bucket, layers, ranks
        self._seen: list[BatchNorm] = []

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """The means over ranks; the layers' running statistics follow the batches of all ranks."""
        if not self._seen:  # a target critic may have parts that its loss never runs
            self._seen = [layer for layer in self._layers if layer.recorded is not None]
        recorded = [layer.recorded for layer in self._seen if layer.recorded is not None]
        reduced = self._bucket([*tensors, *(moment for batch in recorded for moment in _shifted(batch))])
        means, squares = reduced[len(tensors) :: 2], reduced[len(tensors) + 1 :: 2]
        for layer, batch, shift, square in zip(self._seen, recorded, means, squares, strict=True):
            layer.running_mean.copy_(batch.running_mean)
            layer.running_var.copy_(batch.running_var)
            pooled = batch.running_mean + shift, (square - shift.square()).clamp_min(0)
            layer.follow(*pooled, batch.rows * self._ranks)
        return reduced[: len(tensors)]


def _shifted(batch: Recorded) -> tuple[Tensor, Tensor]:
    """First and second moment of a batch around the running mean before it."""
    shift = batch.mean - batch.running_mean
    return shift, batch.variance + shift.square()


class _Average(torch.autograd.Function):
    """The mean over ranks. What is added up over ranks in the end is the loss, so gradients are averaged alike."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, average: Callable[[Tensor], None]) -> Tensor:  # noqa: ANN401 - torch's context
        ctx.average = average
        mean = value.contiguous().clone()
        average(mean)
        return mean

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        gradient = gradient.contiguous().clone()
        ctx.average(gradient)
        return gradient, None


def normalise_over_ranks(
    average: Callable[[Tensor], None],
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    relu: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rlplastic.kernels.batch_norm.normalise` over equally many rows on every rank.

    Args:
        average: replaces a tensor by its mean over ranks.
        x: (..., dim, B).
        gamma: (..., dim).
        beta: (..., dim).
        eps: added to the variance.
        relu: whether to cut off below 0.
        dtype: of the result.

    Returns:
        The result (..., dim, B), and mean and biased variance of all rows.
    """
    wide = widened(x)
    mean: Tensor = _Average.apply(wide.mean(-1), average)  # type: ignore[no-untyped-call]
    centred = wide - mean.unsqueeze(-1)
    variance: Tensor = _Average.apply(centred.square().mean(-1), average)  # type: ignore[no-untyped-call]
    scale = gamma * torch.rsqrt(variance + eps)
    y = centred * scale.unsqueeze(-1) + beta.unsqueeze(-1)
    return (y.relu() if relu else y).to(dtype), mean.detach(), variance.detach()
