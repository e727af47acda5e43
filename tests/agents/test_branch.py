"""A branch learns what the agent would, bit for bit and beside it, and the agent can take it over in place."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from batches import random_batch

from rlplastic.acceleration import compiled
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.sac import SAC
from rlplastic.config import CategoricalCriticConfig, FlashSACConfig, SACConfig, ScalarCriticConfig

DIMS = {"policy": 4, "critic": 6}
ACTIONS, ENVS, ROWS = 2, 3, 16
AGENTS = ["flashsac", "sac"]


def agent_of(name: str) -> Any:
    if name == "sac":
        plain = SACConfig(critic_width=8, actor_width=8, gamma=0.99, initial_alpha=1.0, weight_decay=0.01)
        return SAC(DIMS, ACTIONS, ENVS, plain, ScalarCriticConfig())
    flash = FlashSACConfig(critic_width=8, actor_width=8, gamma=0.99, num_blocks=1)
    return FlashSAC(DIMS, ACTIONS, ENVS, flash, CategoricalCriticConfig(num_atoms=11))


def learn(agent: Any, start: int, stop: int) -> None:
    for index in range(start, stop):
        agent.update(random_batch(DIMS, ACTIONS, ROWS, index, kept=0.8), index / 100)


def state(agent: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in agent.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("name", AGENTS)
def test_a_branch_without_intervention_stays_equal_to_the_agent_over_fifty_updates(name: str) -> None:
    agent, alone = agent_of(name), agent_of(name)
    learn(agent, 0, 5), learn(alone, 0, 5)
    branch = agent.branch()
    for index in range(5, 55):
        learn(agent, index, index + 1)
        learn(branch, index, index + 1)
    assert same(state(branch), state(agent))
    learn(alone, 5, 55)
    assert same(state(alone), state(agent)), "the branch changed the agent"


@pytest.mark.parametrize("name", AGENTS)
def test_a_branch_shares_no_parameter_and_its_updates_leave_the_agent_alone(name: str) -> None:
    agent = agent_of(name)
    learn(agent, 0, 3)
    branch, before = agent.branch(), state(agent)
    learn(branch, 3, 8)
    assert same(state(agent), before)
    assert agent.updates == 3 and branch.updates == 8
    for network, other in zip(agent.modules.values(), branch.modules.values(), strict=True):
        assert not {p.data_ptr() for p in network.parameters()} & {p.data_ptr() for p in other.parameters()}
    assert branch.learner.critic_gradient is agent.learner.critic_gradient


@pytest.mark.parametrize("name", AGENTS)
def test_what_a_branch_learned_is_taken_over_in_place_and_then_goes_on_alike(name: str) -> None:
    agent = agent_of(name)
    learn(agent, 0, 3)
    branch = agent.branch()
    with torch.no_grad():
        for parameter in branch.learner.critic.parameters():
            parameter.mul_(0.5)
    learn(agent, 3, 6), learn(branch, 3, 6)
    assert not same(state(agent), state(branch))
    places = [parameter.data_ptr() for network in agent.modules.values() for parameter in network.parameters()]
    agent.load_learned_state(branch.learned_state())
    assert places == [p.data_ptr() for network in agent.modules.values() for p in network.parameters()]
    learn(agent, 6, 16), learn(branch, 6, 16)
    assert same(state(agent), state(branch))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_branch_runs_through_the_compiled_losses_of_its_agent_and_compiles_nothing_anew() -> None:
    plain = SACConfig(critic_width=8, actor_width=8, gamma=0.99, initial_alpha=1.0)

    agent, alone = (SAC(DIMS, ACTIONS, ENVS, plain, ScalarCriticConfig(), compile=compiled) for _ in range(2))
    learn(agent, 0, 3), learn(alone, 0, 3)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    branch = agent.branch()
    learn(agent, 3, 8), learn(branch, 3, 8), learn(alone, 3, 8)
    assert same(state(branch), state(agent)) and same(state(agent), state(alone))
    agent.load_learned_state(branch.learned_state())
    learn(agent, 8, 10), learn(alone, 8, 10)
    assert same(state(agent), state(alone))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
