"""The written gradient of batch normalisation says that it has no derivative of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlplastic.errors import ConfigurationError
from rlplastic.kernels.batch_norm import affine, normalise


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    x, gamma, beta = torch.randn(3, 16, generator=rng), 1 + torch.rand(3, generator=rng), torch.randn(3, generator=rng)
    return x.requires_grad_(), gamma.requires_grad_(), beta.requires_grad_()


@pytest.mark.parametrize("target", [0, 1])  # on the shift they do not depend
def test_a_second_derivative_with_batch_statistics_is_refused_and_first_ones_stay(target: int) -> None:
    inputs = leaves()

    def gradients(**options: bool) -> tuple[Tensor, ...]:
        result = normalise(*inputs, 1e-5, True, torch.float32)[0]
        return torch.autograd.grad((result * torch.arange(16.0)).sum(), inputs, **options)

    plain, attached = gradients(), gradients(create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, attached, strict=True))
    for gradient in attached:
        with pytest.raises(ConfigurationError, match="no second derivative"):
            torch.autograd.grad(gradient.square().sum(), inputs[target], retain_graph=True, allow_unused=True)


def test_with_statistics_that_do_not_depend_on_the_batch_second_derivatives_are_right() -> None:
    x, scale, shift = (leaf.double().detach().requires_grad_() for leaf in leaves())
    assert torch.autograd.gradgradcheck(lambda *inputs: affine(*inputs, True, torch.float64), (x, scale, shift))
