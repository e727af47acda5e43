"""What is read of an agent equals what its own update computes, and reading leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import random_batch
from torch import Tensor

from rlplastic import seeding
from rlplastic.agents import subjects as reading
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.flashsac import update as flashsac_update
from rlplastic.agents.layers import BatchNorm
from rlplastic.agents.sac import SAC
from rlplastic.agents.sac import update as sac_update
from rlplastic.config import (
    CategoricalCriticConfig,
    FlashSACConfig,
    FlowCriticConfig,
    SACConfig,
    ScalarCriticConfig,
)
from rlplastic.plasticity import measure, snapshot, uninformative

DIMS = {"policy": 4, "critic": 6}
ACTIONS, ENVS, ROWS, WIDTH, GAMMA = 2, 3, 40, 8, 0.99
AGENTS = ["flashsac", "flashsac scalar", "flashsac flow", "sac", "sac with layer norm", "sac categorical", "sac flow"]
CRITICS = {
    "scalar": ScalarCriticConfig(),
    "categorical": CategoricalCriticConfig(num_atoms=11),
    "flow": FlowCriticConfig(steps=3, noises=4),
}


def agent_of(name: str, updates: int = 5) -> Any:
    """A small agent that has learned a little, so that its target and running statistics are no longer the first."""
    who, _, critic = name.partition(" ")
    if who == "flashsac":
        flash = FlashSACConfig(critic_width=WIDTH, actor_width=WIDTH, gamma=GAMMA, num_blocks=1)
        agent: Any = FlashSAC(DIMS, ACTIONS, ENVS, flash, CRITICS.get(critic, CRITICS["categorical"]))
    else:
        sizes: dict[str, Any] = {"critic_width": WIDTH, "actor_width": WIDTH, "gamma": GAMMA}
        plain = SACConfig(**sizes, initial_alpha=1.0, layer_norm=name.endswith("norm"))
        agent = SAC(DIMS, ACTIONS, ENVS, plain, CRITICS.get(critic, CRITICS["scalar"]))
    for index in range(updates):
        agent.update(random_batch(DIMS, ACTIONS, ROWS, index, kept=0.7), 0.0)
    return agent


def inputs_for(agent: Any, index: int = 99) -> reading.Inputs:
    return reading.inputs_of(agent, random_batch(DIMS, ACTIONS, ROWS, index, kept=0.7))


def noise_of_measurements() -> Tensor:
    return torch.randn(ROWS, ACTIONS, generator=seeding.generator("cpu", 0, "noise of measurements", 0))


@pytest.fixture
def running_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norms that use running statistics whatever they are asked for."""
    forward = BatchNorm.forward
    monkeypatch.setattr(
        BatchNorm, "forward", lambda self, x, _, *rest, **named: forward(self, x, False, *rest, **named)
    )


@pytest.mark.usefixtures("running_statistics")
@pytest.mark.parametrize("name", AGENTS)
def test_losses_are_those_of_the_update_with_running_statistics(name: str) -> None:
    agent = agent_of(name)
    learner, inputs = agent.learner, inputs_for(agent)
    update: Any = flashsac_update if name.startswith("flashsac") else sac_update
    loss, noise = update.critic_loss, noise_of_measurements()
    if name.endswith("flow"):
        learner.critic.distilled = None
        rng = seeding.generator("cpu", 0, "noise of measurements", 0)
        loss, noise = update.flow_critic_loss, learner.critic.noise(ROWS, ACTIONS, rng)
    networks = learner.actor, learner.critic, learner.target_critic
    expected = loss(*networks, learner.alpha(), inputs, noise)[0]
    losses = reading.td_losses(agent, inputs)
    assert losses.shape == (ROWS,)
    torch.testing.assert_close(losses.mean(), expected)
    asked = torch.autograd.grad(losses.mean(), list(learner.critic.parameters()))
    torch.testing.assert_close(asked, torch.autograd.grad(expected, list(learner.critic.parameters())))


@pytest.mark.usefixtures("running_statistics")
@pytest.mark.parametrize("name", AGENTS)
def test_the_policys_loss_is_that_of_the_update_with_running_statistics(name: str) -> None:
    agent = agent_of(name)
    learner, inputs = agent.learner, inputs_for(agent)
    update, noise = sac_update.actor_loss, noise_of_measurements()
    if name.startswith("flashsac"):
        update, noise = flashsac_update.actor_loss, torch.cat((noise, torch.zeros(ROWS, ACTIONS)))  # type: ignore[assignment]
    expected = update(learner.actor, learner.critic, learner.alpha(), inputs, noise)[0]
    torch.testing.assert_close(reading.policy_loss(agent, inputs), expected)


