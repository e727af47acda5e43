"""Categorical targets: the distribution of r + discount (Z + bonus), projected onto the fixed atoms.

The projection is that of C51 (arXiv 1707.06887, algorithm 1); the target distribution is that of the ensemble member
with the smaller expected value (FlashSAC, arXiv 2604.04539). `categorical_target` is the plain torch reference;
`categorical_target_triton` computes the same in one launch that reads the logits once from memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rlplastic.kernels._triton import tl, triton


def project_categorical(probabilities: Tensor, targets: Tensor, support: float) -> Tensor:
    """Distribute the mass at moved atoms onto the fixed ones.

    Args:
        probabilities: (B, K) mass of each atom.
        targets: (B, K) where each atom moved to; clipped to [-support, support].
        support: the fixed atoms are linspace(-support, support, K).

    Returns:
        (B, K): each mass split linearly between the two neighbouring fixed atoms; rows with a NaN hold a NaN.
    """
    last = probabilities.shape[-1] - 1
    position = (targets.clamp(-support, support) + support) * (last / (2 * support))
    position = position.clamp(0, last)
    lower = position.floor().clamp(max=last - 1)
    upper_share = position - lower
    # A NaN must reach the loss, where it is named, and not end here as an index out of range.
    index = lower.nan_to_num().long()
    projected = torch.zeros_like(probabilities)
    projected.scatter_add_(-1, index, probabilities * (1 - upper_share))
    return projected.scatter_add_(-1, index + 1, probabilities * upper_share)


def categorical_target(
    logits: Tensor, reward: Tensor, discount: Tensor, bonus: Tensor, atoms: Tensor, support: float
) -> tuple[Tensor, Tensor]:
    """Target distribution and its mean, from the member of the target critic that expects less.

    Args:
        logits: (M, B, K) of the target critic's members at the next state.
        reward: (B,), scaled.
        discount: (B,) in [0, 1], 0 if terminated.
        bonus: (B,) entropy bonus -alpha log pi of the next action.
        atoms: (K,) the fixed atoms, linspace(-support, support, K).
        support: the largest atom.

    Returns:
        The target (B, K), and the mean (B,) of the moved atoms before they are clipped. A NaN in a row's inputs
        gives a NaN in both of that row's results.
    """
    probabilities = F.softmax(logits, -1)
    smaller = (probabilities * atoms).sum(-1).argmin(0)
    probability = probabilities.gather(0, smaller.view(1, -1, 1).expand(1, -1, len(atoms)))[0]
    moved = reward.unsqueeze(-1) + discount.unsqueeze(-1) * (atoms + bonus.unsqueeze(-1))
    return project_categorical(probability, moved, support), (probability * moved).sum(-1)


@triton.jit
def _moved(atom: tl.tensor, reward: tl.tensor, discount: tl.tensor, bonus: tl.tensor) -> tl.tensor:
    return reward + discount * (atom + bonus)


@triton.jit
def _position(moved: tl.tensor, support: float, scale: float, last: tl.constexpr) -> tl.tensor:
    """Where a moved atom lies between the fixed ones, in [0, last]; the same roundings as `project_categorical`."""
    clipped = tl.minimum(tl.maximum(moved, -support), support)
    return tl.minimum(tl.maximum((clipped + support) * scale, 0.0), last + 0.0)


@triton.jit(do_not_specialize_on_alignment=["atoms_ptr"])  # or Triton would spread the unaligned rows for its sake
def categorical_target_kernel(
    logits_ptr: tl.tensor,
    member_stride: int,
    row_stride: int,
    reward_ptr: tl.tensor,
    discount_ptr: tl.tensor,
    bonus_ptr: tl.tensor,
    atoms_ptr: tl.tensor,
    target_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    support: float,
    scale: float,
    MEMBERS: tl.constexpr,
    ATOMS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row per program. Gathers instead of scattering, so that no two threads add to one atom.

    Unclipped positions are u_i = u_0 + discount i: the sources within one atom of j are the few i around
    (j - u_0) / discount, read again (they are in the L1 cache by then). What is clipped to an end is summed apart.
    """
    row = tl.program_id(0).to(tl.int64)
    last: tl.constexpr = ATOMS - 1
    j = tl.arange(0, BLOCK)
    inside = j < ATOMS
    atoms = tl.load(atoms_ptr + j, mask=inside, other=0.0)
    reward = tl.load(reward_ptr + row)
    discount = tl.load(discount_ptr + row)
    bonus = tl.load(bonus_ptr + row)

    logits_ptr += row * row_stride
    chosen = 0
    for member in tl.static_range(MEMBERS):
        x = tl.load(logits_ptr + member * member_stride + j, mask=inside, other=-float("inf"))
        top = tl.max(x, 0)
        e = tl.exp(x - top)
        total = tl.sum(e, 0)
        p = e / total
        value = tl.sum(p * atoms, 0)
        if member == 0:
            p_chosen, value_chosen, top_chosen, total_chosen = p, value, top, total
        else:
            take = (value < value_chosen) | (value != value)  # as torch's argmin: a NaN is the smallest
            p_chosen = tl.where(take, p, p_chosen)
            value_chosen = tl.where(take, value, value_chosen)
            top_chosen = tl.where(take, top, top_chosen)
            total_chosen = tl.where(take, total, total_chosen)
            chosen = tl.where(take, member, chosen)
    logits_ptr += chosen * member_stride

    moved = _moved(atoms, reward, discount, bonus)
    moved = tl.where(inside, moved, 0.0)
    tl.store(mean_ptr + row, tl.sum(p_chosen * moved, 0))
    position = _position(moved, support, scale, last)
    low = tl.sum(tl.where(inside & (position <= 0), p_chosen, 0.0), 0)
    high = tl.sum(tl.where(inside & (position >= last), p_chosen, 0.0), 0)
    target = tl.where(j == 0, low, 0.0) + tl.where(j == last, high, 0.0)

    # An open interval of length 2 / discount, plus one for rounding; all sources where that is no less.
    windowed = discount * (ATOMS - 3) > 2.0
    spacing = tl.where(windowed, discount, 1.0)
    steps = tl.where(windowed, tl.ceil(2.0 / spacing) + 2.0, ATOMS + 0.0).to(tl.int32)
    origin = (_moved(-support, reward, discount, bonus) + support) * scale
    first = tl.minimum(tl.maximum(tl.floor((j - 1 - origin) / spacing), -ATOMS), ATOMS)
    i = tl.where(windowed & (origin == origin), first, 0.0).to(tl.int32)
    for _ in range(steps):
        source = inside & (i >= 0) & (i < ATOMS)
        x = tl.load(logits_ptr + i, mask=source, other=-float("inf"))
        atom = tl.load(atoms_ptr + i, mask=source, other=0.0)
        at = _position(_moved(atom, reward, discount, bonus), support, scale, last)
        share = tl.where((at > 0) & (at < last), 1.0 - tl.abs(at - j), 0.0)
        target += tl.exp(x - top_chosen) / total_chosen * tl.maximum(share, 0.0)
        i += 1

    broken = (value_chosen != value_chosen) | (origin != origin)  # if one moved atom is a NaN, all are
    tl.store(target_ptr + row * ATOMS + j, tl.where(broken, float("nan"), target), mask=inside)


