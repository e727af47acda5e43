"""The probe against networks whose answer is known, and that it leaves no trace."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from patient_networks import KINDS, agent_of, bare_patient, mlp, normal, patient_of
from torch import nn

from rlplastic.agents.heads import Scalar
from rlplastic.agents.layers import NormBounds
from rlplastic.agents.patients import patients
from rlplastic.agents.sac import SAC
from rlplastic.agents.sac.networks import Critic
from rlplastic.config import SACConfig, ScalarCriticConfig
from rlplastic.errors import ConfigurationError
from rlplastic.plasticity.interventions import full_reset
from rlplastic.plasticity.patient import Patient
from rlplastic.plasticity.probe import CAP, RATE, Probe, probe, smooth_functions
from rlplastic.replay.sample import Batch

STEPS = 60


def everything(module: nn.Module) -> list[torch.Tensor]:
    found = [*module.parameters(), *module.buffers(), *(p.grad for p in module.parameters() if p.grad is not None)]
    return [tensor.detach().clone() for tensor in found]


def test_a_fresh_network_of_the_same_key_has_ratio_one_exactly() -> None:
    patient = bare_patient(key=5)
    found = probe(patient, patient.states, 5, STEPS)
    assert found.members == (1.0,)
    assert found.areas == found.fresh_areas
    assert found.updates == STEPS * 3 * 2


def test_a_fresh_network_of_another_key_has_a_ratio_near_one() -> None:
    ratios = [probe(bare_patient(key=k), bare_patient().states, 100 + k, STEPS).ratio for k in range(5)]
    assert sum(ratios) / 5 == pytest.approx(1, abs=0.1)


def test_a_network_of_dead_units_learns_nothing_but_the_mean() -> None:
    patient = bare_patient(rows=2000)
    with torch.no_grad():
        patient.module[0].bias.fill_(-1000)
    found = probe(patient, patient.states, 1, 200)
    assert found.areas[0] == pytest.approx(1, abs=0.1)
    assert found.ratio > 1.2


def test_a_linear_models_area_is_that_of_adam_written_out() -> None:
    """Gradients in closed form, Adam in numpy, float64: the functions and batches are the probe's own."""

    def linear(key: int) -> nn.Linear:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key)
            return nn.Linear(3, 1)

    net, rows, key = linear(0), 200, 11
    patient = Patient("net", net, torch.optim.SGD(net.parameters(), 0.1), linear)
    states = (normal(rows, 3),)
    found = probe(patient, states, key, 50, functions=2)
    rng = torch.Generator().manual_seed(key)
    functions = smooth_functions(states, 1, 2, rng)
    x = np.concatenate([states[0].double().numpy(), np.ones((rows, 1))], 1)
    areas = []
    for function in functions:
        picks = torch.randint(rows, (50, 128), generator=rng).numpy()
        weight = np.concatenate([net.weight.detach().double().numpy()[0], net.bias.detach().double().numpy()])
        goal = x @ weight + function[:, 0].double().numpy()
        first, second, losses = np.zeros(4), np.zeros(4), []
        for step, pick in enumerate(picks, 1):
            error = x[pick] @ weight - goal[pick]
            losses.append(min(float(np.mean(error**2)), CAP))
            gradient = 2 * error @ x[pick] / 128
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            weight = weight - 1e-3 * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        areas.append(np.mean(losses))
    assert found.areas[0] == pytest.approx(np.mean(areas), rel=1e-4)


def test_its_steps_have_the_bits_of_torchs_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    patient = bare_patient(key=5)
    ours = probe(patient, patient.states, 6, STEPS)

    def torchs(parameters: Sequence[torch.Tensor]) -> Callable[[Sequence[torch.Tensor]], None]:
        optimizer = torch.optim.Adam(parameters, RATE, fused=True)

        def step(gradients: Sequence[torch.Tensor]) -> None:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone(memory_format=torch.contiguous_format)
            optimizer.step()

        return step

    monkeypatch.setattr("rlplastic.plasticity.probe._adam", torchs)
    assert probe(patient, patient.states, 6, STEPS) == ours


