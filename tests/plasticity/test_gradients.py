"""Gradient size and reliability against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity import gradients


def test_gradient_norm_is_that_of_the_mean_gradient() -> None:
    assert gradients.gradient_norm(torch.tensor([[3.0, 0.0], [3.0, 8.0]])) == pytest.approx(5)
    assert gradients.gradient_norm(torch.tensor([6.0, 8.0])) == pytest.approx(10)


def test_micro_batch_gradients_are_those_of_each_batch_and_leave_no_grad() -> None:
    weight, idle = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.ones(3))
    batches = [torch.tensor([float(k), -1.0]) for k in range(8)]
    found = gradients.micro_batch_gradients(lambda x: (weight * x).sum(), batches, [weight, idle])
    assert torch.equal(found, torch.cat((torch.stack(batches), torch.zeros(8, 3)), 1).double())
    assert weight.grad is None


def test_signal_to_noise_is_mean_squared_over_trace_of_the_covariance() -> None:
    signs = torch.tensor([1.0, -1.0] * 4)
    g = torch.stack((5 + 2 * signs, torch.ones(8)), 1)
    variance = 4 * 8 / 7  # unbiased
    assert gradients.gradient_signal_to_noise(g) == pytest.approx((26 - variance / 8) / variance)


def test_pure_noise_has_no_signal_on_average() -> None:
    rng = torch.Generator().manual_seed(0)
    found = torch.stack([gradients.gradient_signal_to_noise(torch.randn(8, 50, generator=rng)) for _ in range(400)])
    error = float(found.std()) / 20
    assert abs(float(found.mean())) < 4 * error < 0.01  # uncorrected it would be 1/8


def test_signal_to_noise_of_known_parts_is_met_on_average() -> None:
    rng = torch.Generator().manual_seed(1)
    found = [gradients.gradient_signal_to_noise(3 + 2 * torch.randn(64, 400, generator=rng)) for _ in range(20)]
    assert float(torch.stack(found).mean()) == pytest.approx(9 / 4, rel=0.02)


def test_limits_of_signal_to_noise() -> None:
    assert gradients.gradient_signal_to_noise(torch.zeros(8, 3)) == 0
    assert gradients.gradient_signal_to_noise(torch.ones(8, 3)) == math.inf
    bad = torch.ones(8, 3)
    bad[0, 0] = math.nan
    assert gradients.gradient_signal_to_noise(bad).isnan()


def test_seven_micro_batches_are_too_few() -> None:
    with pytest.raises(ConfigurationError, match="K >= 8"):
        gradients.gradient_signal_to_noise(torch.ones(7, 3))
