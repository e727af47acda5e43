"""Learning over ranks: the same bits on all of them, the statistics of the whole batch, one message per step."""

from __future__ import annotations

import threading
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from batches import random_batch
from ranks import Threads, succeed

from rlplastic.agents import steps, subjects
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.layers import BatchNorm
from rlplastic.agents.pooling import normalise_over_ranks, reduction
from rlplastic.agents.reward_scaling import RewardScaler
from rlplastic.agents.sac import SAC
from rlplastic.agents.steps import Inputs
from rlplastic.config import CategoricalCriticConfig, FlashSACConfig, SACConfig, ScalarCriticConfig
from rlplastic.distributed import ALONE, Group
from rlplastic.kernels.batch_norm import normalise

DIMS, ACTIONS, ENVS, ROWS = {"policy": 5, "critic": 7}, 2, 4, 32
BUILDING = threading.Lock()
"""Networks are initialised from torch's global generator."""
Agent = FlashSAC | SAC
A = TypeVar("A", bound=Agent)


def agent_of(name: str, group: Group = ALONE, bn_sync: str = "running") -> Agent:
    common: dict[str, Any] = {"seed": 3, "group": group, "bn_sync": bn_sync}
    with BUILDING:
        if name == "sac":
            return SAC(
                DIMS,
                ACTIONS,
                ENVS,
                SACConfig(critic_width=16, actor_width=16, gamma=0.99, initial_alpha=1.0),
                ScalarCriticConfig(),
                **common,
            )
        settings = FlashSACConfig(critic_width=16, actor_width=8, gamma=0.99)
        return FlashSAC(DIMS, ACTIONS, ENVS, settings, CategoricalCriticConfig(num_atoms=11), **common)


def update_of(index: int) -> tuple[Inputs, torch.Tensor, torch.Tensor]:
    """A batch of all ranks with its noise, for the actor on [s; s'] and for a'."""
    rng = torch.Generator().manual_seed(index)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    inputs = Inputs(
        observation=normal(ROWS, 5) * 2 + 1,
        next_observation=normal(ROWS, 5) * 2 + 1,
        critic_observation=normal(ROWS, 7) - 3,
        next_critic_observation=normal(ROWS, 7) - 3,
        action=normal(ROWS, ACTIONS).tanh(),
        reward=normal(ROWS),
        discount=torch.full((ROWS,), 0.99),
    )
    return inputs, normal(2, ROWS, ACTIONS), normal(ROWS, ACTIONS)


