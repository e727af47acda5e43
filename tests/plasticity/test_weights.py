"""Norms, distances and angles of planted weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity import weights


def test_weight_norm_is_that_of_all_weights_together() -> None:
    assert weights.weight_norm([torch.tensor([[3.0]]), torch.tensor([4.0, 12.0])]) == pytest.approx(13)


def test_members_have_their_own_norms() -> None:
    found = weights.weight_norm([torch.tensor([[[3.0]], [[0.0]]]), torch.tensor([[4.0], [2.0]])], members=2)
    assert found.tolist() == pytest.approx([5, 2])


def test_distance_from_init_is_the_step_that_was_taken() -> None:
    module = nn.Linear(3, 2)
    start = weights.snapshot(module)
    with torch.no_grad():
        module.weight += 2.0
        module.bias -= 1.0
    found = weights.distance(list(module.parameters()), list(start.values()))
    assert found == pytest.approx(math.sqrt(6 * 4 + 2), rel=1e-6)


@pytest.mark.parametrize("angle", [0.0, 1e-10, 0.3, 2.0, math.pi])
def test_row_angles_are_exact_from_tiny_to_opposite(angle: float) -> None:
    before = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    found = weights.row_angles(7 * before @ turn.T, before)
    assert found.tolist() == pytest.approx([angle, angle], rel=1e-6, abs=1e-15)


def test_angular_speed_is_the_mean_angle_per_update_and_skips_rows_of_zeros() -> None:
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    after = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    assert weights.angular_speed(after, before, 10) == pytest.approx((math.pi / 2 + math.pi / 4) / 2 / 10)
    stacked = weights.angular_speed(torch.stack((after, before)), torch.stack((before, before)), 10)
    assert stacked.tolist() == pytest.approx([3 * math.pi / 80, 0])


def test_a_nan_weight_is_not_hidden() -> None:
    bad = torch.tensor([[math.nan, 1.0]])
    assert weights.weight_norm([bad]).isnan()
    assert weights.row_angles(bad, torch.ones(1, 2)).isnan().all()
    two = torch.tensor([[math.nan, 1.0], [1.0, 1.0]])
    assert weights.angular_speed(two, torch.ones(2, 2), 1).isnan()


def test_wrong_requests_say_what_to_do() -> None:
    with pytest.raises(ConfigurationError, match="members"):
        weights.weight_norm([torch.ones(3, 2)], members=2)
    with pytest.raises(ConfigurationError, match="no weights"):
        weights.weight_norm([])
    with pytest.raises(ConfigurationError, match="same module"):
        weights.distance([torch.ones(2)], [torch.ones(3)])
    with pytest.raises(ConfigurationError, match="at least 1"):
        weights.angular_speed(torch.ones(1, 2), torch.ones(1, 2), 0)
