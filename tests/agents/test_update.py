"""The three losses and the steps around them, against a plain numpy transcription in float64."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from rlplastic.agents import steps
from rlplastic.agents.adam import Adam
from rlplastic.agents.flashsac import FlashSAC, update
from rlplastic.agents.flashsac.networks import Critic
from rlplastic.agents.heads import Categorical
from rlplastic.agents.layers import NormBounds
from rlplastic.config import CategoricalCriticConfig, FlashSACConfig

POLICY, PRIVILEGED, ACTIONS, ROWS, ATOMS, SUPPORT = 4, 6, 2, 5, 9, 5.0
State = dict[str, np.ndarray]


def learner_of(seed: int = 0) -> update.Learner:
    """A small learner in float64 whose parameters and statistics have left their initial values."""
    settings = FlashSACConfig(critic_width=8, actor_width=8, gamma=0.99, initial_alpha=0.2)
    values = CategoricalCriticConfig(num_atoms=ATOMS, support=SUPPORT)
    learner = FlashSAC({"policy": POLICY, "critic": PRIVILEGED}, ACTIONS, 1, settings, values, seed=seed).learner
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for network in (learner.actor, learner.critic, learner.target_critic):
            network.double()
            for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
                if "weight" not in name and "atoms" not in name:
                    tensor.add_(0.3 * torch.rand(tensor.shape, generator=rng).double())
        learner.log_alpha.data = learner.log_alpha.data.double()
    learner.actor_optimizer = Adam(learner.actor.parameters())
    learner.critic_optimizer = Adam(learner.critic.parameters())
    learner.temperature_optimizer = Adam([learner.log_alpha])
    return learner


def inputs_of(seed: int = 0, discount: float = 0.99) -> steps.Inputs:
    rng = torch.Generator().manual_seed(100 + seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    keep = torch.ones(ROWS, dtype=torch.float64)
    keep[1] = 0  # one terminated row
    return steps.Inputs(
        observation=normal(ROWS, POLICY),
        next_observation=normal(ROWS, POLICY),
        critic_observation=normal(ROWS, PRIVILEGED),
        next_critic_observation=normal(ROWS, PRIVILEGED),
        action=normal(ROWS, ACTIONS).tanh(),
        reward=normal(ROWS),
        discount=discount * keep,
    )


def noise_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, ACTIONS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arrays(network: torch.nn.Module, member: int | None = None) -> State:
    state = {name: value.detach().numpy().copy() for name, value in network.state_dict().items()}
    return state if member is None else {name: value[member] for name, value in state.items()}


def normalised(x: np.ndarray, state: State, name: str, batch: bool) -> np.ndarray:
    mean = x.mean(0) if batch else state[f"{name}.running_mean"]
    variance = x.var(0) if batch else state[f"{name}.running_var"]
    return (x - mean) / np.sqrt(variance + 1e-5) * state[f"{name}.gamma"] + state[f"{name}.beta"]


def features(x: np.ndarray, state: State, batch: bool) -> np.ndarray:
    """The trunk as the description states it: embed, two residual blocks, RMSNorm."""
    h = normalised(x, state, "trunk.input_norm", batch) @ state["trunk.embed.weight"].T
    for index in range(2):
        block = f"trunk.blocks.{index}"
        u = np.maximum(normalised(h @ state[f"{block}.expand.weight"].T, state, f"{block}.expand_norm", batch), 0)
        v = np.maximum(normalised(u @ state[f"{block}.contract.weight"].T, state, f"{block}.contract_norm", batch), 0)
        h = h + v
    return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * state["trunk.post_norm.gain"]


def policy_of(x: np.ndarray, state: State, noise: np.ndarray, batch: bool) -> tuple[np.ndarray, np.ndarray]:
    """Actions and their log-probabilities, through log(1 - tanh^2) as it stands."""
    z = features(x, state, batch)
    mean = z @ state["head.mean.weight"].T + state["head.mean_bias"]
    log_std = -10 + 6 * (1 + np.tanh(z @ state["head.spread.weight"].T + state["head.spread_bias"]))
    unsquashed = mean + np.exp(log_std) * noise
    gaussian = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)
    return np.tanh(unsquashed), (gaussian - np.log(1 - np.tanh(unsquashed) ** 2)).sum(-1)


def probabilities_of(s: np.ndarray, a: np.ndarray, critic: Critic, member: int, batch: bool) -> np.ndarray:
    state = arrays(critic, member)
    logits = features(np.concatenate((s, a), -1), state, batch) @ state["head.linear.weight"].T + state["head.bias"]
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def critic_loss_by_hand(
    learner: update.Learner, inputs: steps.Inputs, noise: torch.Tensor, bonus: bool = True
) -> tuple[float, list[float]]:
    """The loss, and every row's TD error: row by row, member by member, atom by atom."""
    field = {name: value.numpy() for name, value in vars(inputs).items() if value is not None}
    alpha = float(learner.alpha())
    atoms = [-SUPPORT + 2 * SUPPORT * k / (ATOMS - 1) for k in range(ATOMS)]
    next_action, log_prob = policy_of(field["next_observation"], arrays(learner.actor), noise.numpy(), batch=False)
    both = np.concatenate((field["critic_observation"], field["next_critic_observation"]))
    actions = np.concatenate((field["action"], next_action))
    target_p, online_p = (
        [probabilities_of(both, actions, network, member, batch=True) for member in range(2)]
        for network in (learner.target_critic, learner.critic)
    )
    total, errors = 0.0, []
    for row in range(ROWS):
        values = [sum(p[ROWS + row, k] * atoms[k] for k in range(ATOMS)) for p in target_p]
        chosen = target_p[values.index(min(values))][ROWS + row]
        target, mean, weight = [0.0] * ATOMS, 0.0, field["weight"][row] if "weight" in field else 1.0
        for k in range(ATOMS):
            soft = atoms[k] - (alpha * log_prob[row] if bonus else 0.0)
            moved = field["reward"][row] + field["discount"][row] * soft
            mean += chosen[k] * moved
            moved = min(max(moved, -SUPPORT), SUPPORT)
            b = (moved + SUPPORT) / (2 * SUPPORT / (ATOMS - 1))
            lower = min(int(b), ATOMS - 2)
            target[lower] += chosen[k] * (lower + 1 - b)
            target[lower + 1] += chosen[k] * (b - lower)
        for p in online_p:
            total -= weight * sum(target[k] * math.log(p[row, k]) for k in range(ATOMS))
        errors.append(sum(abs(mean - sum(p[row, k] * atoms[k] for k in range(ATOMS))) for p in online_p) / 2)
    return total / (2 * ROWS), errors


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("backup_entropy", [True, False])
@pytest.mark.parametrize("discount", [0.99, 0.97**3, 0.0])
def test_critic_loss_is_the_cross_entropy_on_the_projected_discounted_target(
    seed: int, backup_entropy: bool, discount: float
) -> None:
    learner, inputs, noise = learner_of(seed), inputs_of(seed, discount), noise_of(ROWS, seed)
    expected, _ = critic_loss_by_hand(copy.deepcopy(learner), inputs, noise, backup_entropy)
    loss, _ = update.critic_loss(
        learner.actor, learner.critic, learner.target_critic, learner.alpha(), inputs, noise, backup_entropy
    )
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-9)


