"""Drawing a batch from the replay ring: plain torch, numpy for tensors on a CPU, and one Triton launch.

A draw is three stages. *Locate*: 64 random bits per row (Philox, a function of seed, draw and row alone) become a rank
among all transitions, which the index turns into a flat row; or rows are given, by prioritised sampling. *Walk*: up to
n steps from there, summing discounted rewards, until a row that terminated or truncated (summed) or one that is no
transition (not summed). *Gather*: the observations of the row and of the row where the walk ended, and the action.

All three implementations give the same rows on every device and, since they add in the same order, the same bits of
the rest (Triton is told not to fuse multiplications and additions).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlplastic import seeding
from rlplastic.kernels._triton import tl, triton
from rlplastic.kernels.replay_tensors import TERMINATED, TRUNCATED, VALID, ReplayTensors

ENDED = TERMINATED | TRUNCATED
BLOCK_OF_DRAWS = 64
"""Draws whose random words the numpy path computes together; one by one, they would take longer than the gathers."""


@dataclass(frozen=True)
class Draw:
    """What stays the same from draw to draw."""

    ring: ReplayTensors
    key: int
    """Philox key of this stream."""
    queue: int
    """0: training's transitions; 1: the held-out ones."""
    powers: Tensor
    """(n + 1,) float32, gamma^0 .. gamma^n."""
    ages: Tensor | None
    """(T,) int64, weight of the a + 1 youngest transitions of a column (below 2**31), or None for uniform draws."""
    block: Tensor
    """(2B, E + A') float32 to write into: the rows, then those where their walks ended (their actions are unused)."""
    rows: Tensor
    """(B,) int64 to write the flat rows into."""
    reward: Tensor
    """(B,) to write into."""
    discount: Tensor
    """(B,) to write into: gamma^k of the k steps summed, 0 if the episode terminated."""

    @property
    def n_step(self) -> int:
        """The most steps a walk takes."""
        return len(self.powers) - 1


def sample_torch(draw: Draw, number: int, scale: Tensor | None, given: Tensor | None = None) -> None:
    """The reference: draw ``number`` on any device, rewards times ``scale``; ``given`` (B,) flat rows, or none."""
    ring = draw.ring
    if given is None:
        given = _locate_torch(draw, number)
    draw.rows.copy_(given)
    row, flags = given, ring.flags.index_select(0, given)
    total = ring.reward.index_select(0, row)
    steps, terminated, going = torch.ones_like(row), flags & TERMINATED != 0, flags & ENDED == 0
    for ahead in range(1, draw.n_step):
        row = (row + ring.num_envs).remainder_(ring.rows)
        flags = ring.flags.index_select(0, row)
        going = going & (flags & VALID != 0)
        # By selection, not by a product with 0: what lies behind the end may be anything.
        gain = ring.reward.index_select(0, row).mul_(draw.powers[ahead])
        total = total + gain.where(going, torch.zeros_like(gain))
        steps, terminated = steps + going, terminated | (going & (flags & TERMINATED != 0))
        going = going & (flags & ENDED == 0)
    draw.reward.copy_(total if scale is None else total * scale)
    draw.discount.copy_(draw.powers.index_select(0, steps).masked_fill_(terminated, 0.0))
    _gather(draw, torch.cat((given, (given + steps * ring.num_envs).remainder_(ring.rows))))


def _gather(draw: Draw, both: Tensor) -> None:
    """Fill the block from flat rows (2B,): those drawn, then those where their walks ended."""
    ring, size = draw.ring, len(draw.rows)
    width = ring.observation.shape[1]
    ring.unpack(both, draw.block[:, :width])
    draw.block[:size, width:].copy_(ring.action.index_select(0, both[:size]))