WITHOUT_COMPILER = """
import sys, torch
from rlplastic.agents.adam import Adam
from rlplastic.plasticity.patient import Patient
from rlplastic.plasticity.probe import probe
net = torch.nn.Linear(2, 1)
probe(Patient("net", net, Adam(net.parameters()), lambda key: torch.nn.Linear(2, 1)), (torch.rand(8, 2),), 1, 3)
sys.exit("torch._dynamo" in sys.modules)
"""


def test_the_first_probe_does_not_import_torchs_compiler() -> None:
    """It takes seconds and 90 MB, in the middle of somebody's training."""
    assert subprocess.run([sys.executable, "-c", WITHOUT_COMPILER]).returncode == 0


def test_functions_are_standardised_smooth_and_keyed() -> None:
    states = (normal(500, 4), 100 + 5 * normal(500, 2, seed=2), torch.full((500, 1), 3.0))
    rng = torch.Generator().manual_seed(0)
    first, second = smooth_functions(states, 2, 2, rng)
    assert first.shape == (500, 2)
    torch.testing.assert_close(first.mean(0), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(first.var(0, correction=0), torch.ones(2), rtol=1e-4, atol=0)
    assert not torch.allclose(first, second)
    again = smooth_functions(states, 2, 1, torch.Generator().manual_seed(0))[0]
    assert torch.equal(first, again)
    near = tuple(torch.cat((part, part + 1e-3 * part.std(0, correction=0))) for part in states)
    values = smooth_functions(near, 1, 1, torch.Generator().manual_seed(0))[0]
    assert (values[500:] - values[:500]).abs().max() < 0.02


@pytest.mark.parametrize(("agent", "network"), KINDS)
def test_probing_leaves_no_trace(agent: str, network: str) -> None:
    learner = agent_of(agent)
    patient = patient_of(learner, network)
    for parameter in patient.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, modes = everything(patient.module), [part.training for part in patient.module.modules()]
    others = {name: value.clone() for name, value in learner.state_dict().items()}
    state = torch.random.get_rng_state()
    found = probe(patient, patient.states, 3, steps=4, functions=2)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(patient.module), strict=True))
    assert all(torch.equal(value, learner.state_dict()[name]) for name, value in others.items())
    assert modes == [part.training for part in patient.module.modules()]
    assert torch.equal(state, torch.random.get_rng_state())
    assert found == probe(patient, patient.states, 3, steps=4, functions=2)
    assert len(found.members) == (patient.members or 1)


def critics(first: int, second: int) -> Critic:
    """Two members, each the network of its own key."""
    critic = Critic(3, 0, 16, 2, Scalar(), 2)
    singles = [mlp(first), mlp(second)]
    with torch.no_grad():
        for name, parameter in critic.named_parameters():
            place = "4" + name.removeprefix("head") if name.startswith("head") else name.removeprefix("trunk.")
            parameter.copy_(torch.stack([dict(single.named_parameters())[place] for single in singles]))
    return critic


def test_members_learn_side_by_side_as_they_would_alone() -> None:
    critic = critics(1, 2)
    empty = torch.zeros(256, 0)
    patient = Patient(
        "critic",
        critic,
        torch.optim.Adam(critic.parameters()),
        lambda key: critics(key, key),
        members=2,
        output=lambda module, states, _: module(states[0], empty[: len(states[0])]),
    )
    together = probe(patient, (normal(256, 3),), 9, STEPS)
    alone = [probe(bare_patient(key), (normal(256, 3),), 9, STEPS) for key in (1, 2)]
    assert together.areas == pytest.approx([single.areas[0] for single in alone], rel=1e-4)
    assert together.members == pytest.approx([single.ratio for single in alone], rel=1e-4)
    assert together.worst == max(together.members)
    assert together.ratio == pytest.approx(sum(together.members) / 2)


def test_given_targets_are_learnt_as_they_are_in_units_of_their_variance() -> None:
    patient = bare_patient(key=0)
    own = patient.module(patient.states[0]).detach()
    assert probe(patient, patient.states, 1, 5, targets=own).ratio == 0
    far = probe(patient, patient.states, 1, 5, targets=50 + 10 * normal(256, 1))
    assert far.areas[0] == far.fresh_areas[0] == CAP
    noisy = own[:, 0] + 3 * normal(256)
    near = probe(patient, patient.states, 1, 1, functions=100, targets=noisy)
    assert near.areas[0] == pytest.approx(float(9 * normal(256).square().mean() / noisy.var(correction=0)), rel=0.05)


