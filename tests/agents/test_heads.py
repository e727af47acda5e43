"""Heads and closed forms against torch.distributions, quadrature, and the projection as its paper writes it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from rlplastic.agents.heads import Categorical, GaussianHead, UnitHead, squashed_sample


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_log_probabilities_are_those_of_the_transformed_distribution() -> None:
    mean, log_std, noise = 3 * normal(200, 4), normal(200, 4, seed=1) - 1, normal(200, 4, seed=2)
    action, log_prob = squashed_sample(mean, log_std, noise)
    squash = TanhTransform(cache_size=1)
    squashed = squash(mean + log_std.exp() * noise)
    expected = TransformedDistribution(Normal(mean, log_std.exp()), squash).log_prob(squashed).sum(-1)
    torch.testing.assert_close(action, squashed)
    torch.testing.assert_close(log_prob, expected, rtol=1e-12, atol=1e-12)


def test_density_of_an_action_integrates_to_one() -> None:
    mean, log_std = torch.tensor([[0.4]]).double(), torch.tensor([[-0.5]]).double()
    unsquashed = torch.linspace(-12, 12, 200_001).double().unsqueeze(-1)
    noise = (unsquashed - mean) / log_std.exp()
    action, log_prob = squashed_sample(mean, log_std, noise)
    assert float(torch.trapezoid(log_prob.exp(), action[:, 0])) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extreme", [-60.0, -20.0, 20.0, 60.0])
def test_log_probability_of_an_extreme_action_follows_its_asymptote(dtype: torch.dtype, extreme: float) -> None:
    # tanh saturates: log(1 - tanh(u)^2) = log 4 - 2 |u| up to e^-2|u|
    zero = torch.zeros(1, 1, dtype=dtype)
    action, log_prob = squashed_sample(zero + extreme, zero, zero)
    expected = -0.5 * math.log(2 * math.pi) - (math.log(4) - 2 * abs(extreme))
    assert float(log_prob) == pytest.approx(expected, rel=1e-6)
    assert abs(float(action)) <= 1


def test_gradient_reaches_mean_and_deviation() -> None:
    mean, log_std = normal(3, 2).requires_grad_(), normal(3, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda m, s: squashed_sample(m, s, normal(3, 2, seed=2)), (mean, log_std))


def test_log_std_stays_in_its_range_and_is_minus_four_in_the_middle() -> None:
    head = GaussianHead(8, 2)
    features = 5 * torch.randn(8, 50, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for bias, expected in [(-1e4, -10.0), (1e4, 2.0)]:
            head.spread_bias.fill_(bias)
            assert torch.allclose(head(features)[1], torch.tensor(expected))
        head.spread_bias.zero_()
        _, log_std = head(features)
        assert log_std.min() >= -10 and log_std.max() <= 2
        assert torch.equal(head(torch.zeros(8, 1))[1], torch.full((1, 2), -4.0))


def test_gaussian_head_is_two_linear_maps_with_free_biases() -> None:
    head = GaussianHead(8, 2)
    with torch.no_grad():
        head.mean_bias.copy_(torch.tensor([0.5, -2.0]))
        head.spread_bias.copy_(torch.tensor([0.1, 0.3]))
    z = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    mean, log_std = (value.detach().numpy() for value in head(torch.from_numpy(z.T)))
    weights = {name: value.detach().numpy() for name, value in head.named_parameters()}
    np.testing.assert_allclose(mean, z @ weights["mean.weight"].T + weights["mean_bias"], rtol=1e-5, atol=1e-6)
    spread = np.tanh(z @ weights["spread.weight"].T + weights["spread_bias"])
    np.testing.assert_allclose(log_std, -10 + 6 * (1 + spread), rtol=1e-5, atol=1e-5)


def test_expected_value_is_the_sum_over_atoms_and_atoms_are_no_state() -> None:
    categorical, head = Categorical(7, 3.0), UnitHead(8, 7, members=2)
    assert set(categorical.state_dict()) == set() and set(head.state_dict()) == {"linear.weight", "bias"}
    np.testing.assert_allclose(categorical.atoms, np.linspace(-3, 3, 7), atol=1e-6)
    assert torch.equal(head.bias, torch.zeros(2, 7))
    logits = normal(2, 5, 7).float()
    values = categorical.expected(logits)
    for member in range(2):
        for row in range(5):
            weights = [math.exp(float(logit)) for logit in logits[member, row]]
            expected = sum(w * a for w, a in zip(weights, np.linspace(-3, 3, 7), strict=True)) / sum(weights)
            assert float(values[member, row]) == pytest.approx(expected, abs=1e-5)
