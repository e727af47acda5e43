"""Noise in the targets of training: what it adds, for critics of every kind, and that it is the run's own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from batches import random_batch

from rlplastic import seeding
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.sac import SAC
from rlplastic.config import CategoricalCriticConfig, FlashSACConfig, FlowCriticConfig, SACConfig, ScalarCriticConfig

DIMS, ACTIONS, ROWS, SEED = {"policy": 4}, 2, 200, 3
CRITICS = {
    "flow": lambda noise: FlowCriticConfig(steps=2, noises=2, target_noise=noise),
    "categorical": lambda noise: CategoricalCriticConfig(num_atoms=11, target_noise=noise),
    "scalar": lambda noise: ScalarCriticConfig(target_noise=noise),
}
EACH = pytest.mark.parametrize("critic", list(CRITICS))
BOTH = pytest.mark.parametrize("name", ["flashsac", "sac"])


def agent_of(name: str, critic: str, noise: float) -> FlashSAC | SAC:
    common = {"critic_width": 8, "actor_width": 8, "gamma": 0.99}
    settings = CRITICS[critic](noise)
    if name == "flashsac":
        return FlashSAC(DIMS, ACTIONS, 2, FlashSACConfig(num_blocks=1, **common), settings, seed=SEED)
    return SAC(DIMS, ACTIONS, 2, SACConfig(**common, initial_alpha=1.0), settings, seed=SEED)


def uniform(update: int) -> torch.Tensor:
    """U[-1, 1] of the stream of an update."""
    return 2 * torch.rand(ROWS, generator=seeding.generator("cpu", SEED, "target noise", update)) - 1


@BOTH
@EACH
def test_a_target_moves_by_its_noise_and_every_update_has_its_own(name: str, critic: str) -> None:
    plain, noisy = agent_of(name, critic, 0.0), agent_of(name, critic, 0.5)
    batch = random_batch(DIMS, ACTIONS, ROWS, 0, kept=0.7)
    without, with_noise = (agent.update(batch, 0.0)["value/target_mean"] for agent in (plain, noisy))
    assert float(uniform(0).abs().max()) > 0.9 and float(uniform(0).std()) == pytest.approx(3**-0.5, abs=0.05)
    assert float(with_noise - without) == pytest.approx(0.5 * float(uniform(0).mean()), abs=1e-5)
    assert not torch.equal(uniform(0), uniform(1))


@BOTH
@EACH
def test_two_updates_are_bit_for_bit_those_on_rewards_with_that_noise(name: str, critic: str) -> None:
    by_hand, noisy = agent_of(name, critic, 0.0), agent_of(name, critic, 0.5)
    for index in range(2):
        batch = random_batch(DIMS, ACTIONS, ROWS, index, kept=0.7)
        noisy.update(batch, 0.0)
        by_hand.update(replace(batch, reward=batch.reward + 0.5 * uniform(index)), 0.0)
    expected = by_hand.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in noisy.state_dict().items())


def test_a_branch_has_the_noise_of_the_agent_that_it_left() -> None:
    agent = agent_of("sac", "scalar", 0.5)
    twin = agent.branch()
    batch = random_batch(DIMS, ACTIONS, ROWS, 0, kept=0.7)
    agent.update(batch, 0.0), twin.update(batch, 0.0)
    expected = agent.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in twin.state_dict().items())
