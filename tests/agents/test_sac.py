"""Plain SAC: networks, losses and one whole update against torch.distributions, plain loops and torch's own modules."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from batches import random_batch
from synchronisation import no_synchronisation
from torch import nn

from rlplastic.acceleration import compiled as compiler
from rlplastic.agents import parameter_bytes, steps
from rlplastic.agents.adam import Adam
from rlplastic.agents.heads import Scalar
from rlplastic.agents.sac import SAC, update
from rlplastic.agents.sac.networks import Actor, Critic, actor_like
from rlplastic.composition import compose
from rlplastic.config import SACConfig, ScalarCriticConfig
from rlplastic.envs.base import Step
from rlplastic.machine import probe_machine
from rlplastic.presets import resolve
from rlplastic.progress import MetricMeans
from rlplastic.replay.sample import Batch

DIMS = {"policy": 4, "critic": 6}
ACTIONS, ENVS, ROWS, WIDTH, DEPTH, GAMMA = 2, 3, 7, 8, 2, 0.99
RATE, TAU = 3e-4, 0.005


def agent_of(seed: int = 0, compile: Any = lambda function: function, **settings: Any) -> SAC:
    config = SACConfig(critic_width=WIDTH, actor_width=WIDTH, gamma=GAMMA, **{"initial_alpha": 1.0, **settings})
    return SAC(DIMS, ACTIONS, ENVS, config, ScalarCriticConfig(), seed=seed, compile=compile)


def batch_of(index: int = 0, weights: bool = False) -> Batch:
    batch = random_batch(DIMS, ACTIONS, ROWS, index, kept=0.7)
    return replace(batch, weight=torch.linspace(0.2, 1, ROWS)) if weights else batch


def noise_of(seed: int) -> torch.Tensor:
    return torch.randn(ROWS, ACTIONS, generator=torch.Generator().manual_seed(seed))


def doubled(agent: SAC) -> SAC:
    """The agent in float64, its target no longer equal to its critic."""
    learner = agent.learner
    for network in (learner.actor, learner.critic, learner.target_critic):
        network.double()
    with torch.no_grad():
        for parameter in learner.target_critic.parameters():
            parameter.add_(0.05)
    learner.log_alpha.data = learner.log_alpha.data.double()
    decay = agent.config.weight_decay
    learner.actor_optimizer = Adam(learner.actor.parameters(), decay)
    learner.critic_optimizer = Adam(learner.critic.parameters(), decay)
    learner.temperature_optimizer = Adam([learner.log_alpha])
    return agent


def inputs_of(index: int = 0, weights: bool = False) -> steps.Inputs:
    inputs = steps.inputs_of(batch_of(index, weights), "critic")
    return steps.Inputs(**{name: None if v is None else v.double() for name, v in vars(inputs).items()})


def torch_network(source: nn.Module, heads: list[str], member: int | None = None) -> nn.ModuleDict:
    """The same network out of torch.nn's own layers, for one member, in float64."""

    def own(tensor: torch.Tensor) -> torch.Tensor:
        return (tensor if member is None else tensor[member]).detach().double().clone()

    def linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
        layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
        layer.weight.data, layer.bias.data = weight, bias
        return layer

    layers: list[nn.Module] = []
    for layer in source.trunk:
        if hasattr(layer, "weight"):
            layers.append(linear(own(layer.weight), own(layer.bias)))
        elif hasattr(layer, "gain"):
            norm = nn.LayerNorm(layer.gain.shape[-1], dtype=torch.float64)
            norm.weight.data, norm.bias.data = own(layer.gain), own(layer.bias)
            layers.append(norm)
        else:
            layers.append(nn.ReLU())
    named: dict[str, nn.Module] = {"trunk": nn.Sequential(*layers)}
    named |= {head: linear(own(getattr(source, head).weight), own(getattr(source, head).bias)) for head in heads}
    return nn.ModuleDict(named)


