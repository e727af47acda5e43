"""Curvature of quadratics and tangent kernels of linear models are known exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlplastic.agents.flashsac.networks import Critic
from rlplastic.agents.heads import Categorical
from rlplastic.errors import ConfigurationError
from rlplastic.plasticity import curvature, ranks
from rlplastic.plasticity.gradients import flat_gradient


def quadratic(eigenvalues: list[float], rotated: bool) -> tuple[Tensor, list[nn.Parameter]]:
    """A loss in two parameter tensors with this Hessian spectrum, at a point that is no minimum."""
    size = len(eigenvalues)
    rng = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64))[0]
    if not rotated:
        turn = torch.eye(size, dtype=torch.float64)
    hessian = turn @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ turn.T
    parameters = [nn.Parameter(torch.ones(2, dtype=torch.float64)), nn.Parameter(torch.ones(1, size - 2).double())]
    theta = torch.cat([p.reshape(-1) for p in parameters])
    return theta @ hessian @ theta / 2 + theta.sum(), parameters


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    ("eigenvalues", "largest"),
    [([1.0, 2.0, 3.0, 7.0], 7.0), ([-9.0, 2.0, 0.5, 4.0], 4.0), ([-1.0, -2.0, -9.0, -4.0], -1.0), ([0.0] * 4, 0.0)],
)
def test_sharpness_of_a_quadratic_is_its_largest_eigenvalue(
    eigenvalues: list[float], largest: float, rotated: bool
) -> None:
    loss, parameters = quadratic(eigenvalues, rotated)
    assert curvature.sharpness(loss, parameters, iterations=200, tolerance=1e-9) == pytest.approx(largest, abs=1e-5)


def test_trace_of_a_diagonal_hessian_is_exact() -> None:
    loss, parameters = quadratic([1.0, -2.0, 3.0, 7.0], rotated=False)
    trace, error = curvature.hessian_trace(loss, parameters, samples=2)
    assert trace == pytest.approx(9, rel=1e-12)
    assert error == pytest.approx(0, abs=1e-12)


def test_trace_lies_within_its_stated_error() -> None:
    loss, parameters = quadratic([1.0, -2.0, 3.0, 7.0, 20.0], rotated=True)
    trace, error = curvature.hessian_trace(loss, parameters, samples=400)
    assert 0 < error < 1.5
    assert abs(trace - 29) < 4 * error


def test_linear_losses_have_no_curvature_and_foreign_ones_are_refused() -> None:
    weight = nn.Parameter(torch.ones(3))
    assert curvature.sharpness(weight.sum(), [weight]) == 0
    assert curvature.hessian_trace(weight.sum(), [weight])[0] == 0
    for loss in (torch.ones((), requires_grad=True) * 2, torch.ones(())):
        with pytest.raises(ConfigurationError, match="none of the parameters"):
            curvature.sharpness(loss, [weight])
    with pytest.raises(ConfigurationError, match="samples"):
        curvature.hessian_trace(weight.sum(), [weight], samples=1)


def test_curvature_of_a_loss_with_nan_is_nan() -> None:
    weight = nn.Parameter(torch.tensor([1.0, math.nan]))
    assert math.isnan(curvature.sharpness(weight.pow(3).sum(), [weight]))
    assert math.isnan(curvature.hessian_trace(weight.pow(3).sum(), [weight])[0])


def test_kernel_of_a_linear_model_is_the_gram_matrix_of_its_inputs() -> None:
    model = nn.Linear(5, 1)
    inputs = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    jacobian = curvature.output_gradients(lambda x: model(x), list(inputs), list(model.parameters()))
    torch.testing.assert_close(curvature.ntk(jacobian), (inputs @ inputs.T + 1).double(), rtol=1e-5, atol=1e-5)
    alike = curvature.output_gradients(lambda x: model(x), list(torch.ones(7, 5)), list(model.parameters()))
    assert ranks.effective_rank(curvature.ntk(alike)) == pytest.approx(1, abs=1e-6)


def test_kernel_rank_of_orthogonal_inputs_is_their_number() -> None:
    model = nn.Linear(6, 1, bias=False)
    jacobian = curvature.output_gradients(lambda x: model(x), list(3 * torch.eye(6)[:4]), list(model.parameters()))
    assert ranks.effective_rank(curvature.ntk(jacobian)) == pytest.approx(4, rel=1e-9)


def test_samples_with_two_outputs_are_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match="one number"):
        curvature.output_gradients(lambda x: model(x), [torch.ones(2)], list(model.parameters()))


def bounded_loss(batch_statistics: bool) -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    critic = Critic(3, 2, 4, 1, Categorical(5, 1.0), 2).double()
    observation, action = torch.randn(16, 3, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)
    critic(observation, action, True)
    return critic, lambda: critic(observation, action, batch_statistics).log_softmax(-1)[..., 0].square().mean()


def hessian_error(batch_statistics: bool) -> float:
    """Relative distance of H v from the difference of gradients at theta +- h v."""
    critic, loss = bounded_loss(batch_statistics)
    parameters = list(critic.parameters())
    hessian = curvature.Hessian(loss(), parameters)
    direction = torch.randn(hessian.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = hessian.times(direction)
    sides, step = [], 1e-6
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, part in zip(parameters, direction.split([p.numel() for p in parameters]), strict=True):
                parameter += sign * step * part.reshape(parameter.shape)
        sides.append(flat_gradient(loss(), parameters))
    difference = (sides[0] - sides[1]) / (2 * step)
    return float((exact - difference).norm() / difference.norm())


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_hessian_of_a_bounded_network_equals_differences(batch_statistics: bool) -> None:
    assert hessian_error(batch_statistics) < 1e-4


class Lopsided(torch.autograd.Function):
    """a * b, whose written gradient is right and forgets that it depends on b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return gradient * b.detach(), gradient * a


def test_a_gradient_whose_derivative_is_wrong_is_refused_instead_of_measured_wrongly() -> None:
    a, b = (torch.linspace(1, 2, 5).requires_grad_() for _ in range(2))
    for measured in (curvature.sharpness, curvature.hessian_trace):
        with pytest.raises(ConfigurationError, match="not symmetric"):
            measured(Lopsided.apply(a, b).sum(), [a, b])