def test_the_target_of_a_terminated_transition_is_its_reward() -> None:
    for name in AGENTS:
        agent = agent_of(name)
        inputs = inputs_for(agent)
        ended = inputs.discount == 0
        assert 0 < ended.sum() < ROWS
        targets = reading.td_targets(agent, inputs)
        torch.testing.assert_close(targets[ended], inputs.reward[ended])
        assert not torch.equal(targets[~ended], inputs.reward[~ended])


@pytest.mark.parametrize("name", AGENTS)
def test_every_tier_can_be_measured_and_leaves_the_agent_as_it_was(name: str) -> None:
    agent = agent_of(name)
    inputs = inputs_for(agent)
    before = {key: value.clone() for key, value in agent.state_dict().items()}
    state = torch.random.get_rng_state()
    micro = [reading.rows_of(inputs, 4 * index, 4 * index + 4) for index in range(8)]
    samples = [reading.rows_of(inputs, index, index + 1) for index in range(8)]
    found = {}
    for subject in reading.subjects(agent).values():
        for tier in ("forward", "ranks", "expensive"):
            found |= measure(subject, inputs, tier, micro_batches=micro, samples=samples)  # type: ignore[arg-type]
    reading.held_out_td_error(agent, inputs, inputs_for(agent, 98))
    assert all(value == value for value in found.values())
    for who in ("actor", "critic"):
        names = {key.rsplit("/", 1)[-1] for key in found if key.startswith(f"plasticity/{who}/")}
        assert {"dormant", "effective_rank", "gradient_dormant", "sharpness", "entk_rank"} <= names
    after = agent.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in agent.learner.critic.parameters())


def test_ranks_are_of_what_the_heads_read() -> None:
    for name in AGENTS:
        agent = agent_of(name)
        inputs = inputs_for(agent)
        critic = reading.subjects(agent)["critic"]
        assert critic.rank_layers is not None
        features = critic.read(inputs)[critic.rank_layers[0]].values
        if name.endswith("flow"):
            assert features.shape == (2, 4 * ROWS, WIDTH)  # a row for each noise
            continue
        if name.startswith("flashsac"):
            x = torch.cat((inputs.critic_observation, inputs.action), -1)
            expected = agent.learner.critic.trunk(x.mT, False).mT
        else:
            expected = agent.learner.critic.trunk(torch.cat((inputs.critic_observation, inputs.action), -1))
        torch.testing.assert_close(features, expected.detach())
        assert features.shape == (2, ROWS, WIDTH)


def test_bounded_networks_say_which_metrics_are_flat_and_plain_ones_have_weights_that_grow() -> None:
    for name, flat in (("flashsac", True), ("sac", False)):
        agent = agent_of(name)
        subject = reading.subjects(agent)["critic"]
        found = measure(subject, inputs_for(agent), "forward", previous=None)
        assert ("plasticity/critic/all/weight_norm" in uninformative(subject, found)) is flat
        assert snapshot(subject.module).keys() == dict(subject.module.named_parameters()).keys()


def test_the_gap_is_what_a_critic_that_learned_its_batch_by_heart_lacks_outside() -> None:
    agent = agent_of("sac", updates=0)
    batch = random_batch(DIMS, ACTIONS, ROWS, 0, kept=0.7)
    for _ in range(400):
        agent.update(batch, 0.0)
    inside, outside = reading.inputs_of(agent, batch), inputs_for(agent)
    found = reading.held_out_td_error(agent, outside, inside)
    assert found.held_out == pytest.approx(reading.td_losses(agent, outside).mean().item())
    assert found.gap == pytest.approx(found.held_out - reading.td_losses(agent, inside).mean().item())
    assert found.gap > 0


def test_copies_of_a_batch_outlive_the_samplers_next_call() -> None:
    agent = agent_of("sac", updates=0)
    batch = random_batch(DIMS, ACTIONS, ROWS, 0, kept=0.7)
    kept = reading.inputs_of(agent, batch)
    reward = batch.reward.clone()
    batch.reward.zero_()
    assert torch.equal(kept.reward, reward)
