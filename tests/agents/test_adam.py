"""Adam equals torch's fused Adam bit for bit, and continues from a saved state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlplastic.agents.adam import Adam

SHAPES = [(), (1,), (7,), (2, 3, 5), (64, 33)]


def parameters(device: str = "cpu") -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=rng).to(device)) for shape in SHAPES]


def gradients(step: int, device: str = "cpu") -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(step + 1)
    scale = 10.0 ** (step % 7 - 5)
    return [torch.randn(shape, generator=rng).mul(scale).to(device) for shape in SHAPES]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_equals_torchs_fused_adam_bit_for_bit_whatever_the_rate(device: str) -> None:
    ours, theirs = parameters(device), parameters(device)
    optimizer, oracle = Adam(ours), torch.optim.Adam(theirs, fused=True)
    for step in range(50):
        rate = 3e-4 / (1 + step)
        optimizer.step(gradients(step, device), rate)
        oracle.param_groups[0]["lr"] = rate
        for parameter, gradient in zip(theirs, gradients(step, device), strict=True):
            parameter.grad = gradient
        oracle.step()
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(mine, other), (step, index)
            for name, value in optimizer.state_of(index).items():
                assert torch.equal(value, oracle.state[other][name]), (step, index, name)
    assert optimizer.rate == rate


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_with_weight_decay_it_equals_torchs_fused_adamw_bit_for_bit(device: str) -> None:
    ours, theirs = parameters(device), parameters(device)
    optimizer, oracle = Adam(ours, 0.1), torch.optim.AdamW(theirs, weight_decay=0.1, fused=True)
    for step in range(20):
        optimizer.step(gradients(step, device), 1e-2 / (1 + step))
        oracle.param_groups[0]["lr"] = 1e-2 / (1 + step)
        for parameter, gradient in zip(theirs, gradients(step, device), strict=True):
            parameter.grad = gradient
        oracle.step()
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_it_continues_from_a_saved_state_and_starts_anew_from_an_empty_one() -> None:
    whole, halves = parameters(), parameters()
    optimizer, first = Adam(whole), Adam(halves)
    for step in range(5):
        optimizer.step(gradients(step), 1e-3)
        first.step(gradients(step), 1e-3)
    saved = [{name: value.clone() for name, value in first.state_of(i).items()} for i in range(len(SHAPES))]
    second = Adam(halves)
    second.step(gradients(99), 0.0)
    for index, state in enumerate(saved):
        second.load(index, state)
    for step in range(5, 10):
        optimizer.step(gradients(step), 1e-3)
        second.step(gradients(step), 1e-3)
    assert all(torch.equal(mine, other) for mine, other in zip(whole, halves, strict=True))
    for index in range(len(SHAPES)):
        second.load(index, {})
        assert not any(value.any() for value in second.state_of(index).values())