@torch.library.custom_op("rlplastic::categorical_target", mutates_args=())  # so that a compiled loss can call it
def categorical_target_triton(
    logits: Tensor, reward: Tensor, discount: Tensor, bonus: Tensor, atoms: Tensor, support: float
) -> tuple[Tensor, Tensor]:
    """`categorical_target` in one launch: float32, without gradients; a row with a NaN holds nothing else."""
    members, rows, count = logits.shape
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    target, mean = logits.new_empty(rows, count), logits.new_empty(rows)
    categorical_target_kernel[(rows,)](
        logits,
        logits.stride(0),
        logits.stride(1),
        reward.contiguous(),
        discount.contiguous(),
        bonus.contiguous(),
        atoms,
        target,
        mean,
        support,
        (count - 1) / (2 * support),
        MEMBERS=members,
        ATOMS=count,
        BLOCK=triton.next_power_of_2(count),
        num_warps=1,
        enable_fp_fusion=False,  # positions round as in the reference: next to an atom that decides who gets the mass
    )
    return target, mean


@categorical_target_triton.register_fake
def _shapes(
    logits: Tensor, reward: Tensor, discount: Tensor, bonus: Tensor, atoms: Tensor, support: float
) -> tuple[Tensor, Tensor]:
    _, rows, count = logits.shape
    return logits.new_empty(rows, count), logits.new_empty(rows)
