"""FlashSAC as the loop sees it: determinism, exact state, observation groups, schedule, acting."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from batches import on_gpu, random_batch
from synchronisation import no_synchronisation

from rlplastic.agents import make_agent, parameter_bytes
from rlplastic.agents.flashsac import FlashSAC, update
from rlplastic.composition import compose
from rlplastic.config import CategoricalCriticConfig, FlashSACConfig
from rlplastic.envs.base import Step
from rlplastic.machine import probe_machine
from rlplastic.presets import resolve
from rlplastic.progress import MetricMeans
from rlplastic.replay.sample import Batch

DIMS = {"policy": 3, "critic": 5}
ACTIONS, ENVS, ROWS = 2, 4, 16


def agent_of(dims: dict[str, int] = DIMS, *, seed: int = 0, planned: int | None = None, **settings: Any) -> FlashSAC:
    config = FlashSACConfig(critic_width=16, actor_width=8, gamma=0.99, **settings)
    return FlashSAC(
        dims, ACTIONS, ENVS, config, CategoricalCriticConfig(num_atoms=11), seed=seed, planned_updates=planned
    )


def batch_of(index: int = 0, dims: dict[str, int] = DIMS) -> Batch:
    return random_batch(dims, ACTIONS, ROWS, index, kept=0.8)


def observation_of(index: int, rows: int = ENVS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(index)
    return {name: rng.normal(size=(rows, dim)).astype(np.float32) for name, dim in DIMS.items()}


def step_of(index: int) -> tuple[Step, np.ndarray]:
    rng = np.random.default_rng(500 + index)
    done = rng.random(ENVS) < 0.1
    reward = rng.normal(size=ENVS).astype(np.float32)
    return Step(observation_of(index), reward, done, np.zeros(ENVS, bool), {}), rng.random(ENVS) < 0.9


def worked(agent: FlashSAC, first: int, count: int) -> list[np.ndarray]:
    """Act, observe and update ``count`` times; everything the outside sees."""
    seen = []
    for index in range(first, first + count):
        step, valid = step_of(index)
        seen.append(agent.explore(step.observation, index, valid, uniform=False))
        agent.observe(step, valid)
        seen.append(np.array(float(agent.reward_scale)))
        metrics = agent.update(batch_of(index), budget_used=index / 20)
        seen += [np.array(float(metrics[name])) for name in sorted(metrics)]
        seen.append(agent.act(step.observation))
    return seen


def assert_same(first: list[np.ndarray], second: list[np.ndarray]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_same_state(first: FlashSAC, second: FlashSAC) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_same_seed_gives_the_same_bits_and_another_seed_does_not() -> None:
    first, second, other = agent_of(), agent_of(), agent_of(seed=1)
    assert_same(worked(first, 0, 5), worked(second, 0, 5))
    assert_same_state(first, second)
    assert not torch.equal(first.state_dict()["actor.head.mean.weight"], other.state_dict()["actor.head.mean.weight"])


def test_update_noise_follows_the_seed() -> None:
    first, second = agent_of(seed=0), agent_of(seed=1)
    second.load_state_dict(first.state_dict())
    entropies = [float(agent.update(batch_of(), 0.0)["policy/entropy"]) for agent in (first, second)]
    assert entropies[0] != entropies[1]


@pytest.mark.parametrize("warm_up", [0, 1, 4])
def test_state_round_trip_continues_bit_for_bit_over_five_updates(warm_up: int) -> None:
    first = agent_of()
    worked(first, 0, warm_up)
    state, scale = {name: value.clone() for name, value in first.state_dict().items()}, float(first.reward_scale)
    expected = worked(first, warm_up, 5)
    second = agent_of(seed=0)
    worked(second, 50, 3)  # whatever it did before must not matter
    second.load_state_dict(state)
    assert float(second.reward_scale) == scale
    assert_same(worked(second, warm_up, 5), expected)
    assert_same_state(first, second)


def test_loading_copies_instead_of_sharing_memory() -> None:
    first = agent_of()
    worked(first, 0, 2)
    state = first.state_dict()
    second, copies = agent_of(), {name: value.clone() for name, value in state.items()}
    second.load_state_dict(copies)
    reference = {name: value.clone() for name, value in copies.items()}
    worked(second, 2, 2)
    assert all(torch.equal(value, reference[name]) for name, value in copies.items())


def test_state_of_an_agent_of_another_size_is_refused() -> None:
    state = agent_of({"policy": 7}).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        agent_of().load_state_dict(state)


def test_state_is_flat_cpu_tensors_without_a_compilers_names() -> None:
    agent = agent_of()
    worked(agent, 0, 1)
    for name, value in agent.state_dict().items():
        assert isinstance(value, torch.Tensor) and value.device.type == "cpu" and not value.requires_grad
        assert "_orig_mod" not in name


def test_building_acting_and_updating_leave_the_global_generators_alone() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    worked(agent_of(), 0, 3)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_global_generators_do_not_influence_the_agent() -> None:
    torch.manual_seed(1)
    first = worked(agent_of(), 0, 2)
    torch.manual_seed(2)
    assert_same(worked(agent_of(), 0, 2), first)


def changed(batch: Batch, where: str, group: str) -> Batch:
    groups = dict(getattr(batch, where))
    groups[group] = groups[group] * -2 + 1
    return replace(batch, **{where: groups})


@pytest.mark.parametrize(
    ("where", "group", "entropy_changes", "critic_changes"),
    [
        ("observation", "policy", True, False),
        ("next_observation", "policy", True, True),  # joint batch statistics; the action a' of the target
        ("observation", "critic", False, True),
        ("next_observation", "critic", False, True),
    ],
)
def test_observation_groups_reach_the_right_network(
    where: str, group: str, entropy_changes: bool, critic_changes: bool
) -> None:
    plain, altered = batch_of(), changed(batch_of(), where, group)
    entropies, losses = [], []
    for batch in (plain, altered):
        entropies.append(float(agent_of().update(batch, 0.0)["policy/entropy"]))
        critic_only = agent_of()
        critic_only.updates = 1  # the actor rests
        losses.append(float(critic_only.update(batch, 0.0)["loss/critic"]))
    assert (entropies[0] != entropies[1]) == entropy_changes
    assert (losses[0] != losses[1]) == critic_changes


def test_without_privileged_observations_both_networks_read_the_policys() -> None:
    agent = agent_of({"policy": 3})
    assert agent.learner.critic.trunk.embed.weight.shape[-1] == 3 + ACTIONS
    agent.update(batch_of(dims={"policy": 3}), 0.0)
    assert agent_of().learner.critic.trunk.embed.weight.shape[-1] == DIMS["critic"] + ACTIONS
    assert agent_of().learner.actor.trunk.embed.weight.shape[-1] == DIMS["policy"]


@pytest.mark.parametrize("every", [1, 2, 3])
def test_actor_and_temperature_learn_on_every_nth_update_the_first_included(every: int) -> None:
    agent = agent_of(actor_every=every)
    for index in range(7):
        before = (
            agent.state_dict()["actor.head.mean.weight"].clone(),
            agent.state_dict()["temperature.log_alpha"].clone(),
        )
        metrics = agent.update(batch_of(index), 0.0)
        after = agent.state_dict()["actor.head.mean.weight"], agent.state_dict()["temperature.log_alpha"]
        due = index % every == 0
        assert ("loss/actor" in metrics) == ("loss/temperature" in metrics) == due
        assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [due, due]
    assert agent.updates == 7


def rates(agent: FlashSAC) -> dict[str, float]:
    learner = agent.learner
    optimizers = {
        "actor": learner.actor_optimizer,
        "temperature": learner.temperature_optimizer,
        "critic": learner.critic_optimizer,
    }
    return {name: optimizer.rate for name, optimizer in optimizers.items()}


def test_planned_schedule_follows_the_closed_form_of_each_optimizers_own_steps() -> None:
    planned, agent = 9, agent_of(planned=9)

    def f(k: int) -> float:
        return 3e-4 if k == 0 else 1.5e-4 + 0.75e-4 * (1 + math.cos(math.pi * min((k - 1) / (planned - 1), 1)))

    for index in range(14):
        agent.update(batch_of(index), budget_used=0.9)
        found = rates(agent)
        assert found["critic"] == pytest.approx(f(index), rel=1e-12)
        assert found["actor"] == found["temperature"] == pytest.approx(f(index // 2), rel=1e-12)


def test_budget_schedule_follows_the_fraction_of_the_budget() -> None:
    agent = agent_of()
    for index, used in enumerate([0.0, 0.25, 0.5, 0.9, 1.0]):
        agent.update(batch_of(index), budget_used=used)
        expected = 1.5e-4 + 0.75e-4 * (1 + math.cos(math.pi * used))
        assert rates(agent)["critic"] == pytest.approx(expected, rel=1e-12)
        if index % 2 == 0:
            assert rates(agent)["actor"] == pytest.approx(expected, rel=1e-12)


def test_norms_stay_on_their_bounds_from_the_first_moment_on() -> None:
    agent = agent_of()
    for index in range(4):
        assert max(float(value) for value in agent.norms().values()) < 1e-5
        agent.update(batch_of(index), 0.0)
    assert set(agent.norms()) == {
        f"norm/{network}_{kind}"
        for network in ("actor", "critic")
        for kind in ("linear_rows", "batch_norm", "rms_norm")
    }


def test_target_starts_as_the_projected_critic() -> None:
    state = agent_of().state_dict()
    for name, value in state.items():
        if name.startswith("critic."):
            assert torch.equal(value, state[f"target_{name}"])


def test_acting_is_deterministic_stays_in_the_box_and_does_not_depend_on_other_rows() -> None:
    agent = agent_of()
    worked(agent, 0, 2)
    observation = observation_of(0, rows=9)
    actions = agent.act(observation)
    assert actions.shape == (9, ACTIONS) and actions.dtype == np.float32 and np.abs(actions).max() <= 1
    np.testing.assert_array_equal(agent.act(observation), actions)
    for row in range(9):
        single = agent.act({name: values[row : row + 1] for name, values in observation.items()})
        np.testing.assert_allclose(single[0], actions[row], rtol=1e-5, atol=1e-6)


def test_exploring_is_the_squashed_gaussian_with_the_held_noise() -> None:
    agent, twin = agent_of(), agent_of()
    observation, active = observation_of(1), np.ones(ENVS, bool)
    action = agent.explore(observation, 0, active, uniform=False)
    noise = twin._noise.at(0, active)
    mean, log_std = twin.learner.actor(torch.from_numpy(observation["policy"]))
    np.testing.assert_allclose(action, torch.tanh(mean + log_std.exp() * torch.from_numpy(noise)).detach(), atol=1e-6)


def test_uniform_phase_ignores_the_policy_and_does_not_move_the_noise() -> None:
    agent = agent_of()
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    first = agent.explore(observation_of(1), 3, np.ones(ENVS, bool), uniform=True)
    second = agent.explore(observation_of(2), 3, np.ones(ENVS, bool), uniform=True)
    np.testing.assert_array_equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())


def test_reward_scale_follows_what_was_observed_and_can_be_switched_off() -> None:
    agent, off = agent_of(), agent_of(reward_scaling=False)
    step, _ = step_of(0)
    for each in (agent, off):
        assert float(each.reward_scale) == 1
        each.observe(step, np.ones(ENVS, bool))
    spread = np.sqrt(np.var(step.reward.astype(np.float64)) + 1e-8)
    assert float(agent.reward_scale) == pytest.approx(1 / max(spread, np.abs(step.reward).max() / 5.0), rel=1e-6)
    assert float(off.reward_scale) == 1


def test_time_limit_ends_the_discounted_return_like_a_termination() -> None:
    states = []
    for ends in ("terminated", "truncated"):
        agent = agent_of()
        flags = {"terminated": np.zeros(ENVS, bool), "truncated": np.zeros(ENVS, bool)} | {ends: np.ones(ENVS, bool)}
        for index in range(3):
            agent.observe(step_of(index)[0]._replace(**flags), np.ones(ENVS, bool))
        states.append(float(agent.reward_scale))
    assert states[0] == states[1]


def test_gradients_of_the_losses_are_what_is_compiled() -> None:
    compiled = []

    def compile_(function: Any) -> Any:
        compiled.append(function)
        return function

    config = FlashSACConfig(critic_width=16, actor_width=8, gamma=0.99)
    FlashSAC(DIMS, ACTIONS, ENVS, config, CategoricalCriticConfig(num_atoms=11), compile=compile_)
    assert [function.__wrapped__ for function in compiled] == [update.actor_loss, update.critic_loss]


def test_updates_and_their_metrics_never_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, means, batches = agent_of(), MetricMeans(), [batch_of(index) for index in range(4)]
    with no_synchronisation(monkeypatch):
        for batch in batches:
            means.add(agent.update(replace(batch, weight=torch.ones(ROWS)), 0.5))
            assert agent.td_error is not None
            agent.norms()


@pytest.mark.gpu
def test_updates_never_wait_for_a_real_device() -> None:
    config = FlashSACConfig(critic_width=16, actor_width=8, gamma=0.99)
    agent = FlashSAC(DIMS, ACTIONS, ENVS, config, CategoricalCriticConfig(num_atoms=11), device="cuda")
    batches = [on_gpu(batch_of(index)) for index in range(6)]
    for batch in batches[:2]:  # loading kernels may wait
        agent.update(batch, 0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[2:]:
            agent.update(batch, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert agent.updates == len(batches)


@pytest.mark.gpu
def test_state_moves_between_devices_and_continues() -> None:
    cpu = agent_of()
    worked(cpu, 0, 3)
    config = FlashSACConfig(critic_width=16, actor_width=8, gamma=0.99)
    cuda = FlashSAC(DIMS, ACTIONS, ENVS, config, CategoricalCriticConfig(num_atoms=11), device="cuda")
    cuda.load_state_dict(cpu.state_dict())
    np.testing.assert_allclose(cuda.act(observation_of(0)), cpu.act(observation_of(0)), atol=1e-5)
    batch = batch_of()
    for _ in range(2):
        assert math.isfinite(float(cuda.update(on_gpu(batch), 0.0)["loss/critic"]))
    restored = agent_of()
    restored.load_state_dict(cuda.state_dict())
    restored.update(batch, 0.0)


def test_memory_of_the_networks_is_estimated_before_they_are_made() -> None:
    config, _ = resolve(compose(["agent.critic_width=128", "agent.actor_width=64", "device=cpu"]), probe_machine("cpu"))
    dims = {"policy": 40, "critic": 60}
    learner = make_agent(config, dims, 7).learner
    critic, actor = (sum(p.numel() for p in net.parameters()) for net in (learner.critic, learner.actor))
    assert parameter_bytes(config, dims, 7) == pytest.approx(4 * (5 * critic + 4 * actor), rel=0.05)