def test_weights_multiply_each_rows_loss_and_td_errors_are_reported_for_them() -> None:
    learner, noise = learner_of(1), noise_of(ROWS, 1)
    inputs = dataclasses.replace(inputs_of(1), weight=torch.linspace(0.1, 1.0, ROWS))
    expected, errors = critic_loss_by_hand(copy.deepcopy(learner), inputs, noise)
    loss, metrics = update.critic_loss(
        learner.actor, learner.critic, learner.target_critic, learner.alpha(), inputs, noise
    )
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(metrics["td_error"].numpy(), errors, rtol=1e-4, atol=1e-5)
    assert not metrics["td_error"].requires_grad


@pytest.mark.parametrize("seed", range(3))
def test_actor_loss_is_the_soft_value_of_the_smaller_critic(seed: int) -> None:
    learner, inputs, noise = learner_of(seed), inputs_of(seed), noise_of(2 * ROWS, seed)
    field = {name: value.numpy() for name, value in vars(inputs).items() if value is not None}
    both = np.concatenate((field["observation"], field["next_observation"]))
    actions, log_probs = policy_of(both, arrays(learner.actor), noise.numpy(), batch=True)
    atoms = np.linspace(-SUPPORT, SUPPORT, ATOMS)
    values = [
        probabilities_of(field["critic_observation"], actions[:ROWS], learner.critic, member, batch=False) @ atoms
        for member in range(2)
    ]
    expected = (float(learner.alpha()) * log_probs[:ROWS] - np.minimum(*values)).mean()
    loss, metrics = update.actor_loss(learner.actor, learner.critic, learner.alpha(), inputs, noise)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-9)
    assert float(metrics["policy/entropy"]) == pytest.approx(-log_probs[:ROWS].mean(), rel=1e-9)