def policy(actor: nn.ModuleDict, observation: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Action and log-probability by torch.distributions."""
    features = actor["trunk"](observation)
    mean, log_std = actor["mean"](features), actor["log_std"](features).clamp(-20, 2)
    gaussian = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(
        gaussian, [torch.distributions.transforms.TanhTransform(cache_size=1)]
    )
    action = torch.tanh(mean + log_std.exp() * noise)
    unsquashed = mean + log_std.exp() * noise
    squashed.transforms[0]._cached_x_y = (unsquashed, action)
    return action, squashed.log_prob(action).sum(-1)


def value(critic: nn.ModuleDict, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    return critic["head"](critic["trunk"](torch.cat((observation, action), 1)))[:, 0]


class Reference:
    """The same agent as separate torch networks and torch's optimizers: one update, as the paper states it."""

    def __init__(self, agent: SAC) -> None:
        learner, decay = agent.learner, agent.config.weight_decay
        self.actor = torch_network(learner.actor, ["mean", "log_std"])
        self.critics = [torch_network(learner.critic, ["head"], member) for member in range(2)]
        self.targets = [torch_network(learner.target_critic, ["head"], member) for member in range(2)]
        self.log_alpha = learner.log_alpha.detach().clone().requires_grad_(True)
        of_critics = [parameter for critic in self.critics for parameter in critic.parameters()]
        self.critic_optimizer = torch.optim.AdamW(of_critics, lr=RATE, weight_decay=decay)
        self.actor_optimizer = torch.optim.AdamW(self.actor.parameters(), lr=RATE, weight_decay=decay)
        self.temperature_optimizer = torch.optim.Adam([self.log_alpha], lr=RATE)

    def critic_loss(self, inputs: steps.Inputs, noise: torch.Tensor) -> torch.Tensor:
        """Row by row, member by member."""
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            next_action, next_log_prob = policy(self.actor, inputs.next_observation, noise)
            next_values = [value(target, inputs.next_critic_observation, next_action) for target in self.targets]
        values = [value(critic, inputs.critic_observation, inputs.action) for critic in self.critics]
        total = torch.zeros((), dtype=torch.float64)
        for row in range(ROWS):
            soft = min(float(next_values[0][row]), float(next_values[1][row])) - float(alpha * next_log_prob[row])
            y = float(inputs.reward[row]) + float(inputs.discount[row]) * soft
            weight = 1.0 if inputs.weight is None else float(inputs.weight[row])
            for member in range(2):
                total = total + weight * (values[member][row] - y) ** 2
        return total / (2 * ROWS)

    def actor_loss(self, inputs: steps.Inputs, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        action, log_prob = policy(self.actor, inputs.observation, noise)
        values = [value(critic, inputs.critic_observation, action) for critic in self.critics]
        total = torch.zeros((), dtype=torch.float64)
        for row in range(ROWS):
            smaller = values[0][row] if values[0][row] < values[1][row] else values[1][row]
            total = total + self.log_alpha.detach().exp()[0] * log_prob[row] - smaller
        return total / ROWS, log_prob.detach()

    def update(self, inputs: steps.Inputs, actor_noise: torch.Tensor, target_noise: torch.Tensor) -> None:
        self.critic_optimizer.zero_grad()
        self.critic_loss(inputs, target_noise).backward()
        self.critic_optimizer.step()
        self.actor_optimizer.zero_grad()
        loss, log_prob = self.actor_loss(inputs, actor_noise)
        loss.backward()
        self.actor_optimizer.step()
        self.temperature_optimizer.zero_grad()
        (self.log_alpha.exp() * -(log_prob - ACTIONS).mean()).sum().backward()
        self.temperature_optimizer.step()
        with torch.no_grad():
            for target, critic in zip(self.targets, self.critics, strict=True):
                for slow, fast in zip(target.parameters(), critic.parameters(), strict=True):
                    slow.copy_((1 - TAU) * slow + TAU * fast)


OPTIONS = [{}, {"layer_norm": True}, {"weight_decay": 0.1}, {"layer_norm": True, "weight_decay": 0.1}]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "layer norm", "weight decay", "both"])
@pytest.mark.parametrize("weights", [False, True])
def test_updates_are_those_of_separate_networks_and_torchs_optimizers(options: dict[str, Any], weights: bool) -> None:
    agent = doubled(agent_of(**options))
    reference = Reference(agent)
    for index in range(4):
        inputs, noises = inputs_of(index, weights), [noise_of(2 * index + k).double() for k in range(2)]
        reference.update(inputs, *noises)
        agent.update_with(inputs, *noises, budget_used=index / 4)
    learner = agent.learner
    for ours, theirs in [
        (torch_network(learner.actor, ["mean", "log_std"]), reference.actor),
        *((torch_network(learner.critic, ["head"], m), reference.critics[m]) for m in range(2)),
        *((torch_network(learner.target_critic, ["head"], m), reference.targets[m]) for m in range(2)),
    ]:
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(learner.log_alpha, reference.log_alpha, rtol=1e-9, atol=1e-12)
    assert agent.updates == 4 and float(learner.log_alpha.detach()) != 0


