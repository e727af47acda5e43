"""The categorical projection and target, in torch and as a kernel, against the paper's double loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlplastic.kernels.categorical import categorical_target, categorical_target_triton, project_categorical

Rows = dict[str, torch.Tensor]


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


def target_row_by_row(rows: Rows, support: float) -> tuple[np.ndarray, np.ndarray]:
    """In float64: softmax, the member that expects less, its moved atoms, and their projection, for each row."""
    arrays = {name: value.double().numpy() for name, value in rows.items()}
    logits = arrays.pop("logits")
    atoms = np.linspace(-support, support, logits.shape[-1])
    targets, means = [], []
    for row, (reward, discount, bonus) in enumerate(zip(*arrays.values(), strict=True)):
        members = [np.exp(member[row] - member[row].max()) for member in logits]
        members = [mass / mass.sum() for mass in members]
        mass = min(members, key=lambda mass: float((mass * atoms).sum()))
        moved = reward + discount * (atoms + bonus)
        targets.append(projected_by_the_papers_loop(mass[None], moved[None], support)[0])
        means.append((mass * moved).sum())
    return np.array(targets), np.array(means)


DISCOUNTS = (0.0, 1e-6, 0.01, 0.03, 0.5, 0.9, 0.99, 1.0)


def random_rows(members: int, rows: int, atoms: int, support: float, seed: int) -> Rows:
    """Rewards within, beyond and far beyond the support, and discounts from all of [0, 1]."""
    rng = torch.Generator().manual_seed(seed)
    reach = torch.tensor([0.0, 0.5, 1.0, 3.0, 1e4])[torch.randint(5, (rows,), generator=rng)]
    discount = torch.tensor(DISCOUNTS)[torch.randint(len(DISCOUNTS), (rows,), generator=rng)]
    return {
        "logits": 3 * torch.randn(members, rows, atoms, generator=rng),
        "reward": support * reach * torch.randn(rows, generator=rng),
        "discount": torch.where(torch.rand(rows, generator=rng) < 0.3, torch.rand(rows, generator=rng), discount),
        "bonus": support * 0.3 * torch.randn(rows, generator=rng),
    }


def by_kernel(rows: Rows, support: float, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    atoms = torch.linspace(-support, support, rows["logits"].shape[-1])
    inputs = {name: value.to(device) for name, value in rows.items()}
    target, mean = categorical_target_triton(**inputs, atoms=atoms.to(device), support=support)
    return target.cpu(), mean.cpu()


def by_torch(rows: Rows, support: float) -> tuple[torch.Tensor, torch.Tensor]:
    atoms = torch.linspace(-support, support, rows["logits"].shape[-1], dtype=rows["logits"].dtype)
    return categorical_target(**rows, atoms=atoms, support=support)


@settings(deadline=None, max_examples=60)
@given(
    members=st.integers(1, 3),
    rows=st.integers(1, 5),
    atoms=st.integers(2, 20),
    support=st.floats(0.5, 20),
    seed=st.integers(0, 2**31),
)
def test_target_is_the_moved_and_projected_distribution_of_the_member_that_expects_less(
    members: int, rows: int, atoms: int, support: float, seed: int
) -> None:
    inputs = {name: value.double() for name, value in random_rows(members, rows, atoms, support, seed).items()}
    target, mean = by_torch(inputs, support)
    expected, expected_mean = target_row_by_row(inputs, support)
    np.testing.assert_allclose(target.numpy(), expected, atol=1e-9)
    np.testing.assert_allclose(mean.numpy(), expected_mean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("atoms", [2, 3, 51, 101])
@pytest.mark.parametrize(
    ("members", "rows", "support"),
    [(1, 7, 5.0), (2, 1, 5.0), (2, 12, 0.7), (3, 7, 20.0), pytest.param(2, 64, 5.0, marks=pytest.mark.slow)],
)
def test_kernel_agrees_with_torch_and_with_float64(
    members: int, rows: int, atoms: int, support: float, kernel_device: str
) -> None:
    inputs = random_rows(members, rows, atoms, support, seed=atoms + rows)
    target, mean = by_kernel(inputs, support, kernel_device)
    reference, reference_mean = by_torch(inputs, support)
    torch.testing.assert_close(target, reference, rtol=0, atol=1e-6)
    torch.testing.assert_close(mean, reference_mean, rtol=1e-6, atol=1e-6 * support)
    expected, expected_mean = target_row_by_row(inputs, support)
    np.testing.assert_allclose(target.numpy(), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(mean.numpy(), expected_mean, rtol=1e-5, atol=1e-5 * support)
    np.testing.assert_allclose(target.sum(-1).numpy(), 1.0, atol=1e-5)
    assert (target >= 0).all()


@settings(deadline=None, max_examples=40)
@given(
    discount=st.floats(0, 1, width=32),
    reward=st.floats(-30, 30, width=32),
    bonus=st.floats(-5, 5, width=32),
    atoms=st.integers(2, 24),
    seed=st.integers(0, 2**31),
)
def test_kernel_misses_no_source_at_any_discount(
    kernel_device: str, discount: float, reward: float, bonus: float, atoms: int, seed: int
) -> None:
    inputs = random_rows(1, 1, atoms, 5.0, seed)
    inputs |= {"reward": torch.tensor([reward]), "discount": torch.tensor([discount]), "bonus": torch.tensor([bonus])}
    target, _ = by_kernel(inputs, 5.0, kernel_device)
    torch.testing.assert_close(target, by_torch(inputs, 5.0)[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("shift", [-60, -3, 0, 1, 17, 50])
def test_atoms_moved_by_whole_steps_keep_their_mass_exactly(shift: int, kernel_device: str) -> None:
    inputs = random_rows(1, 3, 51, 25.0, seed=0)
    inputs |= {"reward": torch.full((3,), shift - 2.0), "discount": torch.ones(3), "bonus": torch.full((3,), 2.0)}
    mass = torch.softmax(inputs["logits"][0], -1)
    expected = torch.zeros(3, 51)
    for source in range(51):
        expected[:, min(max(source + shift, 0), 50)] += mass[:, source]
    for target, _ in (by_torch(inputs, 25.0), by_kernel(inputs, 25.0, kernel_device)):
        torch.testing.assert_close(target, expected, rtol=0, atol=3e-7)


def test_after_a_termination_all_mass_lies_around_the_reward(kernel_device: str) -> None:
    inputs = random_rows(2, 3, 11, 5.0, seed=1)
    inputs |= {"reward": torch.tensor([2.25, -7.0, 5.0]), "discount": torch.zeros(3)}
    expected = torch.zeros(3, 11)
    expected[0, 7], expected[0, 8], expected[1, 0], expected[2, 10] = 0.75, 0.25, 1.0, 1.0
    for target, mean in (by_torch(inputs, 5.0), by_kernel(inputs, 5.0, kernel_device)):
        torch.testing.assert_close(target, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(mean, inputs["reward"])


@pytest.mark.parametrize("discount", [0.0, 0.02, 0.99])
@pytest.mark.parametrize("name", ["logits", "other member's logits", "reward", "discount", "bonus"])
def test_a_nan_makes_its_row_nan_and_no_other(name: str, discount: float, kernel_device: str) -> None:
    inputs = random_rows(2, 3, 51, 5.0, seed=2)
    inputs["discount"].fill_(discount)
    clean, clean_mean = by_kernel(inputs, 5.0, kernel_device)
    if "logits" in name:
        inputs["logits"][int(name != "logits"), 1, 40] = torch.nan
    else:
        inputs[name][1] = torch.nan
    target, mean = by_kernel(inputs, 5.0, kernel_device)
    assert target[1].isnan().all() and mean[1].isnan()
    assert torch.equal(target[::2], clean[::2]) and torch.equal(mean[::2], clean_mean[::2])
    reference, reference_mean = by_torch(inputs, 5.0)
    assert reference.isnan().any(-1).tolist() == [False, True, False]
    assert reference_mean.isnan().tolist() == [False, True, False]


def test_kernel_reads_slices_where_they_lie(kernel_device: str) -> None:
    inputs = random_rows(2, 8, 13, 5.0, seed=3)
    whole = {name: value[:, 4:] if name == "logits" else value[4:] for name, value in inputs.items()}
    packed = torch.stack([value for name, value in inputs.items() if name != "logits"], -1).to(kernel_device)
    reward, discount, bonus = packed[4:].unbind(-1)
    assert not reward.is_contiguous()
    logits = inputs["logits"].to(kernel_device)[:, 4:]
    atoms = torch.linspace(-5, 5, 13, device=kernel_device)
    target, mean = categorical_target_triton(logits, reward, discount, bonus, atoms, 5.0)
    by_columns, _ = categorical_target_triton(logits.mT.contiguous().mT, reward, discount, bonus, atoms, 5.0)
    reference, reference_mean = by_torch(whole, 5.0)
    torch.testing.assert_close(target.cpu(), reference, rtol=0, atol=1e-6)
    torch.testing.assert_close(mean.cpu(), reference_mean, rtol=1e-6, atol=1e-6)
    assert torch.equal(by_columns, target)


def test_a_compiled_loss_can_call_the_kernel(kernel_device: str) -> None:
    inputs = {name: value.to(kernel_device) for name, value in random_rows(2, 3, 5, 5.0, seed=4).items()}
    atoms = torch.linspace(-5, 5, 5, device=kernel_device)

    def loss(logits: torch.Tensor, reward: torch.Tensor, discount: torch.Tensor, bonus: torch.Tensor) -> torch.Tensor:
        target, mean = categorical_target_triton(logits.detach(), reward, discount, bonus, atoms, 5.0)
        return (target * logits).sum() + mean.sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), loss(**inputs))
