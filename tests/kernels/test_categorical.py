"""The categorical projection against the paper's double loop."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplastic.kernels.categorical import project_categorical


def projected_by_the_papers_loop(mass: np.ndarray, targets: np.ndarray, support: float) -> np.ndarray:
    """C51, arXiv 1707.06887, algorithm 1, one atom at a time; whole positions keep all their mass."""
    rows, atoms = mass.shape
    width = 2 * support / (atoms - 1)
    result = np.zeros_like(mass)
    for row in range(rows):
        for atom in range(atoms):
            b = (min(max(targets[row, atom], -support), support) + support) / width
            lower, upper = math.floor(b), math.ceil(b)
            if lower == upper:
                result[row, min(lower, atoms - 1)] += mass[row, atom]
            else:
                result[row, min(lower, atoms - 1)] += mass[row, atom] * (upper - b)
                result[row, min(upper, atoms - 1)] += mass[row, atom] * (b - lower)
    return result


@settings(deadline=None, max_examples=60)
@given(
    atoms=st.integers(2, 12),
    rows=st.integers(1, 4),
    support=st.floats(0.5, 20),
    shift=st.floats(-30, 30),
    discount=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_projection_is_the_papers_loop_and_keeps_all_mass(
    atoms: int, rows: int, support: float, shift: float, discount: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    mass = rng.dirichlet(np.full(atoms, 0.5), size=rows)
    targets = shift + discount * np.linspace(-support, support, atoms) + rng.normal(size=(rows, atoms))
    result = project_categorical(torch.from_numpy(mass), torch.from_numpy(targets), support).numpy()
    np.testing.assert_allclose(result, projected_by_the_papers_loop(mass, targets, support), atol=1e-9)
    np.testing.assert_allclose(result.sum(-1), 1.0, atol=1e-9)
    assert (result >= 0).all()
    mean = (mass * np.clip(targets, -support, support)).sum(-1)
    np.testing.assert_allclose((result * np.linspace(-support, support, atoms)).sum(-1), mean, atol=1e-8)


def test_mass_beyond_the_support_lands_on_its_ends() -> None:
    mass = torch.tensor([[0.25, 0.5, 0.25]])
    result = project_categorical(mass, torch.tensor([[-100.0, 7.0, 100.0]]), 5.0)
    torch.testing.assert_close(result, torch.tensor([[0.25, 0.0, 0.75]]))


def test_projection_onto_the_same_atoms_is_the_identity_in_float32() -> None:
    atoms = torch.linspace(-5, 5, 101)
    mass = torch.softmax(torch.randn(16, 101, generator=torch.Generator().manual_seed(0)), -1)
    torch.testing.assert_close(project_categorical(mass, atoms.expand(16, -1), 5.0), mass, rtol=0, atol=2e-6)


def test_a_nan_reaches_the_loss_instead_of_crashing() -> None:
    mass = torch.full((2, 5), 0.2)
    targets = torch.zeros(2, 5)
    targets[0, 3] = torch.nan
    result = project_categorical(mass, targets, 5.0)
    assert result[0].isnan().any()
    torch.testing.assert_close(result[1], torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0]))