@pytest.mark.parametrize("seed", range(3))
def test_losses_and_metrics_are_those_of_plain_loops(seed: int) -> None:
    agent = doubled(agent_of(seed, layer_norm=seed == 1))
    reference, learner = Reference(agent), agent.learner
    inputs, noise = inputs_of(seed, weights=True), noise_of(seed).double()
    loss, metrics = update.critic_loss(
        learner.actor, learner.critic, learner.target_critic, learner.alpha(), inputs, noise
    )
    assert float(loss) == pytest.approx(float(reference.critic_loss(inputs, noise)), rel=1e-9)
    values = torch.stack([value(critic, inputs.critic_observation, inputs.action) for critic in reference.critics])
    next_action, log_prob = policy(reference.actor, inputs.next_observation, noise)
    next_value = torch.stack([value(t, inputs.next_critic_observation, next_action) for t in reference.targets])
    target = inputs.reward + inputs.discount * (next_value.min(0).values - log_prob)  # alpha starts at 1
    torch.testing.assert_close(metrics["td_error"], (values - target).abs().mean(0).detach())
    assert not metrics["td_error"].requires_grad
    loss, metrics = update.actor_loss(learner.actor, learner.critic, learner.alpha(), inputs, noise)
    expected, log_prob = reference.actor_loss(inputs, noise)
    assert float(loss) == pytest.approx(float(expected), rel=1e-9)
    assert float(metrics["policy/entropy"]) == pytest.approx(-float(log_prob.mean()), rel=1e-9)


