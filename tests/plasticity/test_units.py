"""Unit metrics against planted activations and plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity import units

RECTIFIER_METRICS = [
    units.active_fraction,
    units.dormant_ratio,
    units.gradient_dormant_ratio,
    units.dead_fraction,
    units.linearised_fraction,
    units.duplicate_fraction,
]
METRICS = [*RECTIFIER_METRICS, units.unsaturated_fraction]


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_active_fraction_counts_positive_entries() -> None:
    h = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]])
    assert units.active_fraction(h) == pytest.approx(3 / 6)


def test_saturated_tanh_units_are_not_active() -> None:
    h = torch.tanh(torch.tensor([[0.0, 1.0, 4.0, -4.0]]))
    assert units.unsaturated_fraction(h) == pytest.approx(0.5)
    assert units.unsaturated_fraction(h, 0.7) == pytest.approx(0.25)


@pytest.mark.parametrize("tau", [0.025, 0.1])
def test_planted_dormant_units_are_all_found_and_no_other(tau: float) -> None:
    scores = torch.tensor([0.9 * tau, tau * 1.1, 1.0, 1.5, 0.0])
    scores[3] = 5 - scores.sum() + scores[3]  # the mean is 1, so a unit's size is its score
    signs = torch.tensor([[1.0], [-1.0]])
    for scale in (1.0, 1e-30, 1e30):
        torch.testing.assert_close(units.unit_scores(signs * scores * scale), scores.double(), rtol=1e-6, atol=1e-9)
        assert units.dormant_ratio(signs * scores * scale, tau) == pytest.approx(2 / 5)


def test_score_is_relative_to_the_mean_of_the_layer_not_its_sum() -> None:
    h = torch.ones(4, 100)
    h[:, 0] = 0.03  # three percent of the mean, but every unit is one percent of the sum
    assert units.dormant_ratio(h) == 0
    h[:, 0] = 0.02
    assert units.dormant_ratio(h) == pytest.approx(0.01)


def test_gradient_dormancy_has_its_own_threshold() -> None:
    g = torch.ones(3, 10)
    g[:, 0], g[:, 1] = 0.005, 0.02
    assert units.gradient_dormant_ratio(g) == pytest.approx(0.1)
    assert units.dormant_ratio(g) == pytest.approx(0.2)


def test_dead_and_linearised_units_are_told_apart() -> None:
    h = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 2.0, 0.0, 5.0]])
    assert units.dead_fraction(h) == pytest.approx(0.25)
    assert units.linearised_fraction(h) == pytest.approx(0.25)


def test_duplicates_are_found_by_direction_whatever_their_size() -> None:
    h = torch.eye(6)[:, :5]
    h[:, 1] = 1e-25 * h[:, 0]  # squares underflow in single precision
    assert units.duplicate_fraction(h) == pytest.approx(2 / 5)
    angle = torch.tensor(math.acos(0.95))
    for change, found in ((-1e-3, 2 / 2), (1e-3, 0.0)):
        pair = torch.stack(
            (torch.tensor([1.0, 0.0]), torch.stack((torch.cos(angle + change), torch.sin(angle + change))))
        )
        assert units.duplicate_fraction(pair.mT) == pytest.approx(found)


def test_opposite_units_are_no_duplicates_and_neither_are_silent_ones() -> None:
    assert units.duplicate_fraction(torch.tensor([[1.0, -1.0, 0.0, 0.0], [2.0, -2.0, 0.0, 0.0]])) == 0


def test_layers_count_by_their_units() -> None:
    found = units.weighted_by_units([torch.tensor(0.5), torch.tensor(0.0)], [10, 30])
    assert found == pytest.approx(0.125)


@pytest.mark.parametrize("metric", METRICS)
def test_members_are_measured_one_by_one(metric) -> None:
    h = normal(3, 20, 7).relu()
    expected = torch.stack([metric(member) for member in h])
    assert torch.equal(metric(h), expected)
    assert metric(h).shape == (3,)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_member_that_is_not_finite_gives_nan_and_spares_the_others(metric, bad: float) -> None:
    h = normal(2, 20, 7).relu()
    expected = metric(h)
    h[0, 3, 2] = bad
    assert metric(h)[0].isnan()
    assert metric(h)[1] == expected[1]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(3,), (0, 4), (4, 0)])
def test_what_is_no_table_of_rows_and_units_is_refused(metric, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError, match="rows, units"):
        metric(torch.zeros(shape))


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), width=st.integers(1, 6), seed=st.integers(0, 99), zero=st.booleans())
def test_metrics_equal_plain_loops_on_any_shape(rows: int, width: int, seed: int, zero: bool) -> None:
    h = normal(rows, width, seed=seed).relu() * (0.0 if zero else 1.0)
    table = h.double().tolist()
    columns = [[row[unit] for row in table] for unit in range(width)]
    sizes = [sum(map(abs, column)) / rows for column in columns]
    mean = sum(sizes) / width
    assert units.active_fraction(h) == pytest.approx(sum(v > 0 for row in table for v in row) / rows / width)
    expected = sum(mean == 0 or size / mean <= 0.025 for size in sizes) / width
    assert units.dormant_ratio(h) == pytest.approx(expected)
    assert units.dead_fraction(h) == pytest.approx(sum(max(column) <= 0 for column in columns) / width)
    assert units.linearised_fraction(h) == pytest.approx(sum(min(column) > 0 for column in columns) / width)

    def cosine(a: list[float], b: list[float]) -> float:
        norms = math.hypot(*a) * math.hypot(*b)
        return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0

    twins = sum(any(i != j and cosine(columns[i], columns[j]) > 0.95 for j in range(width)) for i in range(width))
    assert units.duplicate_fraction(h) == pytest.approx(twins / width)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 5), width=st.integers(1, 5), value=st.sampled_from([1e-30, 0.5, 1e30]))
def test_constant_activations_are_linear_and_equal_and_not_dormant(rows: int, width: int, value: float) -> None:
    h = torch.full((rows, width), value)
    assert units.active_fraction(h) == units.linearised_fraction(h) == 1
    assert units.dormant_ratio(h) == units.dead_fraction(h) == 0
    assert units.duplicate_fraction(h) == (width > 1)
