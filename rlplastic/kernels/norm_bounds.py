"""Norm bounding: the projection that follows every optimizer step of FlashSAC (arXiv 2604.04539).

A row is what one norm is taken of. Rows w of linear maps become w / ||w||; gamma and beta of each batch norm are scaled
jointly by sqrt(d) / sqrt(||gamma||^2 + ||beta||^2 + eps), the gain g of each RMSNorm by sqrt(d) / sqrt(||g||^2 + eps).
`project_norms` is the plain torch reference; `NormProjection` does all rows of a network in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlplastic.errors import ConfigurationError
from rlplastic.kernels._triton import AVAILABLE, interpreted, tl, triton

SHORTEST = 1e-12
"""Rows shorter than this are divided by it, so that a row of zeros stays zero."""
EPS = 1e-8

Affine = Sequence[tuple[Tensor, Tensor]]


@torch.no_grad()
def project_norms(weights: Sequence[Tensor], affine: Affine, gains: Sequence[Tensor]) -> None:
    """Project in place; the last dimension of a tensor is a row, leading ones are members and outputs.

    Args:
        weights: of linear maps, (..., in).
        affine: gamma and beta of each batch norm, both (..., d).
        gains: of RMSNorms, (..., d).
    """
    if weights:
        norms = [torch.linalg.vector_norm(weight, dim=-1, keepdim=True) for weight in weights]
        torch._foreach_clamp_min_(norms, SHORTEST)
        torch._foreach_div_(list(weights), norms)
    scaled, betas = [*(gamma for gamma, _ in affine), *gains], [beta for _, beta in affine]
    if scaled:
        factors = [torch.linalg.vector_norm(row, dim=-1, keepdim=True) for row in scaled]
        torch._foreach_mul_(factors, factors)
        if betas:
            norms = [torch.linalg.vector_norm(beta, dim=-1, keepdim=True) for beta in betas]
            torch._foreach_addcmul_(factors[: len(betas)], norms, norms)
        torch._foreach_add_(factors, EPS)
        torch._foreach_rsqrt_(factors)
        torch._foreach_mul_(factors, [row.shape[-1] ** 0.5 for row in scaled])
        torch._foreach_mul_(scaled + betas, factors + factors[: len(betas)])


@triton.jit
def _project_row(
    first: tl.tensor,
    second: tl.tensor,
    length: tl.tensor,
    unit: tl.tensor,
    ALIGNMENT: tl.constexpr,
    SHORTEST: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Scale the row at address ``first``, jointly with the one at ``second`` unless that is 0."""
    first_ptr = tl.multiple_of(first.to(tl.pointer_type(tl.float32)), ALIGNMENT)
    second_ptr = tl.multiple_of(second.to(tl.pointer_type(tl.float32)), ALIGNMENT)
    i = tl.arange(0, BLOCK)
    here = i < length
    there = here & (second != 0)
    x = tl.load(first_ptr + i, mask=here, other=0.0)
    y = tl.load(second_ptr + i, mask=there, other=0.0)
    squares = tl.sum(x * x + y * y, 0)
    norm = tl.sqrt(squares)
    norm = tl.where(norm < SHORTEST, SHORTEST, norm)  # and not maximum, which would drop a NaN
    factor = tl.where(unit, 1.0 / norm, tl.sqrt(length.to(tl.float32)) * tl.rsqrt(squares + EPS))
    tl.store(first_ptr + i, x * factor, mask=here)
    tl.store(second_ptr + i, y * factor, mask=there)


@triton.jit
def project_norms_kernel(table_ptr: tl.tensor, SHORTEST: tl.constexpr, EPS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """One row per program, in registers between its one read and its one write; for the table see `NormProjection`.

    The branch with the rounded numbers is the same function compiled for what it can rely on: 128-bit accesses.
    """
    entry_ptr = table_ptr + tl.program_id(0) * 4
    first, second = tl.load(entry_ptr), tl.load(entry_ptr + 1)
    length, unit = tl.load(entry_ptr + 2).to(tl.int32), tl.load(entry_ptr + 3) != 0
    if ((first | second) % 16 == 0) & (length % 4 == 0):
        _project_row(first // 16 * 16, second // 16 * 16, length // 4 * 4, unit, 16, SHORTEST, EPS, BLOCK)
    else:
        _project_row(first, second, length, unit, 4, SHORTEST, EPS, BLOCK)


class NormProjection:
    """`project_norms` of the given tensors in one launch, whatever their number and shapes.

    The kernel finds its rows through a table of int64 on the device: the address of a row, that of the row scaled with
    it or 0, the length of both, and whether the row becomes a unit vector. Each call compares the tensors' addresses
    with those in the table and writes a new one after a tensor's storage moved (``module.to(device)``); the tensors
    themselves stay those given here. Gradients are not tracked.
    """

    def __init__(self, weights: Sequence[Tensor], affine: Affine, gains: Sequence[Tensor]) -> None:
        if not AVAILABLE:
            raise ConfigurationError(
                "kernels=triton needs the package triton, which is not installed; install rlplastic[kernels] or use "
                "kernels=torch"
            )
        self._groups: list[tuple[Tensor, Tensor | None, bool]] = [
            *((weight, None, True) for weight in weights),
            *((gamma, beta, False) for gamma, beta in affine),
            *((gain, None, False) for gain in gains),
        ]
        self._tensors = [
            tensor for first, second, _ in self._groups for tensor in (first, second) if tensor is not None
        ]
        self._block = triton.next_power_of_2(max(tensor.shape[-1] for tensor in self._tensors))
        self._addresses: list[int] = []
        self._table = torch.empty(0, 4, dtype=torch.int64)

    def __call__(self) -> None:
        """Project in place.

        Raises:
            ConfigurationError: the tensors are where no kernel can reach them, or not contiguous float32.
        """
        addresses = [tensor.data_ptr() for tensor in self._tensors]
        if addresses != self._addresses:
            self._table, self._addresses = self._new_table(), addresses
        warps = min(max(self._block // 256, 1), 8)
        project_norms_kernel[(len(self._table),)](self._table, SHORTEST, EPS, self._block, num_warps=warps)

    def _new_table(self) -> Tensor:
        devices = {tensor.device for tensor in self._tensors}
        device = devices.pop()
        if devices or device.type != ("cpu" if interpreted() else "cuda"):
            raise ConfigurationError(
                f"kernels=triton needs all parameters on one CUDA device, not {device}; move them or use kernels=torch"
            )
        if not all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in self._tensors):
            raise ConfigurationError("kernels=triton needs contiguous float32 parameters; use kernels=torch for others")
        parts = []
        for first, second, unit in self._groups:
            length = first.shape[-1]
            entries = torch.empty(first.numel() // length, 4, dtype=torch.int64)
            offsets = torch.arange(len(entries)) * (length * first.element_size())
            entries[:, 0] = first.data_ptr() + offsets
            entries[:, 1] = 0 if second is None else second.data_ptr() + offsets
            entries[:, 2], entries[:, 3] = length, int(unit)
            parts.append(entries)
        return torch.cat(parts).to(device)
