"""Critics that an agent was not published with, scalar for FlashSAC and categorical for SAC, against plain loops."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from batches import random_batch

from rlplastic.agents import steps
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.flashsac import update as flashsac_update
from rlplastic.agents.heads import squashed_sample
from rlplastic.agents.sac import SAC
from rlplastic.agents.sac import update as sac_update
from rlplastic.config import CategoricalCriticConfig, FlashSACConfig, SACConfig, ScalarCriticConfig
from rlplastic.envs.base import Step

DIMS, ACTIONS, ROWS, ATOMS, SUPPORT = {"policy": 4}, 2, 6, 9, 5.0


def flashsac() -> FlashSAC:
    config = FlashSACConfig(critic_width=8, actor_width=8, num_blocks=1, gamma=0.99, initial_alpha=0.3)
    return FlashSAC(DIMS, ACTIONS, 3, config, ScalarCriticConfig())


def sac(**settings: Any) -> SAC:
    config = SACConfig(critic_width=8, actor_width=8, gamma=0.99, initial_alpha=0.3, **settings)
    return SAC(DIMS, ACTIONS, 3, config, CategoricalCriticConfig(num_atoms=ATOMS))


def prepared(agent: FlashSAC | SAC) -> tuple[Any, steps.Inputs, torch.Tensor]:
    """The learner in float64 with a target of its own, inputs with weights, noise."""
    learner = agent.learner
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for network in (learner.actor, learner.critic, learner.target_critic):
            network.double()
            for parameter in network.parameters():
                parameter.add_(0.3 * torch.rand(parameter.shape, generator=rng, dtype=torch.float64))
        learner.log_alpha.data = learner.log_alpha.data.double()
    inputs = steps.inputs_of(random_batch(DIMS, ACTIONS, ROWS, 0, kept=0.6), "policy")
    inputs = replace(inputs, weight=torch.linspace(0.2, 1, ROWS))
    inputs = steps.Inputs(**{name: value.double() for name, value in vars(inputs).items()})
    return learner, inputs, torch.randn(ROWS, ACTIONS, generator=rng, dtype=torch.float64)


def test_a_scalar_flashsac_critic_regresses_on_the_smaller_value_in_one_forward_pass() -> None:
    learner, inputs, noise = prepared(flashsac())
    loss, metrics = flashsac_update.critic_loss(
        learner.actor, learner.critic, learner.target_critic, learner.alpha(), inputs, noise
    )
    mean, log_std = learner.actor(inputs.next_observation)
    next_action, log_prob = squashed_sample(mean, log_std, noise)
    both = torch.cat((inputs.observation, inputs.next_observation)), torch.cat((inputs.action, next_action))
    values, next_values = (network(*both, True).detach().numpy() for network in (learner.critic, learner.target_critic))
    assert values.shape == (2, 2 * ROWS)
    total, errors = 0.0, []
    for row in range(ROWS):
        soft = min(next_values[:, ROWS + row]) - float(learner.alpha() * log_prob[row])
        y = float(inputs.reward[row] + inputs.discount[row] * soft)
        total += sum(float(inputs.weight[row]) * (value - y) ** 2 for value in values[:, row]) / (2 * ROWS)
        errors.append(sum(abs(value - y) for value in values[:, row]) / 2)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-9)
    np.testing.assert_allclose(metrics["td_error"], errors, rtol=1e-9)
    assert "value/target_clipped" not in metrics  # there is nothing that could clip


def test_a_categorical_sac_critic_learns_the_projected_target_of_the_member_that_expects_less() -> None:
    learner, inputs, noise = prepared(sac())
    loss, metrics = sac_update.critic_loss(
        learner.actor, learner.critic, learner.target_critic, learner.alpha(), inputs, noise
    )
    mean, log_std = learner.actor(inputs.next_observation)
    next_action, log_prob = squashed_sample(mean, log_std, noise)
    atoms = np.linspace(-SUPPORT, SUPPORT, ATOMS)
    p = torch.softmax(learner.critic(inputs.observation, inputs.action), -1).detach().numpy()
    next_p = torch.softmax(learner.target_critic(inputs.next_observation, next_action), -1).detach().numpy()
    total, errors = 0.0, []
    for row in range(ROWS):
        chosen = min(next_p[:, row], key=lambda mass: mass @ atoms)
        target, mean_target = [0.0] * ATOMS, 0.0
        for k in range(ATOMS):
            soft = atoms[k] - float(learner.alpha() * log_prob[row])
            moved = float(inputs.reward[row]) + float(inputs.discount[row]) * soft
            mean_target += chosen[k] * moved
            at = (min(max(moved, -SUPPORT), SUPPORT) + SUPPORT) / (2 * SUPPORT / (ATOMS - 1))
            lower = min(math.floor(at), ATOMS - 2)
            target[lower] += chosen[k] * (lower + 1 - at)
            target[lower + 1] += chosen[k] * (at - lower)
        for member in range(2):
            entropy = -sum(mass * math.log(q) for mass, q in zip(target, p[member, row], strict=True))
            total += float(inputs.weight[row]) * entropy / (2 * ROWS)
        errors.append(sum(abs(mean_target - p[member, row] @ atoms) for member in range(2)) / 2)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-6)  # atoms are those of float32
    np.testing.assert_allclose(metrics["td_error"], errors, rtol=1e-6)


@pytest.mark.parametrize("name", ["flashsac", "sac"])
def test_their_updates_change_actor_and_critic_and_continue_bit_for_bit(name: str) -> None:
    make = {"flashsac": flashsac, "sac": sac}[name]
    first, second = make(), make()
    batches = [random_batch(DIMS, ACTIONS, ROWS, index, kept=0.6) for index in range(4)]
    before = {entry: tensor.clone() for entry, tensor in first.state_dict().items()}
    for batch in batches[:2]:
        first.update(batch, 0.1)
    state = {entry: tensor.clone() for entry, tensor in first.state_dict().items()}
    assert all(not torch.equal(state[entry], before[entry]) for entry in before if entry.endswith("head.weight"))
    second.load_state_dict(state)
    for batch in batches[2:]:
        for agent in (first, second):
            agent.update(batch, 0.1)
    again = second.state_dict()
    assert all(torch.equal(tensor, again[entry]) for entry, tensor in first.state_dict().items())


def test_rewards_are_scaled_into_the_bounds_that_values_have() -> None:
    """A constant reward has a running return that grows without bounds; it is divided by its largest over 5."""
    reward, flags = np.full(3, 2.0, np.float32), np.zeros(3, bool)
    for agent in (flashsac(), sac(reward_scaling=True)):
        for _ in range(50):
            agent.observe(Step({}, reward, flags, flags, {}), ~flags)
        largest = 2.0 * (1 - 0.99**50) / (1 - 0.99)
        assert float(agent.reward_scale) <= SUPPORT / largest * (1 + 1e-6)