def test_without_the_entropy_bonus_the_target_is_the_plain_bootstrap() -> None:
    learner = doubled(agent_of()).learner
    inputs, noise = inputs_of(weights=True), noise_of(0).double()
    arguments = (learner.actor, learner.critic, learner.target_critic)
    losses = [
        float(update.critic_loss(*arguments, torch.tensor(alpha).double(), inputs, noise, bonus)[0])
        for alpha, bonus in ((0.0, True), (0.7, False), (0.7, True))
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("layer_norm", [False, True])
def test_twin_critics_in_one_module_equal_two_networks_and_learn_nothing_of_each_other(layer_norm: bool) -> None:
    critic = Critic(6, ACTIONS, WIDTH, 3, Scalar(), members=2, layer_norm=layer_norm).double()
    singles = [torch_network(critic, ["head"], member) for member in range(2)]
    inputs = inputs_of()
    together = critic(inputs.critic_observation, inputs.action)
    apart = torch.stack([value(single, inputs.critic_observation, inputs.action) for single in singles])
    torch.testing.assert_close(together, apart)
    together[0].square().mean().backward()
    assert all(parameter.grad is None or not parameter.grad[1].any() for parameter in critic.parameters())
    assert not torch.equal(critic.head.weight[0], critic.head.weight[1])


def test_log_std_is_cut_off_and_initial_weights_are_torchs() -> None:
    actor = Actor(200, 1000, 300, 1)
    with torch.no_grad():
        actor.log_std.weight.mul_(1e4)
        _, log_std = actor(torch.randn(20, 200))
    assert float(log_std.min()) == -20 and float(log_std.max()) == 2
    layer, theirs = actor.trunk[0], nn.Linear(200, 300)
    for name in ("weight", "bias"):
        ours, expected = getattr(layer, name).detach(), getattr(theirs, name).detach()
        assert float(ours.abs().max()) <= 1 / math.sqrt(200)
        assert float(ours.std()) == pytest.approx(float(expected.std()), rel=0.1)


@pytest.mark.parametrize(("depth", "layer_norm"), [(1, False), (2, True), (3, False)])
def test_an_actor_is_made_in_the_sizes_of_its_tensors(depth: int, layer_norm: bool) -> None:
    actor = Actor(5, 3, 16, depth, layer_norm)
    again = actor_like(actor.state_dict())
    again.load_state_dict(actor.state_dict())
    observation = torch.randn(4, 5)
    for ours, theirs in zip(again(observation), actor(observation), strict=True):
        assert torch.equal(ours, theirs)


# The agent


def worked(agent: SAC, first: int, count: int) -> list[np.ndarray]:
    """Act, observe and update ``count`` times; everything the outside sees."""
    seen = []
    for index in range(first, first + count):
        rng = np.random.default_rng(index)
        observation = {name: rng.normal(size=(ENVS, dim)).astype(np.float32) for name, dim in DIMS.items()}
        reward, flags = rng.normal(size=ENVS).astype(np.float32), np.zeros(ENVS, bool)
        seen.append(agent.explore(observation, index, ~flags, uniform=False))
        agent.observe(Step(observation, reward, flags, flags, {}), ~flags)
        seen.append(agent.reward_scale.numpy().copy())
        metrics = agent.update(batch_of(index), budget_used=index / 20)
        seen += [np.array(float(metrics[name])) for name in sorted(metrics)]
        seen.append(agent.act(observation))
    return seen


@pytest.mark.parametrize("warm_up", [0, 3])
@pytest.mark.parametrize("options", [{}, {"layer_norm": True, "weight_decay": 0.1, "reward_scaling": True}])
def test_state_round_trip_continues_bit_for_bit(warm_up: int, options: dict[str, Any]) -> None:
    first, second = agent_of(**options), agent_of(seed=0, **options)
    worked(first, 0, warm_up)
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    expected = worked(first, warm_up, 5)
    worked(second, 50, 3)
    second.load_state_dict(state)
    for ours, theirs in zip(worked(second, warm_up, 5), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    again = second.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.state_dict().items())


def test_seeds_tell_agents_apart_and_nothing_else_does() -> None:
    torch.manual_seed(1)
    first = worked(agent_of(), 0, 3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = worked(agent_of(), 0, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))
    assert not (worked(agent_of(seed=1), 0, 1)[0] == first[0]).all()


def test_defaults_are_those_of_stable_baselines3() -> None:
    config, _ = resolve(compose(["agent=sac", "env=hopper", "device=cpu"]), probe_machine("cpu"))
    agent, replay = config.agent, config.replay
    assert isinstance(agent, SACConfig)
    assert (agent.actor_width, agent.actor_depth, agent.critic_width, agent.critic_depth) == (256, 2, 256, 2)
    assert (agent.learning_rate, agent.final_learning_rate, agent.target_rate) == (3e-4, None, 0.005)
    assert (agent.initial_alpha, agent.actor_every, agent.gamma, agent.n_step) == (1.0, 1, 0.99, 1)
    assert (replay.batch_size, config.replay_ratio, config.critic.num_members) == (256, 1.0, 2)
    assert not (agent.reward_scaling or agent.layer_norm or agent.weight_decay)
    assert agent_of().learner.target_entropy == -ACTIONS and float(agent_of().learner.alpha()) == 1


@pytest.mark.parametrize(
    ("overrides", "alpha"),
    [
        (["critic=categorical"], 0.01),
        (["critic=flow"], 0.01),
        (["agent.reward_scaling=true"], 0.01),
        (["critic=categorical", "agent.reward_scaling=false"], 1.0),
        (["critic=flow", "agent.initial_alpha=0.5"], 0.5),
    ],
)
def test_the_temperature_starts_low_where_rewards_are_scaled(overrides: list[str], alpha: float) -> None:
    config, _ = resolve(compose(["agent=sac", "env=hopper", "device=cpu", *overrides]), probe_machine("cpu"))
    assert config.agent.initial_alpha == alpha


def test_rewards_are_scaled_by_the_deviation_alone_when_asked() -> None:
    agents = [agent_of(), agent_of(reward_scaling=True)]
    reward, flags = np.array([1.0, 30.0, -4.0], np.float32), np.zeros(ENVS, bool)
    for agent in agents:
        agent.observe(Step({}, reward, flags, flags, {}), ~flags)
    assert float(agents[0].reward_scale) == 1
    assert float(agents[1].reward_scale) == pytest.approx(1 / reward.astype(float).std(), rel=1e-6)


def test_learning_rate_is_constant_unless_a_final_one_is_asked_for() -> None:
    cosine = 1e-4 + 1e-4 * (1 + math.cos(0.6 * math.pi))
    for final, expected in ((None, 3e-4), (1e-4, cosine)):
        agent = agent_of(final_learning_rate=final)
        agent.update(batch_of(), budget_used=0.6)
        learner = agent.learner
        for optimizer in (learner.actor_optimizer, learner.critic_optimizer, learner.temperature_optimizer):
            assert optimizer.rate == pytest.approx(expected, rel=1e-12)


def test_weight_decay_shrinks_all_of_actor_and_critic_and_leaves_the_temperature_alone() -> None:
    decay = 100.0
    agent = agent_of(weight_decay=decay, layer_norm=True, initial_alpha=3.0)
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    agent.update(batch_of(), 0.0)
    after = agent.state_dict()
    for name, tensor in before.items():
        if name.startswith(("actor.", "critic.", "temperature.")):
            kept = 1.0 if name.startswith("temperature.") else 1 - RATE * decay
            # Adam's first step moves nothing by more than the rate
            assert float((after[name] - kept * tensor).abs().max()) <= 1.01 * RATE, name


@pytest.mark.parametrize("every", [1, 3])
def test_actor_and_temperature_learn_on_every_nth_update_the_first_included(every: int) -> None:
    agent = agent_of(actor_every=every)
    for index in range(5):
        before = copy.deepcopy(agent.state_dict())
        metrics = agent.update(batch_of(index), 0.0)
        after, due = agent.state_dict(), index % every == 0
        assert ("loss/actor" in metrics) == ("loss/temperature" in metrics) == due
        assert torch.equal(before["actor.mean.weight"], after["actor.mean.weight"]) != due
        assert torch.equal(before["temperature.log_alpha"], after["temperature.log_alpha"]) != due
        assert not torch.equal(before["target_critic.head.weight"], after["target_critic.head.weight"])


def test_exploration_is_fresh_policy_noise_in_every_step() -> None:
    agent = agent_of()
    observation = {"policy": np.zeros((ENVS, DIMS["policy"]), np.float32)}
    mean, log_std = agent.learner.actor(torch.zeros(1, DIMS["policy"]))
    everywhere = np.ones(ENVS, bool)
    actions = np.stack([agent.explore(observation, step, everywhere, uniform=False) for step in range(2000)])
    noise = (torch.from_numpy(actions).double().atanh() - mean.detach()) / log_std.detach().exp()
    assert float(noise.mean()) == pytest.approx(0, abs=0.03) and float(noise.std()) == pytest.approx(1, abs=0.03)
    flat = noise.reshape(2000, -1)
    assert abs(float((flat[1:] * flat[:-1]).mean())) < 0.03
    assert np.abs(agent.explore(observation, 0, everywhere, uniform=True)).max() <= 1


def test_parts_of_another_agent_are_taken_alone() -> None:
    old, new = agent_of(seed=1), agent_of()
    worked(old, 0, 2)
    before, theirs = copy.deepcopy(new.state_dict()), old.state_dict()
    new.initialise(theirs, ["critic"])
    state = new.state_dict()
    for name in ("critic.head.weight", "target_critic.trunk.0.weight"):
        assert torch.equal(state[name], theirs[name])
    assert torch.equal(state["actor.mean.weight"], before["actor.mean.weight"])
    new.initialise(theirs, ["actor"])
    state = new.state_dict()
    for name in ("actor.mean.weight", "temperature.log_alpha"):
        assert torch.equal(state[name], theirs[name])
    with pytest.raises(RuntimeError, match="size mismatch"):
        SAC({"policy": 9}, ACTIONS, ENVS, new.config, ScalarCriticConfig()).initialise(theirs, ["actor"])


def test_updates_and_their_metrics_never_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, means, batches = agent_of(), MetricMeans(), [batch_of(index, weights=True) for index in range(3)]
    with no_synchronisation(monkeypatch):
        for batch in batches:
            means.add(agent.update(batch, 0.5))
            assert agent.td_error is not None and agent.norms() == {}
    assert all(p.grad is None for network in agent.modules.values() for p in network.parameters())


@pytest.mark.slow
def test_compiled_equals_eager_and_compiles_nothing_after_the_second_update() -> None:
    eager = agent_of(layer_norm=True, actor_every=2)
    compiled = agent_of(0, compiler, layer_norm=True, actor_every=2)
    found = worked(compiled, 0, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        found += worked(compiled, 2, 30)
    for ours, theirs in zip(found, worked(eager, 0, 32), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_updates_on_a_gpu_are_those_on_a_cpu() -> None:
    config = SACConfig(critic_width=WIDTH, actor_width=WIDTH, gamma=GAMMA, initial_alpha=1.0, layer_norm=True)
    cpu, gpu = (SAC(DIMS, ACTIONS, ENVS, config, ScalarCriticConfig(), device=device) for device in ("cpu", "cuda"))
    gpu.load_state_dict(cpu.state_dict())
    for index in range(5):
        inputs, noise = steps.inputs_of(batch_of(index), "critic"), noise_of(index)
        on_gpu = steps.Inputs(**{name: None if v is None else v.cuda() for name, v in vars(inputs).items()})
        cpu.update_with(inputs, noise, noise, 0.0)
        gpu.update_with(on_gpu, noise.cuda(), noise.cuda(), 0.0)
    state = gpu.state_dict()
    for name, tensor in cpu.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer_norm", ["true", "false"])
def test_memory_of_the_networks_is_estimated_before_they_are_made(layer_norm: str) -> None:
    from rlplastic.agents import make_agent

    asked = compose(["agent=sac", "agent.critic_depth=3", f"agent.layer_norm={layer_norm}", "device=cpu"])
    config, _ = resolve(asked, probe_machine("cpu"))
    dims = {"policy": 40, "critic": 60}
    learner = make_agent(config, dims, 7).learner  # type: ignore[attr-defined]
    critic, actor = (sum(p.numel() for p in net.parameters()) for net in (learner.critic, learner.actor))
    assert parameter_bytes(config, dims, 7) == pytest.approx(4 * (5 * critic + 4 * actor), rel=0.05)
