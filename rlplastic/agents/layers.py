"""Norm-bounded building blocks of FlashSAC (arXiv 2604.04539), each usable as one network or as a batched ensemble.

With ``members=None`` parameters have their plain shape and activations are ``(dim, B)``. With ``members=N`` every
parameter has a leading dimension N and activations are ``(N, dim, B)``: twin critics are one module and one batched
product. Activations lie features first because a batch norm sums over the batch: see `rlplastic.kernels.batch_norm`.

Whether a batch norm uses batch or running statistics is an argument of the call, not a mode of the module: the agent
needs both on the same network within one update. So is ``bf16``, with which the products of a trunk take and give
bfloat16, and what lies between two products is stored so (sums, statistics, residual stream and heads stay float32).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlplastic.errors import ConfigurationError
from rlplastic.kernels.batch_norm import affine, normalise
from rlplastic.kernels.norm_bounds import NormProjection, project_norms


def _lead(members: int | None) -> tuple[int, ...]:
    return () if members is None else (members,)


class UnitLinear(nn.Module):
    """Linear map without bias; rows are kept unit vectors by `NormBounds`, orthogonal initialisation of gain 1."""

    def __init__(self, in_features: int, out_features: int, members: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*_lead(members), out_features, in_features))
        with torch.no_grad():
            for matrix in self.weight if members is not None else [self.weight]:
                nn.init.orthogonal_(matrix)

    def forward(self, x: Tensor, bf16: bool = False) -> Tensor:
        """Map (..., in_features, B) to (..., out_features, B); ``bf16`` rounds inputs and output to bfloat16."""
        weight: Tensor = self.weight
        if bf16:
            x, weight = x.bfloat16(), weight.bfloat16()
        return weight @ x

    def to_rows(self, x: Tensor) -> Tensor:
        """Map (..., in_features, B) to (..., B, out_features): what a head does."""
        weight: Tensor = self.weight
        return x.mT @ weight.mT


class Recorded(NamedTuple):
    """A batch that running statistics followed, and what they were before."""

    running_mean: Tensor
    running_var: Tensor
    mean: Tensor
    variance: Tensor
    """Biased."""
    rows: int


class BatchNorm(nn.Module):
    """Batch normalisation (arXiv 1502.03167): biased variance normalises, unbiased enters the running statistics.

    Attributes:
        normalise: `rlplastic.kernels.batch_norm.normalise`, or what does the same over the batches of several ranks.
        ranks: how many ranks' batches, equally large, it normalises over.
        recording: keep the newest batch in ``recorded``, so that the running statistics can follow all ranks' instead.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, members: int | None = None, momentum: float = 0.01, eps: float = 1e-5) -> None:
        super().__init__()
        shape = (*_lead(members), dim)
        self.momentum, self.eps = momentum, eps
        self.gamma = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))
        self.normalise, self.ranks, self.recording = normalise, 1, False
        self.recorded: Recorded | None = None

    def forward(
        self, x: Tensor, batch_statistics: bool, relu: bool = False, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Normalise (..., dim, B) over B, then cut off below 0 if ``relu``; the result has ``dtype``.

        With ``batch_statistics`` the running statistics move towards the batch's. An ensemble may share one (dim, B)
        input.
        """
        if not batch_statistics:
            scale = self.gamma * torch.rsqrt(self.running_var + self.eps)
            return affine(x, scale, self.beta - self.running_mean * scale, relu, dtype)
        y, mean, variance = self.normalise(x, self.gamma, self.beta, self.eps, relu, dtype)
        rows = x.shape[-1] * self.ranks
        if self.recording:
            self.recorded = Recorded(self.running_mean.clone(), self.running_var.clone(), mean, variance, rows)
        self.follow(mean, variance, rows)
        return y

    @torch.no_grad()
    def follow(self, mean: Tensor, variance: Tensor, rows: int) -> None:
        """Move the running statistics towards the moments (..., dim) of a batch with so many rows."""
        self.running_mean.lerp_(mean.expand_as(self.running_mean), self.momentum)
        unbiased = variance * (rows / max(rows - 1, 1))
        self.running_var.lerp_(unbiased.expand_as(self.running_var), self.momentum)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned gain (arXiv 1910.07467)."""

    def __init__(self, dim: int, members: int | None = None, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.gain = nn.Parameter(torch.ones(*_lead(members), dim))

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """Scale each column of (..., dim, B) to root mean square 1, then by the gain; cut off below 0 if ``relu``."""
        y = x * torch.rsqrt(x.square().mean(-2, keepdim=True) + self.eps) * self.gain.unsqueeze(-1)
        return y.relu() if relu else y


class ResidualBlock(nn.Module):
    """Inverted bottleneck H -> 4H -> H; the second ReLU comes before the residual addition."""

    def __init__(self, width: int, members: int | None = None) -> None:
        super().__init__()
        self.expand = UnitLinear(width, 4 * width, members)
        self.expand_norm = BatchNorm(4 * width, members)
        self.contract = UnitLinear(4 * width, width, members)
        self.contract_norm = BatchNorm(width, members)

    def forward(self, x: Tensor, batch_statistics: bool, bf16: bool = False) -> Tensor:
        """(..., H, B) to (..., H, B)."""
        between = torch.bfloat16 if bf16 else x.dtype
        hidden = self.expand_norm(self.expand(x, bf16), batch_statistics, True, between)
        added: Tensor = self.contract_norm(self.contract(hidden, bf16), batch_statistics, True, x.dtype)
        return x + added


class RowNormBlock(nn.Module):
    """`ResidualBlock` with RMSNorm, which sees one row at a time: for rows that must not share statistics."""

    def __init__(self, width: int, members: int | None = None) -> None:
        super().__init__()
        self.expand = UnitLinear(width, 4 * width, members)
        self.expand_norm = RMSNorm(4 * width, members)
        self.contract = UnitLinear(4 * width, width, members)
        self.contract_norm = RMSNorm(width, members)

    def forward(self, x: Tensor, bf16: bool = False) -> Tensor:
        """(..., H, B) to (..., H, B)."""
        hidden = self.expand_norm(self.expand(x, bf16).to(x.dtype), True)
        added: Tensor = self.contract_norm(self.contract(hidden, bf16).to(x.dtype), True)
        return x + added


class Trunk(nn.Module):
    """Everything but the head: batch norm on the raw input, embedding, residual blocks, RMSNorm."""

    def __init__(self, input_dim: int, width: int, num_blocks: int, members: int | None = None) -> None:
        super().__init__()
        self.input_norm = BatchNorm(input_dim, members)
        self.embed = UnitLinear(input_dim, width, members)
        self.blocks = nn.ModuleList(ResidualBlock(width, members) for _ in range(num_blocks))
        self.post_norm = RMSNorm(width, members)

    def forward(self, x: Tensor, batch_statistics: bool, bf16: bool = False) -> Tensor:
        """(..., input_dim, B), or (input_dim, B) for all members alike, to features (..., width, B)."""
        between = torch.bfloat16 if bf16 else x.dtype
        hidden = self.embed(self.input_norm(x, batch_statistics, False, between), bf16).to(x.dtype)
        for block in self.blocks:
            hidden = block(hidden, batch_statistics, bf16)
        features: Tensor = self.post_norm(hidden)
        return features


class NormBounds:
    """The projection that follows every optimizer step (FlashSAC, "norm bounding").

    Rows of every `UnitLinear` become unit vectors; gamma and beta of each `BatchNorm` are scaled jointly to norm
    sqrt(dim); the gain of each `RMSNorm` to norm sqrt(dim). Other parameters (head biases) stay free.

    Args:
        module: whose parameters are bounded, those it has now.
        kernels: "torch" for the reference, or "triton" for one launch on a GPU.

    Raises:
        ConfigurationError: Triton is not installed.
    """

    def __init__(self, module: nn.Module, kernels: str = "torch") -> None:
        layers = list(module.modules())
        self._weights: list[Tensor] = [layer.weight for layer in layers if isinstance(layer, UnitLinear)]
        self._affine = [(layer.gamma, layer.beta) for layer in layers if isinstance(layer, BatchNorm)]
        self._gains: list[Tensor] = [layer.gain for layer in layers if isinstance(layer, RMSNorm)]
        parameters = self._weights, self._affine, self._gains
        if kernels not in ("torch", "triton"):
            raise ConfigurationError(f"kernels={kernels!r} is unknown; use 'torch' or 'triton'")
        self._project = NormProjection(*parameters) if kernels == "triton" else partial(project_norms, *parameters)

    def project(self) -> None:
        """Project all parameters in place."""
        self._project()

    @torch.no_grad()
    def deviations(self) -> dict[str, Tensor]:
        """Largest relative distance from each bound, 0 after a projection up to rounding: for logs and tests."""

        def worst(values: list[Tensor]) -> Tensor:
            return torch.stack([(value - 1).abs().max() for value in values]).max()

        return {
            "linear_rows": worst([torch.linalg.vector_norm(weight, dim=-1) for weight in self._weights]),
            "batch_norm": worst([((g.square() + b.square()).sum(-1) / g.shape[-1]).sqrt() for g, b in self._affine]),
            "rms_norm": worst([gain.square().mean(-1).sqrt() for gain in self._gains]),
        }
