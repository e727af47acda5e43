"""Priorities against a list and exact fractions, the law of the draws, and the promise never to wait for the device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rlplastic import seeding
from rlplastic.errors import CheckpointError, ConfigurationError
from rlplastic.replay.priority import SumTree, importance_weights, priorities_from_errors, uniform_fractions

LARGEST_BELOW_ONE = math.nextafter(1.0, 0.0)


def tree_of(priorities: Sequence[float]) -> SumTree:
    tree = SumTree(len(priorities), "cpu")
    tree.set(torch.arange(len(priorities)), torch.tensor(priorities))
    return tree


def owner(priorities: Sequence[float], uniform: float) -> int:
    """The row whose interval of the exact cumulative sums holds ``uniform``."""
    masses = [Fraction(priority) for priority in priorities]
    target = Fraction(uniform) * sum(masses)
    return next(row for row, end in enumerate(itertools.accumulate(masses)) if target < end)


def evenly_spaced(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def sums_in_numpy(priorities: Sequence[float]) -> list[np.ndarray]:
    """The levels of the padded tree from the leaves up to the root."""
    width = 1
    while width < len(priorities):
        width *= 2
    levels = [np.zeros(width, np.float32)]
    levels[0][: len(priorities)] = priorities
    while len(levels[-1]) > 1:
        levels.append(levels[-1][0::2] + levels[-1][1::2])
    return levels


def assert_every_node_is_the_sum_of_its_children(tree: SumTree, priorities: Sequence[float]) -> None:
    levels = sums_in_numpy(priorities)
    np.testing.assert_array_equal(tree.nodes[1:].numpy(), np.concatenate(levels[::-1]))


finite = st.floats(0, 2.0**100, width=32, allow_subnormal=True)
anything = st.floats(width=32) | finite


class Listed:
    """What the tree should hold, in a list."""

    def __init__(self, rows: int) -> None:
        self.priorities, self.largest = [0.0] * rows, 1.0
        self.limit = float(np.finfo(np.float32).max) / 2 ** math.ceil(math.log2(rows))

    def set(self, rows: list[int], given: list[float]) -> None:
        kept = {index: min(value, self.limit) for index, value in enumerate(given) if 0 <= value < math.inf}
        self.largest = max([self.largest, *kept.values()])
        meant = [(row, kept.get(index, self.largest)) for index, row in enumerate(rows)]
        for row in rows:
            self.priorities[row] = max(value for other, value in meant if other == row)


@settings(max_examples=150, deadline=None)
@given(rows=st.integers(1, 40), data=st.data())
def test_any_writes_leave_the_tree_that_a_list_would(rows: int, data: st.DataObject) -> None:
    tree, listed = SumTree(rows, "cpu"), Listed(rows)
    row = st.integers(0, rows - 1)
    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["set", "set", "add_new", "clear", "reload"]))
        if action == "set":
            written = data.draw(st.lists(st.tuples(row, anything), max_size=12))
            leaves, values = [leaf for leaf, _ in written], [value for _, value in written]
            tree.set(torch.tensor(leaves, dtype=torch.int64), torch.tensor(values))
            listed.set(leaves, values)
        elif action == "reload":
            state = tree.state_dict()
            tree = SumTree(rows, "cpu")
            tree.load_state_dict(state)
        else:
            leaves = data.draw(st.lists(row, max_size=6))
            getattr(tree, action)(torch.tensor(leaves, dtype=torch.int64))
            for leaf in leaves:
                listed.priorities[leaf] = listed.largest if action == "add_new" else 0.0
        assert_every_node_is_the_sum_of_its_children(tree, listed.priorities)
        assert tree.largest.item() == listed.largest
        assert math.isfinite(tree.nodes[1].item())


@settings(max_examples=150, deadline=None)
@given(
    priorities=st.lists(st.sampled_from([0, 0, 1, 2, 3, 1000]), min_size=1, max_size=40).filter(any),
    part=st.floats(0.01, 0.99),
)
def test_each_row_is_drawn_where_the_exact_cumulative_sums_say(priorities: list[int], part: float) -> None:
    starts = [0, *itertools.accumulate(priorities)]
    held = [row for row, priority in enumerate(priorities) if priority]
    uniforms = [(starts[row] + part * priorities[row]) / starts[-1] for row in held]
    tree = tree_of([float(priority) for priority in priorities])
    leaves, probabilities = tree.draw(torch.tensor(uniforms, dtype=torch.float64))
    assert leaves.tolist() == held and [owner(priorities, uniform) for uniform in uniforms] == held
    assert probabilities.tolist() == pytest.approx([priorities[row] / starts[-1] for row in held], rel=1e-12)


@settings(max_examples=300, deadline=None)
@given(
    priorities=st.lists(st.just(0.0) | finite, min_size=1, max_size=40),
    positive=st.tuples(st.integers(0, 39), st.sampled_from([1e-45, 1e-30, 1.0, 1e30])),
    uniforms=st.lists(st.floats(0, LARGEST_BELOW_ONE), max_size=20),
)
def test_a_row_of_priority_zero_is_never_drawn_whatever_the_rounding(
    priorities: list[float], positive: tuple[int, float], uniforms: list[float]
) -> None:
    priorities[positive[0] % len(priorities)] = positive[1]
    tree = tree_of(priorities)
    edges = [0.0, 2.0**-53, LARGEST_BELOW_ONE]
    total = math.fsum(priorities)
    edges += [min(end / total, LARGEST_BELOW_ONE) for end in itertools.accumulate(priorities)]
    leaves, probabilities = tree.draw(torch.tensor(edges + uniforms, dtype=torch.float64))
    assert all(0 <= leaf < len(priorities) and priorities[leaf] > 0 for leaf in leaves.tolist())
    assert (probabilities > 0).all()


def test_not_even_wrong_uniform_numbers_draw_a_row_of_priority_zero() -> None:
    wrong = torch.tensor([-1.0, -1e-30, 1.0, 1.5, 1e300, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    for held in itertools.product([0.0, 1.0], repeat=5):
        if any(held):
            assert all(held[leaf] for leaf in tree_of(held).draw(wrong)[0].tolist())


def test_a_million_draws_follow_the_priorities() -> None:
    rows, random = 1000, np.random.default_rng(5)
    priorities = random.uniform(0.5, 20.0, rows).astype(np.float32)
    priorities[random.random(rows) < 0.3] = 0.0
    priorities[:7] = priorities[-1] = 0.0
    tree, tally = tree_of(priorities.tolist()), np.zeros(rows)
    for draw in range(20):
        leaves, probabilities = tree.draw(uniform_fractions(50_000, draw, 11, "cpu"))
        tally += np.bincount(leaves.numpy(), minlength=rows)
        shares = priorities[leaves.numpy()] / priorities.sum(dtype=np.float64)
        np.testing.assert_allclose(probabilities.numpy(), shares, rtol=1e-6)
    held = priorities > 0
    assert tally[~held].sum() == 0
    expected = 1_000_000 * priorities[held] / priorities.sum(dtype=np.float64)
    freedom = held.sum() - 1
    statistic = ((tally[held] - expected) ** 2 / expected).sum()
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5  # mean and deviation of the chi-square law


@pytest.mark.parametrize("rows", [2, 3, 31, 32, 33, 1000])
def test_evenly_spaced_numbers_fall_on_each_row_as_often_as_its_share_says(rows: int) -> None:
    priorities = np.exp(np.random.default_rng(rows).normal(0, 3, rows)).astype(np.float32)
    count = 2**19
    leaves, _ = tree_of(priorities.tolist()).draw(evenly_spaced(count))
    assert (leaves.diff() >= 0).all()
    expected = count * priorities.astype(np.float64) / priorities.sum(dtype=np.float64)
    assert np.abs(np.bincount(leaves.numpy(), minlength=rows) - expected).max() < 2


def test_rounded_sums_do_not_move_mass_to_a_small_neighbour() -> None:
    # In float32 2**24 + 3 rounds to 2**24 + 4; a target in units of that sum would give the second row a mass of 4.
    priorities = [2.0**24, 3.0, 1e-30]
    uniforms = [1 - 3.5 / 2**24, 1 - 2.5 / 2**24, LARGEST_BELOW_ONE]
    leaves, _ = tree_of(priorities).draw(torch.tensor(uniforms, dtype=torch.float64))
    assert leaves.tolist() == [owner(priorities, uniform) for uniform in uniforms] == [0, 1, 1]


def test_tiny_and_huge_priorities_live_side_by_side() -> None:
    tree = tree_of([1e-30, 1e30, 0.0, 1e-30, 1e-30])
    leaves, probabilities = tree.draw(evenly_spaced(4096))
    assert set(leaves.tolist()) == {1} and probabilities.eq(1).all()
    leaves, probabilities = tree.draw(torch.zeros(1, dtype=torch.float64))
    assert leaves.tolist() == [0] and probabilities.item() == pytest.approx(1e-60)
    tree.clear(torch.tensor([1]))  # nothing of the huge one may be left in the sums
    leaves, probabilities = tree.draw(evenly_spaced(3000))
    assert np.bincount(leaves.numpy()).tolist() == [1000, 0, 0, 1000, 1000]
    assert probabilities.tolist() == pytest.approx([1 / 3] * 3000)


def test_a_tree_full_of_the_largest_numbers_stays_finite() -> None:
    largest = float(np.finfo(np.float32).max)
    for rows in (1, 2, 5, 64):
        tree = tree_of([largest] * rows)
        assert tree.nodes.isfinite().all()
        assert tree.draw(evenly_spaced(rows))[0].tolist() == list(range(rows))
    assert tree.nodes[1].item() == largest


def test_a_single_row_is_always_drawn() -> None:
    tree = tree_of([0.25])
    leaves, probabilities = tree.draw(torch.tensor([0.0, 0.5, LARGEST_BELOW_ONE], dtype=torch.float64))
    assert leaves.tolist() == [0, 0, 0] and probabilities.tolist() == [1, 1, 1]


@pytest.mark.parametrize("rows", [2, 5, 8, 100])
def test_the_only_row_with_mass_is_always_drawn(rows: int) -> None:
    for row in range(rows):
        tree = tree_of([0.0] * rows)
        tree.set(torch.tensor([row]), torch.tensor([1e-3]))
        leaves, probabilities = tree.draw(torch.tensor([0.0, 0.3, 0.99, LARGEST_BELOW_ONE], dtype=torch.float64))
        assert set(leaves.tolist()) == {row} and set(probabilities.tolist()) == {1.0}


def test_float32_uniform_numbers_draw_the_same_rows_as_their_float64_values() -> None:
    tree, uniforms = tree_of([0.3, 0.0, 2.0, 0.7, 0.1]), torch.rand(1000, generator=torch.Generator().manual_seed(0))
    for single, double in zip(tree.draw(uniforms), tree.draw(uniforms.double()), strict=True):
        assert torch.equal(single, double) and single.dtype == double.dtype


def test_a_tree_of_zeros_answers_with_no_probability() -> None:
    leaves, probabilities = SumTree(5, "cpu").draw(evenly_spaced(3))
    assert leaves.tolist() == [0, 0, 0] and probabilities.isnan().all()


def test_sums_equal_those_of_a_fresh_tree_after_thousands_of_writes() -> None:
    rows, random = 777, np.random.default_rng(0)
    tree, priorities = SumTree(rows, "cpu"), np.zeros(rows, np.float32)
    for _ in range(3000):
        leaves = random.integers(0, rows, 16)
        values = np.exp(random.normal(0, 12, 16)).astype(np.float32)
        tree.set(torch.from_numpy(leaves), torch.from_numpy(values))
        priorities[leaves] = 0
        np.maximum.at(priorities, leaves, values)
    fresh = tree_of(priorities.tolist())
    assert torch.equal(tree.nodes, fresh.nodes)
    assert_every_node_is_the_sum_of_its_children(tree, priorities.tolist())
    assert tree.nodes[1].item() == pytest.approx(math.fsum(priorities), rel=1e-6)


def test_of_several_priorities_for_one_row_the_largest_counts_in_any_order() -> None:
    for values in itertools.permutations([0.5, 3.0, 0.0, torch.nan]):
        tree = tree_of([9.0, 9.0, 1.0])
        tree.largest.fill_(2.0)
        tree.set(torch.tensor([1, 1, 1, 1]), torch.tensor(values))
        assert tree.priorities.tolist() == [9.0, 3.0, 1.0]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf, -1.0])
def test_a_broken_priority_counts_as_the_largest_seen(broken: float) -> None:
    tree = tree_of([0.5, 0.5, 0.5])
    tree.set(torch.tensor([1]), torch.tensor([broken]))
    assert tree.priorities.tolist() == [0.5, 1.0, 0.5]  # 1 before any larger one
    tree.set(torch.tensor([0, 2]), torch.tensor([broken, 7.0]))
    assert tree.priorities.tolist() == [7.0, 1.0, 7.0] and tree.largest.item() == 7.0


def test_new_rows_get_the_largest_priority_ever_seen() -> None:
    tree = SumTree(4, "cpu")
    tree.add_new(torch.tensor([0, 0]))
    assert tree.priorities.tolist() == [1, 0, 0, 0]
    tree.set(torch.tensor([0]), torch.tensor([5.0]))
    tree.set(torch.tensor([0]), torch.tensor([0.1]))
    tree.add_new(torch.tensor([2]))
    tree.clear(torch.tensor([2, 0]))
    tree.add_new(torch.tensor([3]))
    assert tree.priorities.tolist() == [0, 0, 0, 5]


def test_every_row_is_seen_soon_however_small_the_others_have_become() -> None:
    """What the running maximum is for: the largest of the present priorities may be far below what an error can be."""
    tree = SumTree(64, "cpu")
    tree.add_new(torch.arange(32))
    tree.set(torch.arange(32), torch.full((32,), 8.0))
    tree.set(torch.arange(32), torch.full((32,), 0.01))
    tree.add_new(torch.tensor([40, 41]))
    rows, probabilities = tree.draw(evenly_spaced(256))
    assert {40, 41} <= set(rows.tolist())
    assert probabilities[rows == 40][0].item() == pytest.approx(8 / (32 * 0.01 + 16), rel=1e-6)
    tree.set(torch.tensor([40, 41]), torch.tensor([0.01, 0.01]))  # drawn once, a row has the priority of its own error
    assert (tree.priorities[torch.tensor([40, 41])] < 0.02).all() and tree.largest.item() == 8.0


def test_a_restored_tree_draws_the_same_rows_bit_for_bit() -> None:
    random = torch.Generator().manual_seed(3)
    tree = SumTree(300, "cpu")
    tree.add_new(torch.arange(250))
    for _ in range(50):
        tree.set(torch.randint(0, 250, (32,), generator=random), torch.randn(32, generator=random).mul(9).exp())
    state, restored = tree.state_dict(), SumTree(300, "cpu")
    restored.load_state_dict(state)
    for either in (tree, restored):  # the saved state is a copy: what follows must not change it
        either.add_new(torch.tensor([3, 299]))
        either.set(torch.tensor([5]), torch.tensor([torch.nan]))
    uniforms = uniform_fractions(5000, 1, 2, "cpu")
    for mine, other in zip(tree.draw(uniforms), restored.draw(uniforms), strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(tree.nodes, restored.nodes) and torch.equal(tree.largest, restored.largest)
    third = SumTree(300, "cpu")
    third.load_state_dict(state)
    assert third.priorities[299].item() == 0 and torch.equal(third.state_dict()["priorities"], state["priorities"])


def test_a_state_of_another_size_is_refused() -> None:
    with pytest.raises(CheckpointError, match="priorities of 4 rows, but the replay has 3"):
        SumTree(3, "cpu").load_state_dict(SumTree(4, "cpu").state_dict())


def test_a_tree_without_rows_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="tree of 0 rows"):
        SumTree(0, "cpu")


@pytest.mark.parametrize("rows", [1, 2, 3, 64, 65])
def test_memory_is_what_the_tensors_take(rows: int) -> None:
    tree = SumTree(rows, "cpu")
    assert SumTree.memory_bytes(rows) == tree.nodes.nbytes + tree.largest.nbytes
    assert 8 * rows <= tree.nodes.nbytes < 16 * rows


def test_priorities_are_the_shifted_errors_raised_to_the_exponent() -> None:
    errors = [0.0, -2.0, 3.5, 1e-4]
    got = priorities_from_errors(torch.tensor(errors, requires_grad=True), 0.6, 1e-6)
    assert got.tolist() == pytest.approx([(abs(error) + 1e-6) ** 0.6 for error in errors], rel=1e-6)
    assert not got.requires_grad
    assert priorities_from_errors(torch.tensor(errors), 0.0, 1e-6).tolist() == [1, 1, 1, 1]
    half = priorities_from_errors(torch.tensor(errors, dtype=torch.bfloat16), 1.0, 1e-6)
    assert half.dtype == torch.float32 and half[0].item() == pytest.approx(1e-6)


def test_a_broken_error_reaches_the_tree_as_the_largest_priority() -> None:
    tree = SumTree(3, "cpu")
    tree.set(torch.arange(3), priorities_from_errors(torch.tensor([torch.nan, 2.0, -torch.inf]), 0.5, 0.0))
    assert tree.priorities.tolist() == pytest.approx([2**0.5] * 3)


def test_importance_weights_have_the_closed_form_of_the_paper() -> None:
    probabilities, beta = [0.5, 0.125, 0.25], 0.4
    weights = importance_weights(torch.tensor(probabilities, dtype=torch.float64), beta)
    assert weights.dtype == torch.float32
    for rows in (3, 10, 10**6):  # of which the paper's formula speaks, and which cancels out
        raw = [(1 / rows * 1 / chance) ** beta for chance in probabilities]
        assert weights.tolist() == pytest.approx([weight / max(raw) for weight in raw], rel=1e-6)


def test_full_importance_weights_undo_the_priorities() -> None:
    """At beta = 1 the weighted mean over draws is the plain mean over rows."""
    random = np.random.default_rng(2)
    priorities, values = random.uniform(0.1, 5.0, 50).tolist(), torch.from_numpy(random.normal(size=50))
    leaves, probabilities = tree_of(priorities).draw(evenly_spaced(2**18))
    weights = importance_weights(probabilities, 1.0).double()
    weighted, plain = ((weights * values[leaves]).sum() / weights.sum()).item(), values[leaves].mean().item()
    assert weighted == pytest.approx(values.mean().item(), abs=1e-3)
    assert plain != pytest.approx(values.mean().item(), abs=1e-2)


def test_importance_weights_survive_probabilities_beyond_float32() -> None:
    weights = importance_weights(torch.tensor([1e-60, 1.0, 1e-75], dtype=torch.float64), 1.0)
    assert weights.isfinite().all() and weights.tolist() == pytest.approx([1e-15, 0.0, 1.0])
    steep = importance_weights(torch.tensor([1e-60, 1.0, 1e-75], dtype=torch.float64), 5.0)
    assert steep.tolist() == [0.0, 0.0, 1.0]  # P^-5 alone would be infinite


def test_even_priorities_weigh_one() -> None:
    _, probabilities = tree_of([3.0] * 12).draw(evenly_spaced(12))
    assert importance_weights(probabilities, 0.7).tolist() == [1.0] * 12


def test_uniform_fractions_are_the_top_bits_of_the_published_words() -> None:
    words = 0x6627E8D5E169C58D, 0xBC57AC4C9B00DBD8  # Random123's known answer for counter 0 and key 0
    assert uniform_fractions(2, 0, 0, "cpu").tolist() == [(word >> 11) / 2**53 for word in words]


@pytest.mark.parametrize("count", [0, 1, 7, 64])
def test_uniform_fractions_agree_with_the_uniform_integers(count: int) -> None:
    fractions = uniform_fractions(count, 9, 123, "cpu")
    assert fractions.dtype == torch.float64 and fractions.shape == (count,)
    integers = seeding.uniform_integers(count, 2**30, 9, 123, "cpu")
    assert torch.equal((fractions * 2**30).floor().long(), integers)


def test_uniform_fractions_differ_by_draw_and_by_seed() -> None:
    drawn = [uniform_fractions(8, draw, seed, "cpu") for draw, seed in [(0, 0), (1, 0), (0, 1)]]
    assert len(torch.cat(drawn).unique()) == 24
    assert torch.equal(drawn[0], uniform_fractions(9, 0, 0, "cpu")[:8])


def use_everything(device: str) -> None:
    tree = SumTree(11, device)
    leaves = torch.arange(6, device=device)
    tree.add_new(leaves)
    for draw in range(3):
        rows, probabilities = tree.draw(uniform_fractions(6, draw, 1, device))
        weights = importance_weights(probabilities, 0.4)
        tree.set(rows, priorities_from_errors(weights - 0.5, 0.6, 1e-6))
        tree.clear(leaves[:2])
    tree.load_state_dict(tree.state_dict())


class OnOneDevice(TorchDispatchMode):
    """Refuses what the meta device lets pass although a real one would wait for it, or would not take it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        assert all(tensor.is_meta for tensor in tensors), f"{func} mixes the device and the host"
        assert func is not torch.ops.aten.index_fill_.int_Tensor, "index_fill_ reads a tensor's value on the host"
        assert "index_put" not in str(func), "a mask as an index waits"
        return func(*args, **(kwargs or {}))


def test_nothing_ever_waits_for_the_device() -> None:
    with OnOneDevice():
        use_everything("meta")  # its tensors have no values: whoever wants to read one gets an exception


@pytest.mark.gpu
def test_nothing_ever_waits_for_a_real_device() -> None:
    use_everything("cuda")  # compiling and loading may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        use_everything("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_gpu_draws_what_the_cpu_draws() -> None:
    trees = {device: SumTree(1000, device) for device in ("cpu", "cuda")}
    leaves = torch.randint(0, 1000, (4096,), generator=torch.Generator().manual_seed(0))
    values = torch.randn(4096, generator=torch.Generator().manual_seed(1)).mul(5).exp()
    values[:3] = torch.tensor([torch.nan, torch.inf, -1.0])
    drawn = {}
    for device, tree in trees.items():
        tree.set(leaves.to(device), values.to(device))
        drawn[device] = tree.draw(uniform_fractions(10_000, 4, 5, device))
    assert torch.equal(trees["cpu"].nodes, trees["cuda"].nodes.cpu())
    for cpu, cuda in zip(drawn["cpu"], drawn["cuda"], strict=True):
        assert torch.equal(cpu, cuda.cpu())