def test_a_reference_halves_the_cost_and_must_be_of_the_same_setting() -> None:
    patient = bare_patient()
    whole = probe(patient, patient.states, 1, STEPS)
    half = probe(patient, patient.states, 1, STEPS, reference=whole)
    assert half.members == whole.members
    assert (whole.updates, half.updates) == (STEPS * 6, STEPS * 3)
    with pytest.raises(ConfigurationError, match="reference"):
        probe(patient, patient.states, 2, STEPS, reference=whole)


def test_what_is_not_finite_is_never_healthy() -> None:
    patient = bare_patient()
    with torch.no_grad():
        patient.module[0].weight[0, 0] = math.nan
    found = probe(patient, patient.states, 1, 3)
    assert math.isnan(found.ratio) and math.isnan(found.worst)
    assert math.isnan(Probe((0.9, math.nan, 1.1), (), (), (0, 0, 0, 0), 0).worst)


def test_norms_of_the_copy_are_bounded_after_every_step() -> None:
    patient = patient_of(agent_of("flashsac"), "critic")
    copies: list[nn.Module] = []

    def bound(module: nn.Module):
        copies.append(module)
        return NormBounds(module).project

    probe(replace(patient, bound=bound), patient.states, 1, 3, functions=1)
    assert len(copies) == 2 and patient.module not in copies
    assert all(float(value) < 1e-5 for module in copies for value in NormBounds(module).deviations().values())


def random_transitions(task: str, count: int) -> Batch:
    """What a uniformly random policy meets."""
    env = gymnasium.make(task)
    env.action_space.seed(0)
    observation, _ = env.reset(seed=0)
    rows = []
    for _ in range(count):
        action = env.action_space.sample()
        following, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, reward, 0.0 if terminated else 0.99, following))
        observation = env.reset()[0] if terminated or truncated else following
    tensors = [torch.tensor(np.array(column), dtype=torch.float32) for column in zip(*rows, strict=True)]
    observations, actions, rewards, discounts, following = tensors
    return Batch({"policy": observations}, actions, rewards, discounts, {"policy": following}, torch.arange(count))


def rows_of(batch: Batch, picks: torch.Tensor) -> Batch:
    names = ("action", "reward", "discount", "rows")
    groups = {name: {"policy": getattr(batch, name)["policy"][picks]} for name in ("observation", "next_observation")}
    return Batch(**{name: getattr(batch, name)[picks] for name in names}, **groups)


@pytest.mark.slow
def test_a_primed_critic_is_ill_a_trained_one_is_not_and_a_reset_cures() -> None:
    """Plain SAC, Hopper-v5, many updates on few transitions: the illness of arXiv 2205.07802."""
    replay = random_transitions("Hopper-v5", 4000)
    states = replay.observation["policy"][:1024], replay.action[:1024]

    def critic_after(updates: int, transitions: int) -> Patient:
        config = SACConfig(critic_width=128, actor_width=128, gamma=0.99, initial_alpha=1.0)
        agent = SAC({"policy": 11}, 3, 1, config, ScalarCriticConfig())
        for index in range(updates):
            rng = torch.Generator().manual_seed(index)
            agent.update(rows_of(replay, torch.randint(transitions, (128,), generator=rng)), 0.0)
        return patients(agent)["critic"]

    healthy, primed = critic_after(2000, 4000), critic_after(12_000, 500)
    found = [probe(patient, states, 1) for patient in (healthy, primed)]
    full_reset(primed, 1)
    cured = probe(primed, states, 1)
    assert found[0].worst < 1.1
    assert found[1].ratio > 1.8
    assert found[1].ratio > 2 * found[0].ratio
    assert cured.ratio == pytest.approx(1, abs=0.1)


def test_states_and_targets_must_fit() -> None:
    patient = bare_patient()
    with pytest.raises(ConfigurationError, match="0 states"):
        probe(patient, (), 0)
    with pytest.raises(ConfigurationError, match="equal rows"):
        probe(patient, (normal(3, 3), normal(2, 3)), 0)
    with pytest.raises(ConfigurationError, match="5 targets"):
        probe(patient, patient.states, 0, targets=normal(5))