def _locate_torch(draw: Draw, number: int) -> Tensor:
    """Flat rows (B,) of uniform transitions, or of ones whose age follows the weights."""
    ring, size, device = draw.ring, len(draw.rows), draw.rows.device
    cumulative, offset = ring.index[draw.queue]
    ranks = seeding.uniform_integers(size, cumulative[-1], number, draw.key, device)
    column = torch.searchsorted(cumulative, ranks, right=True)
    position = offset.index_select(0, column) + ranks
    if draw.ages is not None:
        last = offset.index_select(0, column) + cumulative.index_select(0, column) - 1
        before = torch.cat((cumulative.new_zeros(1), cumulative))
        count = before.index_select(0, column + 1) - before.index_select(0, column)
        weight = draw.ages.index_select(0, count - 1)
        position = last - torch.searchsorted(
            draw.ages, seeding.uniform_integers(size, weight, number, draw.key + 1, device), right=True
        )
    entry = position.remainder(ring.num_slots) * ring.num_envs + column
    slot = ring.queue[draw.queue].view(-1).index_select(0, entry)
    return slot * ring.num_envs + column


def sample_numpy(draw: Draw, number: int, scale: Tensor | None, given: Tensor | None = None) -> None:
    """The same for tensors on a CPU: index arithmetic in numpy, random words in blocks, one gather of packed rows."""
    ring, host, size = draw.ring, draw.ring.host, len(draw.rows)
    rows = _locate_numpy(draw, number) if given is None else given.numpy()
    out = draw.rows.numpy()
    out[:] = rows
    flags, all_flags, all_rewards = host["flags"][rows], host["flags"], host["reward"]
    total, steps, terminated = all_rewards[rows], np.ones(1, np.int64), flags & TERMINATED != 0
    if draw.n_step > 1:
        row, steps, going = rows, np.ones(size, np.int64), flags & ENDED == 0
        powers = draw.powers.numpy()
        for ahead in range(1, draw.n_step):
            row = (row + ring.num_envs) % ring.rows
            flags = all_flags[row]
            going = going & (flags & VALID != 0)
            total = total + np.where(going, all_rewards[row] * powers[ahead], np.float32(0))
            steps, terminated = steps + going, terminated | (going & (flags & TERMINATED != 0))
            going &= flags & ENDED == 0
    draw.reward.numpy()[:] = total if scale is None else total * scale.numpy()
    draw.discount.numpy()[:] = np.where(terminated, np.float32(0), draw.powers.numpy()[steps])
    both = torch.from_numpy(np.concatenate((rows, (rows + steps * ring.num_envs) % ring.rows)))
    if ring.packed is not None:
        torch.index_select(ring.packed, 0, both, out=draw.block)
    else:
        _gather(draw, both)


def _locate_numpy(draw: Draw, number: int) -> NDArray[np.int64]:
    ring, size = draw.ring, len(draw.rows)
    index = ring.host["index"][draw.queue]
    cumulative, offset = index
    ranks = _fractions(draw.key, size, number).integers(cumulative[-1])
    column = np.searchsorted(cumulative, ranks, side="right") if ring.num_envs > 1 else np.int64(0)
    position = offset[column] + ranks
    if draw.ages is not None:
        ages = draw.ages.numpy()
        count = np.diff(cumulative, prepend=0)[column]
        drawn = _fractions(draw.key + 1, size, number).integers(ages[count - 1])
        position = offset[column] + cumulative[column] - 1 - np.searchsorted(ages, drawn, side="right")
    entry = (position % ring.num_slots + draw.queue * ring.num_slots) * ring.num_envs + column
    rows: NDArray[np.int64] = ring.host["queue"][entry].astype(np.int64) * ring.num_envs + column
    return rows


@dataclass(frozen=True)
class _Fractions:
    """Random 64-bit fractions u, as their upper and lower words."""

    upper: NDArray[np.int64]
    lower: NDArray[np.int64]

    def integers(self, bound: np.int64 | NDArray[np.int64]) -> NDArray[np.int64]:
        """floor(u * bound), as `seeding.uniform_integers`."""
        result: NDArray[np.int64] = (self.upper * bound + ((self.lower * bound) >> 32)) >> 32
        return result