def buffers(network: torch.nn.Module) -> State:
    return {name: value.numpy().copy() for name, value in network.named_buffers() if "running" in name}


def moved(network: torch.nn.Module, before: State) -> bool:
    changed = {name: bool((value != before[name]).any()) for name, value in buffers(network).items()}
    assert len(set(changed.values())) == 1, f"either all statistics of a network move or none: {changed}"
    return next(iter(changed.values()))


def test_each_step_moves_the_running_statistics_of_its_table() -> None:
    learner, inputs = learner_of(), inputs_of()
    networks = {"actor": learner.actor, "critic": learner.critic, "target": learner.target_critic}
    table = {
        "actor": (lambda: update.actor_step(learner, inputs, noise_of(2 * ROWS), 1e-3), {"actor"}),
        "temperature": (lambda: steps.temperature_step(learner, torch.tensor(0.3), 1e-3), set()),
        "critic": (lambda: update.critic_step(learner, inputs, noise_of(ROWS), 1e-3), {"critic", "target"}),
    }
    for name, (do, expected) in table.items():
        before = {key: buffers(network) for key, network in networks.items()}
        do()
        assert {key for key, network in networks.items() if moved(network, before[key])} == expected, name


def test_running_statistics_move_by_a_hundredth_towards_those_of_both_halves_together() -> None:
    learner, inputs, noise = learner_of(), inputs_of(), noise_of(ROWS)
    before = {key: buffers(getattr(learner, key)) for key in ("actor", "critic", "target_critic")}
    next_action, _ = policy_of(inputs.next_observation.numpy(), arrays(learner.actor), noise.numpy(), batch=False)
    update.critic_step(learner, inputs, noise, 1e-3)
    update.actor_step(learner, inputs, noise_of(2 * ROWS), 1e-3)
    first = np.concatenate((inputs.critic_observation, inputs.action), -1)
    second = np.concatenate((inputs.next_critic_observation, next_action), -1)
    seen = {
        "actor": np.concatenate((inputs.observation, inputs.next_observation)),
        "critic": np.concatenate((first, second)),
        "target_critic": np.concatenate((first, second)),
    }
    for name, rows in seen.items():
        after = buffers(getattr(learner, name))
        for kind, of_batch in (("running_mean", rows.mean(0)), ("running_var", rows.var(0, ddof=1))):
            key = f"trunk.input_norm.{kind}"
            expected = 0.99 * before[name][key] + 0.01 * of_batch
            np.testing.assert_allclose(after[key], np.broadcast_to(expected, after[key].shape), rtol=1e-9)


def test_actor_step_leaves_the_critics_alone_and_the_critic_step_the_actor() -> None:
    learner, inputs = learner_of(), inputs_of()
    critics = {**arrays(learner.critic), **{f"t.{k}": v for k, v in arrays(learner.target_critic).items()}}
    actor = arrays(learner.actor)
    update.actor_step(learner, inputs, noise_of(2 * ROWS), 1e-3)
    for name, value in critics.items():
        network = learner.target_critic if name.startswith("t.") else learner.critic
        np.testing.assert_array_equal(arrays(network)[name.removeprefix("t.")], value)
    assert all(parameter.requires_grad for parameter in learner.critic.parameters())
    assert any((value != actor[name]).any() for name, value in arrays(learner.actor).items())
    actor, alpha = arrays(learner.actor), learner.log_alpha.clone()
    update.critic_step(learner, inputs, noise_of(ROWS), 1e-3)
    for name, value in arrays(learner.actor).items():
        np.testing.assert_array_equal(value, actor[name])
    assert torch.equal(learner.log_alpha, alpha)
    networks = (learner.actor, learner.critic, learner.target_critic)
    assert all(parameter.grad is None for network in networks for parameter in network.parameters())