def moved(agent: A, updates: int, group: Group = ALONE) -> A:
    """After updates on this rank's rows of every batch."""
    rows = slice(group.rank * ROWS // group.size, (group.rank + 1) * ROWS // group.size)
    for index in range(updates):
        inputs, actor_noise, target_noise = update_of(index)
        mine = replace(inputs, **{f.name: getattr(inputs, f.name)[rows] for f in fields(inputs) if f.name != "weight"})
        noise = actor_noise[: agent.ACTOR_ROWS, rows].reshape(-1, ACTIONS) if agent.actor_is_due else None
        agent.update_with(mine, noise, target_noise[rows], 0.0)
    return agent


def learned(agent: Agent) -> dict[str, torch.Tensor]:
    return {name: value for name, value in agent.state_dict().items() if name not in agent.COLUMNS}


@pytest.mark.parametrize(
    ("name", "bn_sync"),
    [("flashsac", "running"), pytest.param("flashsac", "forward", marks=pytest.mark.slow), ("sac", "running")],
)
def test_ranks_are_identical_bit_for_bit_after_two_hundred_updates(name: str, bn_sync: str) -> None:
    first, second = succeed(2, lambda group: learned(moved(agent_of(name, group, bn_sync), 200, group)))
    assert all(torch.equal(first[name], second[name]) for name in first)
    untouched = learned(agent_of(name))
    assert not any(torch.equal(first[entry], untouched[entry]) for entry in first if entry.endswith("weight"))


@pytest.mark.parametrize("bn_sync", ["running", "forward"])
def test_a_branch_learns_what_its_original_does_on_all_ranks(bn_sync: str) -> None:
    def learn(group: Threads) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        agent = moved(agent_of("flashsac", group, bn_sync), 3, group)
        twin = agent.branch()
        return learned(moved(twin, 5, group)), learned(moved(agent, 5, group))

    (twin, original), (elsewhere, _) = succeed(2, learn)
    assert all(torch.equal(twin[name], original[name]) and torch.equal(twin[name], elsewhere[name]) for name in twin)


def test_what_is_read_on_several_ranks_is_the_rows_of_all_in_their_order() -> None:
    def read(group: Threads) -> Inputs:
        batch = random_batch(DIMS, ACTIONS, 6, group.rank, kept=0.8)
        return subjects.inputs_of(agent_of("sac", group), batch)

    first, second = succeed(2, read)
    for name in ("observation", "next_critic_observation", "action", "reward", "discount"):
        parts = [
            getattr(steps.inputs_of(random_batch(DIMS, ACTIONS, 6, rank, kept=0.8), "critic"), name) for rank in (0, 1)
        ]
        assert torch.equal(getattr(first, name), torch.cat(parts)) and torch.equal(
            getattr(second, name), torch.cat(parts)
        )


@pytest.mark.parametrize(("name", "bn_sync"), [("flashsac", "forward"), ("sac", "running")])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_that_share_a_batch_learn_what_one_rank_learns_from_it(name: str, bn_sync: str, size: int) -> None:
    """To a thousandth of how far parameters moved: rounding, which Adam amplifies where gradients vanish."""
    before, alone = learned(agent_of(name)), learned(moved(agent_of(name), 20))
    together, *_ = succeed(size, lambda group: learned(moved(agent_of(name, group, bn_sync), 20, group)))
    for entry in (entry for entry in alone if not entry.startswith("optimizer.") and entry != "updates"):
        distance = (together[entry] - alone[entry]).abs().max()
        assert distance <= 0.001 * (alone[entry] - before[entry]).abs().max() + 1e-6, entry


@pytest.mark.parametrize("bn_sync", ["running", "forward"])
def test_running_statistics_follow_the_moments_of_the_whole_batch(bn_sync: str) -> None:
    agents = succeed(2, lambda group: moved(agent_of("flashsac", group, bn_sync), 1, group))
    inputs, *_ = update_of(0)
    whole = torch.cat((inputs.observation, inputs.next_observation)).double()
    norm = agents[0].learner.actor.trunk.input_norm
    torch.testing.assert_close(norm.running_mean.double(), 0.01 * whole.mean(0), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(norm.running_var.double(), 0.99 + 0.01 * whole.var(0), rtol=1e-6, atol=1e-8)


def test_pooled_moments_are_exact_when_ranks_see_different_data_far_from_zero() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 6, 40)) + np.array([100.0, 101.0, 103.0])[:, None, None]

    def follow(group: Threads) -> BatchNorm:
        layer = BatchNorm(6)
        layer.running_mean.fill_(99.0)
        reduce = reduction(group, "running", layer)
        layer(torch.from_numpy(x[group.rank]).float(), True)
        reduce([torch.zeros(3)])
        return layer

    whole = np.concatenate(list(x), -1)
    for layer in succeed(3, follow):
        np.testing.assert_allclose(layer.running_mean, 0.99 * 99 + 0.01 * whole.mean(-1), rtol=1e-6)
        np.testing.assert_allclose(layer.running_var, 0.99 + 0.01 * whole.var(-1, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("relu", [False, True])
def test_normalising_over_ranks_equals_normalising_the_whole_batch_forward_and_back(relu: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(2, 4, 30, generator=rng, dtype=torch.float64) for _ in range(2))
    parameters = [torch.rand(2, 4, generator=rng, dtype=torch.float64) + 0.5 for _ in range(2)]

    def differentiate(function: Any, rows: slice) -> list[torch.Tensor]:
        inputs = [value.clone().requires_grad_() for value in (x[..., rows], *parameters)]
        y, mean, variance = function(*inputs, 1e-5, relu, torch.float64)
        (y * weight[..., rows]).sum().backward()
        return [y.detach(), mean, variance, *(value.grad for value in inputs)]

    whole = differentiate(normalise, slice(None))

    def part(group: Threads) -> list[torch.Tensor]:
        def function(*arguments: Any) -> Any:
            return normalise_over_ranks(group.average, *arguments)

        return differentiate(function, slice(group.rank * 10, group.rank * 10 + 10))

    parts = succeed(3, part)
    for index in (0, 3):  # the result and the gradient of the input: row by row
        torch.testing.assert_close(torch.cat([part[index] for part in parts], -1), whole[index])
    for index in (1, 2):  # moments: the same on every rank
        assert all(torch.allclose(part[index], whole[index]) for part in parts)
    for index in (4, 5):  # gradients of parameters add up
        torch.testing.assert_close(sum(part[index] for part in parts), whole[index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_stored_in_half_precision_is_normalised_over_ranks_in_float32(dtype: torch.dtype) -> None:
    """Numbers around 300, whose squares float16 cannot hold."""
    x = (torch.randn(4, 30, generator=torch.Generator().manual_seed(0)) * 100 + 300).to(dtype)
    ones, zeros = torch.ones(4), torch.zeros(4)
    y, mean, variance = normalise(x, ones, zeros, 1e-5, False, dtype)

    def part(group: Threads) -> tuple[torch.Tensor, ...]:
        rows = slice(group.rank * 15, group.rank * 15 + 15)
        return normalise_over_ranks(group.average, x[:, rows], ones, zeros, 1e-5, False, dtype)

    first, second = succeed(2, part)
    assert first[0].dtype == dtype and first[1].dtype == torch.float32
    torch.testing.assert_close(torch.cat((first[0], second[0]), -1), y)
    for moments in (first, second):
        torch.testing.assert_close(moments[1:], (mean, variance))


def test_scalar_metrics_are_means_over_ranks_and_the_temperature_follows_the_common_entropy() -> None:
    def update(group: Threads) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        agent = agent_of("sac", group)
        rows = slice(group.rank * 16, group.rank * 16 + 16)
        inputs, actor_noise, target_noise = update_of(0)
        mine = replace(inputs, **{f.name: getattr(inputs, f.name)[rows] for f in fields(inputs) if f.name != "weight"})
        metrics = agent.update_with(mine, actor_noise[0, rows], target_noise[rows], 0.0)
        return {name: value.clone() for name, value in metrics.items()}, agent.learner.log_alpha.detach()

    (first, alpha), (second, other) = succeed(2, update)
    assert all(torch.equal(first[name], second[name]) for name in first) and torch.equal(alpha, other)
    inputs, actor_noise, target_noise = update_of(0)
    whole = agent_of("sac").update_with(inputs, actor_noise[0], target_noise, 0.0)
    for name in ("loss/critic", "value/target_mean", "policy/entropy", "loss/actor", "loss/temperature"):
        torch.testing.assert_close(first[name], whole[name], msg=name)


def test_an_update_sends_one_message_per_network_and_little_more_than_its_gradients() -> None:
    def padded(tensors: Any) -> int:
        return sum(-(-tensor.numel() // 4) * 16 for tensor in tensors)

    def messages(group: Threads) -> None:
        agent = moved(agent_of("flashsac", group), 1, group)
        with_actor = list(group.averaged)
        group.averaged.clear()
        inputs, _, target_noise = update_of(1)
        agent.update_with(inputs, None, target_noise, 0.0)
        learner = agent.learner
        moments = {
            network: 2 * padded(v for n, v in network.named_buffers() if n.endswith("running_mean"))
            for network in (learner.actor, learner.critic, learner.target_critic)
        }
        actor = padded(learner.actor.parameters()) + moments[learner.actor] + 5 * 16
        critic = padded(learner.critic.parameters()) + moments[learner.critic] + moments[learner.target_critic] + 4 * 16
        assert with_actor == [actor, critic] and group.averaged == [critic]

    succeed(2, messages)


def test_reward_scales_are_those_of_all_environments_together() -> None:
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=(50, 6)).astype(np.float32) * np.arange(1, 7, dtype=np.float32)
    done, valid = rng.random((50, 6)) < 0.1, rng.random((50, 6)) < 0.8
    valid[:10, :3] = False  # a rank with nothing to tell

    def watched(scaler: RewardScaler, columns: slice) -> float:
        for row in zip(rewards[:, columns], done[:, columns], valid[:, columns], strict=True):
            scaler.observe(*row)
        return scaler.scale

    alone = watched(RewardScaler(6, 0.9, 5.0), slice(None))
    first, second = succeed(
        2, lambda group: watched(RewardScaler(3, 0.9, 5.0, group=group), slice(3 * group.rank, 3 * group.rank + 3))
    )
    assert first == second == pytest.approx(alone, rel=1e-12)


def test_every_rank_explores_and_learns_with_noise_of_its_own_and_the_first_with_that_of_a_lone_process() -> None:
    everywhere = np.ones(ENVS, bool)
    for name in ("flashsac", "sac"):
        alone, first, second = (agent_of(name, group) for group in (ALONE, Threads(0, 1), Threads(1, 2)))
        noises = [agent.exploration_noise(0, everywhere) for agent in (alone, first, second)]
        assert np.array_equal(noises[0], noises[1]) and not np.array_equal(noises[0], noises[2])
        seeds = [agent.update_seed for agent in (alone, first, second)]
        assert seeds[0] == seeds[1] != seeds[2]
