"""Churn, lag, bias, entropy and geometry against closed forms and scipy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr
from torch import nn

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity import representation as rep


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_churn_of_a_known_step_of_a_linear_model() -> None:
    model, x = nn.Linear(3, 1), normal(10, 3)
    with torch.no_grad():
        before = model(x)
        model.bias += 0.25
        after = model(x)
        assert rep.churn(before, after) == pytest.approx(0.25, rel=1e-5)
        model.weight += torch.tensor([[1.0, 0.0, 0.0]])
        assert rep.churn(after, model(x)) == pytest.approx(float(x[:, 0].abs().mean()), rel=1e-5)


def test_relative_churn_does_not_depend_on_the_scale_of_outputs() -> None:
    before, moved = normal(3, 50, 2), normal(3, 50, 2, seed=2)
    spread = torch.stack([torch.trace(torch.cov(member.double().T, correction=0)) for member in before]).sqrt()
    expected = rep.churn(before, moved) / spread
    for scale in (1.0, 1000.0):
        torch.testing.assert_close(
            rep.relative_churn(scale * before + 3, scale * moved + 3), expected, rtol=1e-4, atol=0
        )
    assert not rep.relative_churn(torch.ones(5, 1), torch.zeros(5, 1)).isfinite()


def test_churn_of_a_policy_is_the_length_of_the_change() -> None:
    before = torch.zeros(2, 4, 2)
    after = before + torch.tensor([3.0, 4.0])
    after[1] = 0
    assert rep.churn(before, after).tolist() == [5, 0]
    after[1, 0, 0] = math.nan
    assert rep.churn(before, after)[1].isnan()
    with pytest.raises(ConfigurationError, match="same states"):
        rep.churn(before, after[0])


def test_lag_is_measured_in_standard_deviations_of_the_batch() -> None:
    inputs = torch.tensor([[1.0, 5.0], [5.0, 5.0]])  # means 3 and 5, deviations 2 and 0
    lag = rep.batch_norm_lag(torch.tensor([[7.0, 5.0], [3.0, 5.0]]), inputs, eps=0.0001)
    assert lag.tolist() == pytest.approx([1, 0], rel=1e-4)
    assert rep.batch_norm_lag(torch.tensor([3.0, 6.0]), inputs, eps=0.0001) == pytest.approx(50)


def test_running_mean_of_the_same_batch_does_not_lag() -> None:
    norm, x = nn.BatchNorm1d(4, momentum=1.0), normal(30, 4)
    norm(x)
    assert rep.batch_norm_lag(norm.running_mean, x) == pytest.approx(0, abs=1e-6)


def test_value_bias_is_relative_to_the_size_of_returns() -> None:
    returns = torch.tensor([-10.0, 30.0])
    assert rep.value_bias(returns + 4, returns) == pytest.approx(0.2)
    assert rep.value_bias(torch.stack((returns, returns - 4)), returns).tolist() == pytest.approx([0, -0.2])
    assert rep.value_bias(torch.zeros(2), torch.zeros(2)).isnan()


def test_entropy_of_logits_runs_from_certain_to_uniform() -> None:
    assert rep.logit_entropy(torch.zeros(3, 5, 7)).tolist() == pytest.approx([math.log(7)] * 3)
    certain = torch.full((2, 4), -math.inf)
    certain[:, 1] = 0
    assert rep.logit_entropy(certain) == 0
    halves = torch.tensor([[0.0, 0.0, -math.inf], [5.0, -math.inf, -math.inf]])
    assert rep.logit_entropy(halves) == pytest.approx(math.log(2) / 2)
    assert rep.logit_entropy(torch.tensor([[math.nan, 0.0]])).isnan()


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=3, max_size=20))
def test_rank_correlation_is_scipys_with_ties(values: list[tuple[int, int]]) -> None:
    a, b = torch.tensor(values, dtype=torch.float64).T
    found = rep.rank_correlation(a, b)
    if a.unique().numel() == 1 or b.unique().numel() == 1:
        assert found.isnan()
    else:
        assert found == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_drift_is_one_minus_the_rank_correlation_of_distances() -> None:
    a, b = normal(12, 5), normal(12, 3, seed=2)
    expected = 1 - spearmanr(pdist(a.numpy()), pdist(b.numpy())).statistic
    assert rep.representation_drift(a, b) == pytest.approx(expected, abs=1e-9)


def test_rotation_and_scale_are_no_drift_and_members_are_apart() -> None:
    h = normal(2, 20, 6).double()
    turn = torch.linalg.qr(normal(6, 6, seed=5).double())[0]
    after = torch.stack((3 * h[0] @ turn, normal(20, 6, seed=9).double()))
    drift = rep.representation_drift(h, after)
    assert drift[0] == pytest.approx(0, abs=1e-9)
    assert 0.5 < drift[1] < 1.5
    with pytest.raises(ConfigurationError, match="same states"):
        rep.representation_drift(h, after[:, :3])


def test_geometry_spread_over_many_units_is_stable_and_noise_is_not() -> None:
    latent = normal(40, 2)
    spread = latent @ normal(2, 64, seed=3)
    assert rep.geometric_stability(spread) > 0.9
    assert abs(float(rep.geometric_stability(normal(40, 4, seed=4), splits=32))) < 0.2
    doubled = normal(10, 1).expand(10, 2)  # each half is one copy
    assert rep.geometric_stability(doubled) == pytest.approx(1)


@pytest.mark.parametrize("shape", [(5, 1), (1, 5), (2, 5)])
def test_without_halves_or_distances_there_is_no_stability(shape: tuple[int, int]) -> None:
    assert rep.geometric_stability(torch.ones(shape)).isnan()


def test_constant_and_broken_features_have_no_geometry() -> None:
    h = normal(3, 8, 4)
    h[0], h[1, 0, 0] = 2.0, math.nan
    for found in (rep.geometric_stability(h), rep.representation_drift(h, h)):
        assert found.isnan().tolist() == [True, True, False]
