"""What optimizers remember: found, forgotten wholly or under a mask, and taken back bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rlplastic.agents.adam import Adam
from rlplastic.errors import ConfigurationError
from rlplastic.plasticity.optimizers import (
    Optimizer,
    check_complete,
    forget,
    remembered,
    restore_memory,
    saved_memory,
)

RATE = 1e-2
MAKERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "ours": Adam,
    "Adam": lambda p: torch.optim.Adam(p, RATE),
    "AMSGrad": lambda p: torch.optim.Adam(p, RATE, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, RATE),
    "SGD": lambda p: torch.optim.SGD(p, RATE, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, RATE, momentum=0.9, centered=True),
}


def parameters() -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=rng)) for shape in ((3, 4), (3,))]


def step(optimizer: Optimizer, mine: list[nn.Parameter], index: int) -> None:
    rng = torch.Generator().manual_seed(index)
    gradients = [torch.randn(p.shape, generator=rng) for p in mine]
    if isinstance(optimizer, Adam):
        optimizer.step(gradients, RATE)
        return
    for parameter, gradient in zip(mine, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", MAKERS)
def test_a_parameter_that_is_wholly_forgotten_moves_as_with_a_new_optimizer(name: str) -> None:
    old, new = parameters(), parameters()
    optimizer = MAKERS[name](old)
    for index in range(7):
        step(optimizer, old, index)
    with torch.no_grad():
        old[0].copy_(new[0])
    forget(optimizer, old[0])
    untouched = old[1].detach().clone(), remembered(optimizer, old[1])
    assert any(value.any() for value in untouched[1].values())
    fresh = MAKERS[name](new)
    for index in range(7, 10):
        step(optimizer, old, index)
        step(fresh, new, index)
    torch.testing.assert_close(old[0], new[0], rtol=0, atol=1e-7)
    assert not torch.equal(old[1], new[1])


@pytest.mark.parametrize("name", MAKERS)
def test_under_a_mask_only_its_moments_go_and_the_step_stays(name: str) -> None:
    mine = parameters()
    optimizer = MAKERS[name](mine)
    for index in range(3):
        step(optimizer, mine, index)
    before = {slot: value.clone() for slot, value in remembered(optimizer, mine[0]).items()}
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1] = True
    forget(optimizer, mine[0], mask)
    for slot, value in remembered(optimizer, mine[0]).items():
        if slot == "step":
            assert torch.equal(value, before[slot])
        else:
            assert not value[1].any()
            assert torch.equal(value[[0, 2]], before[slot][[0, 2]]) and value[0].any()


def test_adams_moves_after_a_masked_reset_miss_their_bias_correction_by_the_closed_form() -> None:
    mine = [nn.Parameter(torch.zeros(2))]
    optimizer = torch.optim.Adam(mine, RATE, eps=1e-15)
    mine[0].grad = torch.ones(2)
    optimizer.step()
    for slot, value in {"step": 1e6, "exp_avg": 1.0, "exp_avg_sq": 1.0}.items():  # long after both corrections are 1
        optimizer.state[mine[0]][slot].fill_(value)
    forget(optimizer, mine[0], torch.tensor([True, False]))
    largest = 0.0
    for k in range(1, 40):
        before = mine[0].detach().clone()
        mine[0].grad = torch.ones(2)
        optimizer.step()
        moved = (before - mine[0].detach()) / RATE
        factor = (1 - 0.9**k) / (1 - 0.999**k) ** 0.5
        assert float(moved[0]) == pytest.approx(factor, rel=1e-4)
        assert float(moved[1]) == pytest.approx(1, rel=1e-4)
        largest = max(largest, factor)
    assert pytest.approx(3.16, abs=0.01) == (1 - 0.9) / (1 - 0.999) ** 0.5
    assert largest == pytest.approx(6.57, abs=0.02)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("started", [False, True])
def test_memory_is_taken_back_bit_for_bit_in_place(name: str, started: bool) -> None:
    mine = parameters()
    optimizer = MAKERS[name](mine)
    if started:
        step(optimizer, mine, 0)
    saved = saved_memory(optimizer)
    places = [{slot: v.data_ptr() for slot, v in remembered(optimizer, p).items()} for p in mine]
    weights = [p.detach().clone() for p in mine]

    def three_steps() -> list[Tensor]:
        with torch.no_grad():
            for parameter, weight in zip(mine, weights, strict=True):
                parameter.copy_(weight)
        for index in range(1, 4):
            step(optimizer, mine, index)
        return [p.detach().clone() for p in mine]

    first = three_steps()
    restore_memory(optimizer, saved)
    if started:
        assert places == [{slot: v.data_ptr() for slot, v in remembered(optimizer, p).items()} for p in mine]
    assert all(torch.equal(a, b) for a, b in zip(first, three_steps(), strict=True))


def test_an_optimizer_that_leaves_a_trainable_parameter_out_is_refused_by_name() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match="'bias'"):
        check_complete(torch.optim.SGD([net.weight], 0.1), net.named_parameters())
    net.bias.requires_grad_(False)
    check_complete(torch.optim.SGD([net.weight], 0.1), net.named_parameters())


def test_memories_that_do_not_start_at_zero_are_refused() -> None:
    mine = parameters()
    optimizer = torch.optim.Rprop(mine)
    step(optimizer, mine, 0)
    with pytest.raises(ConfigurationError, match="Rprop remembers"):
        forget(optimizer, mine[0])
    with pytest.raises(ConfigurationError, match="does not move"):
        remembered(Adam(mine), parameters()[0])
