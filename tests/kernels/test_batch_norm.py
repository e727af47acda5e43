"""Batch normalisation with ReLU: torch's operator and the step written for compilers, against loops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from rlplastic.kernels.batch_norm import Written, affine, normalise

EPS = 1e-5
Normalise = Callable[..., tuple[Tensor, Tensor, Tensor]]
BOTH = pytest.mark.parametrize("function", [normalise, Written.apply], ids=["eager", "compiled"])


def leaves(members: int = 2, shared: bool = False, rows: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs (members, 3, rows) or (3, rows), gamma and beta (members, 3), in float64."""
    rng = torch.Generator().manual_seed(0)
    shape = (3, rows) if shared else (members, 3, rows)
    x = 3 * torch.randn(shape, generator=rng, dtype=torch.float64) + 2
    gamma, beta = (torch.randn(members, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    return x.requires_grad_(), gamma.requires_grad_(), beta.requires_grad_()


@BOTH
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_values_and_moments_are_those_of_loops(function: Normalise, relu: bool, shared: bool) -> None:
    x, gamma, beta = (leaf.detach() for leaf in leaves(shared=shared))
    y, mean, variance = function(x, gamma, beta, EPS, relu, torch.float64)
    assert y.shape == (2, 3, 16)
    for member in range(2):
        for feature in range(3):
            row = (x if shared else x[member])[feature].tolist()
            middle = math.fsum(row) / len(row)
            spread = math.fsum((value - middle) ** 2 for value in row) / len(row)
            wanted = [
                float(gamma[member, feature]) * (value - middle) / math.sqrt(spread + EPS)
                + float(beta[member, feature])
                for value in row
            ]
            np.testing.assert_allclose(
                y[member, feature].tolist(), np.maximum(wanted, 0) if relu else wanted, rtol=1e-10
            )
            found = mean.expand(2, 3)[member, feature], variance.expand(2, 3)[member, feature]
            np.testing.assert_allclose([float(each) for each in found], [middle, spread], rtol=1e-9)


@BOTH
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gradients_are_those_of_differences(function: Normalise, relu: bool, shared: bool) -> None:
    inputs = leaves(shared=shared)
    assert not any(moment.requires_grad for moment in function(*inputs, EPS, relu, torch.float64)[1:])
    assert torch.autograd.gradcheck(lambda *given: function(*given, EPS, relu, torch.float64)[0], inputs)


def test_second_derivatives_are_those_of_differences() -> None:
    assert torch.autograd.gradgradcheck(lambda *given: normalise(*given, EPS, True, torch.float64)[0], leaves(rows=5))
    x, scale, shift = leaves(rows=5)
    assert torch.autograd.gradgradcheck(lambda *given: affine(*given, True, torch.float64), (x, scale, shift))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_round_alike(dtype: torch.dtype) -> None:
    x, gamma, beta = (leaf.detach().float() for leaf in leaves(rows=64))
    x = x.to(dtype).requires_grad_()
    weight = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for function in (normalise, Written.apply):
        y, mean, variance = function(x, gamma, beta, EPS, True, dtype)  # type: ignore[no-untyped-call]
        assert y.dtype == dtype and mean.dtype == variance.dtype == torch.float32
        results.append((y, mean, variance, *torch.autograd.grad(y, x, weight)))
    for plain, written in zip(*results, strict=True):
        torch.testing.assert_close(plain, written)


@BOTH
def test_a_constant_feature_has_no_variance_and_no_gradient(function: Normalise) -> None:
    x = torch.full((1, 8), 0.3, requires_grad=True)
    gamma, beta = torch.ones(1), torch.zeros(1)
    y, mean, variance = function(x, gamma, beta, EPS, False, torch.float32)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert mean.item() == pytest.approx(0.3) and 0 <= variance.item() < 1e-9
    assert y.abs().max() < 1e-3 and gradient.abs().max() < 1e-2
