"""8-bit observations: the error stays within half a cell, and growing cells is the same as having had wide ones."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplastic.envs.base import AutoresetMode, Step
from rlplastic.replay import ReplayRing, Sampler

DIM = 3


def ring_of(values: list[np.ndarray], capacity: int = 100) -> ReplayRing:
    """One environment that went through these observations (DIM,)."""
    ring = ReplayRing(capacity, 1, {"policy": DIM}, 1, AutoresetMode.NEXT_STEP, "int8")
    never = np.zeros(1, bool)
    ring.begin({"policy": values[0][None]})
    for value in values[1:]:
        step = Step({"policy": value[None]}, np.zeros(1, np.float32), never, never, {})
        ring.add(np.zeros((1, 1), np.float32), step, np.ones(1, bool))
    return ring


magnitudes = st.floats(-32768, 32768, width=32) | st.floats(-(2**-10), 2**-10, width=32)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*[magnitudes] * DIM), min_size=2, max_size=20))
def test_every_number_is_that_of_its_cell_in_exact_arithmetic(rows: list[tuple[float, ...]]) -> None:
    values = [np.array(row, np.float32) for row in rows]
    ring = ring_of(values)
    exponent = ring._quantiser.exponent
    for slot, value in enumerate(values):
        for d in range(DIM):
            # As if the cells had been this wide from the beginning, in fractions.
            distance = Fraction(float(value[d]) - float(values[0][d]))  # rounded once, to a float64
            expected = distance / Fraction(2) ** int(exponent[d]) // 1
            assert ring.tensors.observation[slot, d].item() == expected and -128 <= expected <= 127
    for d in range(DIM):  # no wider than needed
        farthest = max(abs(Fraction(float(v[d]) - float(values[0][d]))) for v in values)
        assert farthest == 0 or exponent[d] == -40 or farthest >= 64 * Fraction(2) ** int(exponent[d])


def test_a_batch_is_within_half_a_cell_of_what_was_observed() -> None:
    rng = np.random.default_rng(0)
    values = [(rng.standard_normal(DIM) * [0.01, 1.0, 300.0] + [1.4, 0.0, -50.0]).astype(np.float32) for _ in range(60)]
    ring = ring_of(values)
    batch = Sampler(ring, 50, 1, 0.99, seed=0).sample(0)
    cell = 2.0 ** ring._quantiser.exponent[:DIM]
    for row, now, later in zip(batch.rows.tolist(), batch.observation["policy"], batch.next_observation["policy"],
                               strict=True):  # fmt: skip
        assert (np.abs(now.numpy() - values[row]) <= cell / 2 * (1 + 1e-5)).all()
        assert (np.abs(later.numpy() - values[row + 1]) <= cell / 2 * (1 + 1e-5)).all()
    spread = np.ptp(np.stack(values), 0)
    assert (cell < spread / 50).all()


def test_a_constant_costs_nothing() -> None:
    values = [np.array([0.1, -7.0, 0.0], np.float32)] * 10
    batch = Sampler(ring_of(values), 8, 1, 0.99, seed=0).sample(0)
    np.testing.assert_allclose(batch.observation["policy"].numpy(), np.tile(values[0], (8, 1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernels", ["numpy", "torch"])
def test_a_step_of_any_size_from_any_value_can_be_stored(kernels: str) -> None:
    ring = ReplayRing(4, 1, {"policy": 2}, 1, AutoresetMode.NEXT_STEP, "int8", kernels=kernels)
    ring.begin({"policy": np.array([[1.0, 1e37]], np.float32)})
    never, always = np.zeros(1, bool), np.ones(1, bool)
    for value in ([1.0 + 2**-20, -1e37], [-1e30, 0.0]):
        step = Step({"policy": np.array([value], np.float32)}, np.zeros(1, np.float32), never, never, {})
        ring.add(np.zeros((1, 1), np.float32), step, always)
    batch = Sampler(ring, 2, 1, 0.9, seed=0, kernels=kernels).sample(0)
    assert batch.observation["policy"].isfinite().all() and batch.next_observation["policy"].isfinite().all()
