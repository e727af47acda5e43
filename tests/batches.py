"""Batches of random numbers, for agents."""

from __future__ import annotations

from dataclasses import replace

import torch

from rlplastic.replay.sample import Batch


def random_batch(dims: dict[str, int], actions: int, rows: int, index: int, kept: float) -> Batch:
    """One that depends on ``index``; a share ``kept`` of its rows does not terminate, and the discount is 0.99."""
    rng = torch.Generator().manual_seed(1000 + index)

    def groups() -> dict[str, torch.Tensor]:
        return {name: torch.randn(rows, dim, generator=rng) for name, dim in dims.items()}

    return Batch(
        observation=groups(),
        action=torch.rand(rows, actions, generator=rng) * 2 - 1,
        reward=torch.randn(rows, generator=rng),
        discount=0.99 * (torch.rand(rows, generator=rng) < kept).float(),
        next_observation=groups(),
        rows=torch.zeros(rows, dtype=torch.int64),
    )


def on_gpu(batch: Batch) -> Batch:
    """The same batch there."""
    return replace(
        batch,
        **{name: getattr(batch, name).cuda() for name in ("action", "reward", "discount", "rows")},
        observation={name: value.cuda() for name, value in batch.observation.items()},
        next_observation={name: value.cuda() for name, value in batch.next_observation.items()},
    )