def test_both_steps_end_on_the_norm_bounds() -> None:
    learner, inputs = learner_of(), inputs_of()
    update.actor_step(learner, inputs, noise_of(2 * ROWS), 0.1)
    update.critic_step(learner, inputs, noise_of(ROWS), 0.1)
    for network in (learner.actor, learner.critic):
        assert max(float(value) for value in NormBounds(network).deviations().values()) < 1e-6


def test_target_moves_by_its_rate_towards_the_projected_critic_and_is_not_projected() -> None:
    learner = learner_of()
    before = arrays(learner.target_critic)
    update.critic_step(learner, inputs_of(), noise_of(ROWS), 0.05)
    critic, after = arrays(learner.critic), arrays(learner.target_critic)
    for name in dict(learner.critic.named_parameters()):
        np.testing.assert_allclose(after[name], 0.99 * before[name] + 0.01 * critic[name], rtol=1e-12, atol=1e-15)
    assert float(NormBounds(learner.target_critic).deviations()["linear_rows"]) > 1e-6


def test_twin_critics_in_one_module_equal_two_critics() -> None:
    learner = learner_of()
    s, a = inputs_of().critic_observation, inputs_of().action
    for batch in (True, False):
        singles = []
        for member in range(2):
            single = Critic(PRIVILEGED, ACTIONS, 8, 2, Categorical(ATOMS, SUPPORT), members=1).double()
            single.load_state_dict({k: v[member : member + 1] for k, v in learner.critic.state_dict().items()})
            singles.append(single(s, a, batch)[0])
        torch.testing.assert_close(copy.deepcopy(learner.critic)(s, a, batch), torch.stack(singles))


@pytest.mark.parametrize(("entropy", "grows"), [(-5.0, True), (5.0, False)])
def test_temperature_grows_while_the_policy_is_too_certain(entropy: float, grows: bool) -> None:
    learner = learner_of()
    learner.target_entropy = 0.0
    before = float(learner.alpha())
    metrics = steps.temperature_step(learner, torch.tensor(entropy).double(), 1e-2)
    assert (float(learner.alpha()) > before) == grows
    assert float(metrics["policy/alpha"]) == pytest.approx(before)
    assert float(metrics["loss/temperature"]) == pytest.approx(before * entropy)


def test_temperature_step_is_that_of_adam_on_the_derived_gradient() -> None:
    learner, rate = learner_of(), 1e-2
    log_alpha = learner.log_alpha.detach().clone().requires_grad_(True)
    adam = torch.optim.Adam([log_alpha], rate, fused=True)
    for entropy in (-5.0, 0.3, 40.0, -0.1):
        moved = torch.tensor(entropy).to(log_alpha.dtype)
        (log_alpha.exp() * (moved - learner.target_entropy)).sum().backward()
        adam.step()
        adam.zero_grad()
        steps.temperature_step(learner, moved, rate)
        assert torch.equal(learner.log_alpha, log_alpha)


def test_target_entropy_is_that_of_a_gaussian_of_the_given_deviation() -> None:
    gaussian = torch.distributions.Normal(torch.zeros(7).double(), torch.full((7,), 0.15).double())
    assert update.target_entropy(7, 0.15) == pytest.approx(float(gaussian.entropy().sum()), rel=1e-7)


def test_learning_rate_is_half_a_cosine_between_its_ends() -> None:
    start, end = 3e-4, 1.5e-4
    assert steps.learning_rate(0, start, end) == pytest.approx(start)
    assert steps.learning_rate(0.5, start, end) == pytest.approx((start + end) / 2)
    assert steps.learning_rate(1, start, end) == pytest.approx(end)
    assert steps.learning_rate(1.7, start, end) == steps.learning_rate(1, start, end)
    for position in np.linspace(0, 1, 7):
        expected = 1.5e-4 + 0.75e-4 * (1 + math.cos(math.pi * position))
        assert steps.learning_rate(position, start, end) == pytest.approx(expected, rel=1e-12)