def _fractions(key: int, size: int, number: int) -> _Fractions:
    upper, lower = _words(key, size, number // BLOCK_OF_DRAWS)
    at = number % BLOCK_OF_DRAWS
    return _Fractions(upper[at], lower[at])


@lru_cache(maxsize=8)
def _words(key: int, size: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The words of `BLOCK_OF_DRAWS` draws, (draws, size) each."""
    first = block * BLOCK_OF_DRAWS
    upper, lower = seeding.uniform_words(size, torch.arange(first, first + BLOCK_OF_DRAWS)[:, None], key, "cpu")
    return upper.numpy(), lower.numpy()


def sample_triton(draw: Draw, number: Tensor, scale: Tensor | None, given: Tensor | None = None) -> None:
    """The same in one launch; ``number`` is an int64 tensor on the device, so that a CUDA graph can count it up."""
    ring = draw.ring
    _sample[(len(draw.rows),)](
        ring.observation,
        ring.action,
        ring.reward,
        ring.flags,
        ring.queue[draw.queue],
        ring.index[draw.queue],
        number,
        scale if scale is not None else draw.powers,  # gamma^0
        draw.powers,
        draw.ages if draw.ages is not None else ring.index,
        ring.cell if ring.cell is not None else draw.powers,
        ring.centre if ring.centre is not None else draw.powers,
        given if given is not None else draw.rows,
        draw.block,
        draw.reward,
        draw.discount,
        draw.rows,
        draw.key,
        **constants(draw, given is not None),
        **options(draw),
    )


def constants(draw: Draw, given: bool) -> dict[str, int | bool]:
    """What `_sample` is compiled for."""
    ring, size = draw.ring, draw.ring.observation.shape[1]
    return {
        "BATCH": len(draw.rows),
        "COLUMNS": ring.num_envs,
        "SLOTS": ring.num_slots,
        "SIZE": size,
        "ROW_STRIDE": ring.observation.stride(0),
        "ACTION_STRIDE": ring.action.stride(0),
        "ACTIONS": ring.action.shape[1],
        "N_STEP": draw.n_step,
        "AGED": draw.ages is not None,
        "GIVEN": given,
        "CELLS": ring.cell is not None,
        "BLOCK": ring.lanes,
        "ACTION_BLOCK": triton.next_power_of_2(ring.action.shape[1]),
    }


def options(draw: Draw) -> dict[str, int | bool]:
    """How it is compiled: 16 bytes for each thread, and roundings as everywhere else."""
    return {"num_warps": draw.ring.warps, "enable_fp_fusion": False}


@triton.jit
def _sample(
    observation: tl.tensor,
    action: tl.tensor,
    reward: tl.tensor,
    flags: tl.tensor,
    queue: tl.tensor,
    index: tl.tensor,
    number: tl.tensor,
    scale: tl.tensor,
    powers: tl.tensor,
    ages: tl.tensor,
    cell: tl.tensor,
    centre: tl.tensor,
    given: tl.tensor,
    block: tl.tensor,
    out_reward: tl.tensor,
    out_discount: tl.tensor,
    out_rows: tl.tensor,
    key: int,
    BATCH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    SIZE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    ACTION_STRIDE: tl.constexpr,
    ACTIONS: tl.constexpr,
    N_STEP: tl.constexpr,
    AGED: tl.constexpr,
    GIVEN: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTION_BLOCK: tl.constexpr,
) -> None:
    """One program per row of the batch."""
    b = tl.program_id(0)
    if GIVEN:
        row = tl.load(given + b)
    else:
        draw = tl.load(number)
        upper, lower = _random_words(key, draw, b)
        rank = _integer(upper, lower, tl.load(index + COLUMNS - 1))
        column = _first_above(index, rank, COLUMNS)
        offset = tl.load(index + COLUMNS + column)
        position = offset + rank
        if AGED:
            upto = tl.load(index + column)
            before = tl.load(index + column - 1, mask=column > 0, other=0)
            upper, lower = _random_words(key + 1, draw, b)
            drawn = _integer(upper, lower, tl.load(ages + upto - before - 1))
            position = offset + upto - 1 - _first_above(ages, drawn, SLOTS)
        position = (position % SLOTS + SLOTS) % SLOTS  # the sign of a remainder is that of the dividend here
        row = tl.load(queue + position * COLUMNS + column).to(tl.int64) * COLUMNS + column
    tl.store(out_rows + b, row)
    bits = tl.load(flags + row).to(tl.int32)
    summed = tl.load(reward + row)
    steps = tl.zeros((), tl.int64) + 1
    terminated = bits & 2
    going = (bits & 6) == 0
    last = row
    for ahead in tl.static_range(1, N_STEP):
        last = (last + COLUMNS) % (COLUMNS * SLOTS)
        bits = tl.load(flags + last).to(tl.int32)
        going = going & ((bits & 1) != 0)
        gain = tl.load(reward + last) * tl.load(powers + ahead)
        summed += tl.where(going, gain, 0.0)
        steps += going.to(tl.int64)
        terminated |= tl.where(going, bits & 2, 0)
        going = going & ((bits & 6) == 0)
    tl.store(out_reward + b, summed * tl.load(scale))
    tl.store(out_discount + b, tl.where(terminated != 0, 0.0, tl.load(powers + steps)))
    after = (row + steps * COLUMNS) % (COLUMNS * SLOTS)
    target = block + b.to(tl.int64) * (SIZE + ACTIONS)
    following = target + BATCH * (SIZE + ACTIONS)
    for begin in tl.static_range(0, SIZE, BLOCK):
        lanes = begin + tl.arange(0, BLOCK)
        now = tl.load(observation + row * ROW_STRIDE + lanes, mask=lanes < SIZE)
        later = tl.load(observation + after * ROW_STRIDE + lanes, mask=lanes < SIZE)
        now, later = now.to(tl.float32), later.to(tl.float32)
        if CELLS:
            width, middle = tl.load(cell + lanes, mask=lanes < SIZE), tl.load(centre + lanes, mask=lanes < SIZE)
            now, later = (now + 0.5) * width + middle, (later + 0.5) * width + middle
        tl.store(target + lanes, now, mask=lanes < SIZE)
        tl.store(following + lanes, later, mask=lanes < SIZE)
    lanes = tl.arange(0, ACTION_BLOCK)
    acted = tl.load(action + row * ACTION_STRIDE + lanes, mask=lanes < ACTIONS)
    tl.store(target + SIZE + lanes, acted, mask=lanes < ACTIONS)


@triton.jit
def _random_words(key: int, draw: tl.tensor, b: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """64 random bits of row ``b``: two of the four words of Philox4x32-10, as `seeding.uniform_words`."""
    pair = (b // 2).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, pair, tl.zeros_like(pair), draw.to(tl.uint32), (draw >> 32).to(tl.uint32))
    even = b % 2 == 0
    return tl.where(even, w0, w2).to(tl.int64), tl.where(even, w1, w3).to(tl.int64)


@triton.jit
def _integer(upper: tl.tensor, lower: tl.tensor, bound: tl.tensor) -> tl.tensor:
    """floor(u * bound) for the 64-bit fraction u."""
    return (upper * bound + ((lower * bound) >> 32)) >> 32


@triton.jit
def _first_above(ascending: tl.tensor, value: tl.tensor, COUNT: tl.constexpr) -> tl.tensor:
    """Binary search: the first place of COUNT ascending int64 numbers above ``value``; the last one is above it."""
    low = tl.zeros_like(value)
    high = low + (COUNT - 1)
    while low < high:
        middle = (low + high) // 2
        above = tl.load(ascending + middle) > value
        low = tl.where(above, low, middle + 1)
        high = tl.where(above, middle, high)
    return low
