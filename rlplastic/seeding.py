"""Randomness that leaves no state behind: every draw is a pure function of (seed, stream, step).

Two kinds. `key` hashes names and numbers to an integer seed, for generators that are re-seeded before each use
(`generator`) and for the environments' construction seeds. `philox` is the counter-based generator Philox4x32-10
(Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): the same words on every device and in every
kernel, used for replay indices. Only what makes tensors imports torch, so that a policy can be played without it.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def key(*parts: str | int, bits: int = 63) -> int:
    """A non-negative integer below ``2**bits`` that depends on every part, in order; equal parts give equal keys."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & ((1 << bits) - 1)


def environment_seeds(seed: int, role: str, rank: int, num_envs: int, rebuild: int) -> list[int]:
    """One 31-bit construction seed per environment; ``role`` is ``"train"`` or ``"eval"``.

    Hashing keeps neighbouring seeds apart: with seed + i, run 0 and run 1 would share all environments but one.
    """
    return [key("environment", seed, role, rank, index, rebuild, bits=31) for index in range(num_envs)]


def generator(device: torch.device | str, seed: int, stream: str, step: int) -> torch.Generator:
    """A torch generator at the start of the stream named ``(seed, stream, step)``."""
    import torch

    return torch.Generator(device=device).manual_seed(key(seed, stream, step))


def philox(counter: Tensor, high: Tensor | int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of the 128-bit counters ``(counter, high)`` under the 64-bit key ``seed``.

    Args:
        counter: int64, the low 64 bits of each counter (bits above 2**63 as the sign).
        high: the upper 64 bits, non-negative; a tensor is broadcast against ``counter``.
        seed: the key.

    Returns:
        Four int64 tensors of the common shape, each a word in [0, 2**32).
    """
    if not isinstance(high, int):
        counter = counter + high.new_zeros(high.shape)
    zeros = counter.new_zeros(counter.shape)
    first, second = counter & _MASK, (counter >> 32) & _MASK  # the shift carries the sign bit along
    third, fourth = zeros + (high & _MASK), zeros + (high >> 32)
    low_key, high_key = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # The products wrap modulo 2**64, which keeps all their bits; upper halves go with the next round's mask.
        left, right = first * _MULTIPLIERS[0], third * _MULTIPLIERS[1]
        first = (right >> 32).bitwise_xor_(second).bitwise_xor_(low_key).bitwise_and_(_MASK)
        third = (left >> 32).bitwise_xor_(fourth).bitwise_xor_(high_key).bitwise_and_(_MASK)
        second, fourth = right, left
        low_key, high_key = (low_key + _WEYL[0]) & _MASK, (high_key + _WEYL[1]) & _MASK
    return first, second & _MASK, third, fourth & _MASK


def uniform_words(count: int, high: Tensor | int, seed: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """``count`` 64-bit fractions as upper and lower 32-bit words, a function of ``(high, seed)`` alone.

    Both are int64 (count,), or (D, count) with ``high`` (D, 1).
    """
    import torch

    pairs = (count + 1) // 2
    words = philox(torch.arange(pairs, device=device), high, seed)
    upper = torch.stack((words[0], words[2]), -1).flatten(-2)[..., :count]
    lower = torch.stack((words[1], words[3]), -1).flatten(-2)[..., :count]
    return upper, lower


def uniform_integers(count: int, bound: Tensor | int, high: int, seed: int, device: torch.device | str) -> Tensor:
    """``count`` int64 integers in [0, bound), a function of ``(high, seed)`` alone.

    A 64-bit fraction u is mapped to floor(u * bound / 2**64), which is uniform to within one part in
    2**64 / bound. ``bound`` (below 2**31) may be a tensor on ``device``: then nothing synchronises with the host.
    """
    upper, lower = uniform_words(count, high, seed, device)
    return (upper * bound + ((lower * bound) >> 32)) >> 32
