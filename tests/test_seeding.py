"""The counter-based generator against Random123's known answers, and the properties that replay relies on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlplastic import seeding

# Random123's kat_vectors, philox4x32 with 10 rounds: counter words, key words, result words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def joined(low: int, high: int) -> int:
    return low | high << 32


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter: str, key: str, answer: str) -> None:
    c0, c1, c2, c3 = (int(word, 16) for word in counter.split())
    k0, k1 = (int(word, 16) for word in key.split())
    low = torch.from_numpy(np.array([joined(c0, c1)] * 3, np.uint64).view(np.int64))
    words = seeding.philox(low, joined(c2, c3), joined(k0, k1))
    assert [f"{word[1].item():08x}" for word in words] == answer.split()


def philox_in_plain_integers(counter: list[int], key: list[int]) -> list[int]:
    """The cipher as the paper's figure draws it, with Python's unbounded integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ k, right & 0xFFFFFFFF, (left >> 32) ^ d ^ m, left & 0xFFFFFFFF
        k, m = (k + 0x9E3779B9) & 0xFFFFFFFF, (m + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def test_philox_agrees_with_unbounded_integers_on_random_counters() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        counters = random.integers(0, 2**63, 16)
        high, seed = (int(value) for value in random.integers(0, 2**63, 2))
        words = torch.stack(seeding.philox(torch.from_numpy(counters), high, seed), 1)
        for row, counter in zip(words.tolist(), counters.tolist(), strict=True):
            split = [counter & 0xFFFFFFFF, counter >> 32, high & 0xFFFFFFFF, high >> 32]
            assert row == philox_in_plain_integers(split, [seed & 0xFFFFFFFF, seed >> 32])


@pytest.mark.parametrize("bound", [1, 2, 3, 1000, 2**31 - 1])
def test_uniform_integers_are_the_exact_floor_of_the_fraction_times_the_bound(bound: int) -> None:
    seed, draw, count = 123456789123456789, 7, 101  # an odd count uses half of the last counter
    drawn = seeding.uniform_integers(count, bound, draw, seed, "cpu").tolist()
    expected = []
    for counter in range(51):
        words = philox_in_plain_integers([counter, 0, draw, 0], [seed & 0xFFFFFFFF, seed >> 32])
        expected += [((words[0] << 32 | words[1]) * bound) >> 64, ((words[2] << 32 | words[3]) * bound) >> 64]
    assert drawn == expected[:count]
    assert min(drawn) >= 0 and max(drawn) < bound


def test_uniform_integers_take_the_bound_as_a_tensor() -> None:
    assert torch.equal(
        seeding.uniform_integers(64, torch.tensor(977), 3, 5, "cpu"), seeding.uniform_integers(64, 977, 3, 5, "cpu")
    )


@pytest.mark.parametrize("bound", [10, 97])
def test_uniform_integers_pass_a_chi_square_test(bound: int) -> None:
    drawn = torch.cat([seeding.uniform_integers(10_000, bound, draw, 42, "cpu") for draw in range(20)])
    expected, freedom = len(drawn) / bound, bound - 1
    statistic = ((np.bincount(drawn.numpy(), minlength=bound) - expected) ** 2 / expected).sum()
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5  # mean and deviation of the chi-square law


def test_draws_and_seeds_give_unrelated_integers() -> None:
    drawn = [seeding.uniform_integers(4096, 2**31 - 1, draw, seed, "cpu") for draw, seed in [(0, 0), (1, 0), (0, 1)]]
    for first, second in [(0, 1), (0, 2), (1, 2)]:
        assert abs(np.corrcoef(drawn[first].numpy(), drawn[second].numpy())[0, 1]) < 0.08
        assert (drawn[first] == drawn[second]).sum() <= 1


def test_keys_never_change_between_versions() -> None:
    """Recorded values: a change would silently break the resumption of every existing run."""
    assert seeding.key("replay", 0, 0) == 5534288212509534048
    assert seeding.environment_seeds(1, "train", 0, 2, 0) == [1393996776, 1867506213]


def test_keys_depend_on_every_part_its_type_and_its_place() -> None:
    keys = [
        seeding.key("a", 1, 2), seeding.key("a", 2, 1), seeding.key("a", 12), seeding.key("a", "1", 2),
        seeding.key("b", 1, 2), seeding.key("a", 1), seeding.key("a", 1, 2, bits=31),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys) and keys[-1] < 2**31


def test_environment_seeds_are_distinct_between_neighbouring_runs_roles_ranks_and_rebuilds() -> None:
    settings = [(0, "train", 0, 0), (1, "train", 0, 0), (0, "eval", 0, 0), (0, "train", 1, 0), (0, "train", 0, 1)]
    lists = [seeding.environment_seeds(seed, role, rank, 64, rebuild) for seed, role, rank, rebuild in settings]
    assert len({seed for seeds in lists for seed in seeds}) == 64 * len(settings)


def test_a_generator_is_a_function_of_seed_stream_and_step() -> None:
    def draw(seed: int, stream: str, step: int) -> list[float]:
        return torch.rand(4, generator=seeding.generator("cpu", seed, stream, step)).tolist()

    assert draw(0, "noise", 3) == draw(0, "noise", 3)
    streams = [(0, "noise", 3), (1, "noise", 3), (0, "update", 3), (0, "noise", 4)]
    assert len({tuple(draw(*stream)) for stream in streams}) == 4
