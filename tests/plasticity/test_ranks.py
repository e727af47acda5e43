"""Ranks against spectra that were planted, and the three told apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplastic.plasticity import ranks

METRICS = [ranks.effective_rank, ranks.srank, ranks.stable_rank]


def planted(spectrum: list[float], rows: int, units: int, seed: int = 0) -> torch.Tensor:
    """A (rows, units) matrix with these singular values."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, len(spectrum))))[0]
    right = np.linalg.qr(rng.standard_normal((units, len(spectrum))))[0]
    return torch.from_numpy(left * np.array(spectrum) @ right.T)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_equal_singular_values_give_their_number_by_all_three(rank: int) -> None:
    h = planted([2.0] * rank, 20, 8)
    assert ranks.effective_rank(h) == pytest.approx(rank, rel=1e-9)
    assert ranks.stable_rank(h) == pytest.approx(rank, rel=1e-9)
    assert ranks.srank(h) == rank


def test_unequal_singular_values_give_the_closed_forms() -> None:
    h = planted([4.0, 2.0, 1.0, 1.0], 30, 6)
    p = [0.5, 0.25, 0.125, 0.125]
    assert ranks.effective_rank(h) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-9)
    assert ranks.stable_rank(h) == pytest.approx(22 / 16, rel=1e-9)
    assert [int(ranks.srank(h, delta)) for delta in (0.01, 0.13, 0.3, 0.6)] == [4, 3, 2, 1]


def test_srank_wants_99_percent_of_the_mass() -> None:
    assert ranks.srank(planted([98.9, 0.9, 0.2], 10, 5)) == 2  # 99.8 %
    assert ranks.srank(planted([98.9, 0.09, 1.01], 10, 5)) == 2  # 99.91 %
    assert ranks.srank(planted([99.2, 0.5, 0.3], 10, 5)) == 1  # 99.2 %
    assert ranks.srank(planted([60.0, 39.2, 0.8], 10, 5)) == 2  # 99.2 % of the mass, 99.99 % of the energy
    assert ranks.srank(planted([60.0, 38.8, 1.2], 10, 5)) == 3  # 98.8 %


@pytest.mark.parametrize("metric", METRICS)
def test_scale_and_rotation_do_not_change_a_rank(metric) -> None:
    h = planted([5.0, 3.0, 2.0, 1.0], 12, 4)
    turn = torch.from_numpy(np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))[0])
    for other in (1e-200 * h, 1e200 * h, h @ turn):
        assert metric(other) == pytest.approx(float(metric(h)), rel=1e-9)


@pytest.mark.parametrize("metric", METRICS)
def test_zero_features_have_rank_zero_and_nan_stays_nan(metric) -> None:
    h = torch.stack((torch.zeros(6, 3), torch.randn(6, 3), torch.randn(6, 3)))
    h[2, 0, 0] = math.nan
    found = metric(h)
    assert found[0] == 0
    assert found[1] == metric(h[1])
    assert found[2].isnan()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 8), units=st.integers(1, 8), seed=st.integers(0, 99))
def test_ranks_lie_between_one_and_the_smaller_dimension(rows: int, units: int, seed: int) -> None:
    h = torch.randn(rows, units, generator=torch.Generator().manual_seed(seed))
    for metric in METRICS:
        assert 1 - 1e-9 <= float(metric(h)) <= min(rows, units) + 1e-9
        assert metric(torch.full((rows, units), 3.0)) == pytest.approx(1, abs=1e-6)
