"""Flow-matching critics against scipy, torchdiffeq, plain loops, and the monolithic critic that one is at t = 0."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from batches import random_batch
from scipy.stats import norm
from synchronisation import no_synchronisation

from rlplastic.acceleration import compiled as compiler
from rlplastic.agents import make_agent, parameter_bytes, steps
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.flashsac import update as flashsac_update
from rlplastic.agents.flow import Encoding, FlowCritic, FlowNoise
from rlplastic.agents.heads import Scalar, squashed_sample
from rlplastic.agents.sac import SAC
from rlplastic.agents.sac import update as sac_update
from rlplastic.agents.sac.networks import Critic
from rlplastic.composition import compose
from rlplastic.config import FlashSACConfig, FlowCriticConfig, SACConfig
from rlplastic.machine import probe_machine
from rlplastic.presets import resolve
from rlplastic.progress import MetricMeans
from rlplastic.replay.sample import Batch

DIMS = {"policy": 4, "critic": 6}
ACTIONS, ROWS, WIDTH, MEMBERS, BINS, SUPPORT = 2, 5, 8, 2, 50, 5.0
Agent = FlashSAC | SAC
AGENTS = pytest.mark.parametrize("name", ["flashsac", "sac"])


def agent_of(name: str, seed: int = 0, compile: Any = lambda function: function, **settings: Any) -> Agent:
    critic = FlowCriticConfig(**({"steps": 3, "noises": 4} | settings))
    if name == "flashsac":
        config = FlashSACConfig(critic_width=WIDTH, actor_width=WIDTH, num_blocks=1, gamma=0.99, initial_alpha=0.2)
        return FlashSAC(DIMS, ACTIONS, 3, config, critic, seed=seed, compile=compile)
    sac = SACConfig(critic_width=WIDTH, actor_width=WIDTH, gamma=0.99, initial_alpha=0.2, layer_norm=seed % 2 == 0)
    return SAC(DIMS, ACTIONS, 3, sac, critic, seed=seed, compile=compile)


def doubled(agent: Agent) -> Agent:
    """The agent in float64, with parameters and statistics that have left their initial values."""
    rng = torch.Generator().manual_seed(1)
    learner = agent.learner
    with torch.no_grad():
        for network in (learner.actor, learner.critic, learner.target_critic):
            network.double()
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.rand(parameter.shape, generator=rng, dtype=torch.float64))
        learner.log_alpha.data = learner.log_alpha.data.double()
    return agent


def batch_of(index: int = 0, weights: bool = False, rows: int = ROWS) -> Batch:
    batch = random_batch(DIMS, ACTIONS, rows, index, kept=0.7)
    return replace(batch, weight=torch.linspace(0.2, 1, rows)) if weights else batch


def inputs_of(index: int = 0, weights: bool = False) -> steps.Inputs:
    inputs = steps.inputs_of(batch_of(index, weights), "critic")
    return steps.Inputs(**{name: None if v is None else v.double() for name, v in vars(inputs).items()})


def noise_of(agent: Agent, seed: int = 0, rows: int = ROWS) -> FlowNoise:
    critic = agent.learner.critic
    assert isinstance(critic, FlowCritic)
    drawn = critic.noise(rows, ACTIONS, torch.Generator().manual_seed(seed))
    return FlowNoise(*(tensor.double() for tensor in drawn))


def loss_of(agent: Agent, inputs: steps.Inputs, noise: FlowNoise, bonus: bool = True) -> tuple[torch.Tensor, Any]:
    learner = agent.learner
    loss = (flashsac_update if isinstance(agent, FlashSAC) else sac_update).flow_critic_loss
    return loss(learner.actor, learner.critic, learner.target_critic, learner.alpha(), inputs, noise, bonus)


# What goes in: code of z, time, noises


@pytest.mark.parametrize("dim", [-1, -3])
def test_code_is_the_gaussians_mass_in_every_bin_and_sums_to_one(dim: int) -> None:
    encoding = Encoding(SUPPORT, "cosines", dim).double()
    z = torch.tensor([[-40.0, -5.5, -1.3, 0.0], [0.2, 4.9, 5.5, 1e9]]).double()
    edges = np.linspace(-5.5, 5.5, BINS + 1)
    expected = np.diff(norm.cdf((edges - z.numpy().clip(-5.5, 5.5)[..., None]) / (16 * 11 / BINS)))
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(encoding.code(z).movedim(dim, -1), expected, atol=1e-7)  # edges are those of float32
    assert encoding.state_dict() == {}


@pytest.mark.parametrize(("kind", "number"), [("cosines", 64), ("cosine", 1), ("none", 0)])
def test_time_is_told_by_the_cosines_of_the_paper_of_its_code_or_not_at_all(kind: str, number: int) -> None:
    times = torch.tensor([[0.0, 0.3], [0.5, 1.0]])
    found = Encoding(SUPPORT, kind, -1).time(times)
    assert found.shape == (2, 2, number)
    for index in range(number):
        factor = math.pi * index if kind == "cosines" else 1.0
        np.testing.assert_allclose(found[..., index], np.cos(factor * times.numpy()), atol=2e-5)


@pytest.mark.parametrize("noises", [1, 4, 5])
def test_noises_cover_their_share_of_the_support_and_the_bank_comes_in_pairs(noises: int) -> None:
    fresh = agent_of("sac", noises=noises, coverage=0.2).learner.critic
    assert isinstance(fresh, FlowCritic) and fresh.bank.shape == (noises, 1)
    torch.testing.assert_close(fresh.bank.sort(0).values, -fresh.bank.sort(0, descending=True).values)
    drawn = fresh.noise(4000, ACTIONS, torch.Generator().manual_seed(0))
    for values in (drawn.target, drawn.source, drawn.reading):
        assert values.shape == (noises, 4000) and float(values.abs().max()) <= 1
        assert float(values.min()) < -0.99 < 0.99 < float(values.max())
        assert float(values.mean()) == pytest.approx(0, abs=0.04)
        assert float(values.std()) == pytest.approx(1 / math.sqrt(3), abs=0.02)
    assert float(drawn.time.min()) >= 0 and float(drawn.time.max()) < 1 and float(drawn.time.mean()) > 0.45
    banked = agent_of("sac", noises=noises, coverage=0.2, noise="bank").learner.critic
    assert isinstance(banked, FlowCritic)
    drawn = banked.noise(10, ACTIONS, torch.Generator().manual_seed(0))
    assert drawn.target is banked.bank and drawn.reading is banked.bank and drawn.source.shape == (noises, 10)


# The integration


def critic_with(**settings: Any) -> FlowCritic:
    critic = agent_of("sac", **settings).learner.critic
    assert isinstance(critic, FlowCritic)
    return critic


@pytest.mark.parametrize("number", [1, 2, 8])
def test_trajectories_are_those_of_torchdiffeqs_euler_method(number: int) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    source = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def velocity(z: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * z) + time * z.square() - 0.5

    times = torch.linspace(0, 1, number + 1, dtype=torch.float64)
    expected = torchdiffeq.odeint(lambda t, z: velocity(z, t), source, times, method="euler")
    found = critic_with(steps=number).trajectory(velocity, source)
    torch.testing.assert_close(torch.stack(found), expected)


def test_predicted_endpoints_are_reached_whatever_the_number_of_steps() -> None:
    end, source = torch.tensor([1.0, -2.0]), torch.tensor([[0.3, 0.1]])
    for number in (1, 3, 8):
        points = critic_with(prediction="endpoint", steps=number).trajectory(lambda z, t: end.expand_as(z), source)
        torch.testing.assert_close(points[-1], end.expand_as(source))
        torch.testing.assert_close(points[1], source + (end - source) / number)


# The loss


def rms(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean() + 1e-6) * gain


class ByHand:
    """One member of a flow critic, one row, one z and one t at a time, out of its saved tensors."""

    def __init__(self, critic: FlowCritic, member: int, joint: np.ndarray | None = None) -> None:
        self.state = {k: v.detach().numpy()[member] for k, v in critic.named_parameters()}
        self.settings = critic.settings
        self.joint = joint
        """All rows whose statistics FlashSAC's batch norms use; None: plain SAC."""

    def normalised(self, x: np.ndarray, all_rows: np.ndarray, name: str) -> np.ndarray:
        scaled = (x - all_rows.mean(0)) / np.sqrt(all_rows.var(0) + 1e-5)
        return scaled * self.state[f"{name}.gamma"] + self.state[f"{name}.beta"]

    def velocity(self, pair: np.ndarray, z: float, time: float) -> float:
        s = {k.removeprefix("field."): v for k, v in self.state.items()}
        edges = np.linspace(-5.5, 5.5, BINS + 1, dtype=np.float32).astype(float)
        code = np.diff(norm.cdf((edges - np.clip(z, edges[0], edges[-1])) / (16 * (edges[-1] - edges[0]) / BINS)))
        code /= code.sum()
        cosines = np.cos(np.float32(math.pi) * np.arange(64) * time)
        if self.joint is None:
            h = s["trunk.0.weight"] @ np.concatenate((pair, code, cosines)) + s["trunk.0.bias"]
            return self.sac_layers(h, {k.removeprefix("trunk."): v for k, v in s.items()}, s)
        h = s["embed.weight"] @ self.normalised(pair, self.joint, "field.input_norm")
        h = h + s["embed_code.weight"] @ rms(code, s["code_norm.gain"]) + s["embed_time.weight"] @ cosines
        u = np.maximum(rms(s["blocks.0.expand.weight"] @ h, s["blocks.0.expand_norm.gain"]), 0)
        h = h + np.maximum(rms(s["blocks.0.contract.weight"] @ u, s["blocks.0.contract_norm.gain"]), 0)
        return float(s["head.linear.weight"][0] @ rms(h, s["post_norm.gain"]) + s["head.bias"][0])

    @staticmethod
    def sac_layers(h: np.ndarray, layers: dict[str, np.ndarray], whole: dict[str, np.ndarray]) -> float:
        """What follows the first product: norm (if any), ReLU, product, norm, ReLU, head."""
        normed = "1.gain" in layers

        def rectified(h: np.ndarray, index: int) -> np.ndarray:
            if normed:
                h = (h - h.mean()) / np.sqrt(h.var() + 1e-5) * layers[f"{index}.gain"] + layers[f"{index}.bias"]
            return np.maximum(h, 0)

        second = 3 if normed else 2
        h = layers[f"{second}.weight"] @ rectified(h, 1) + layers[f"{second}.bias"]
        return float((whole["head.weight"] @ rectified(h, second + 1) + whole["head.bias"])[0])

    def end(self, pair: np.ndarray, z: float) -> float:
        number = self.settings.steps
        for step in range(number):
            moved = self.velocity(pair, z, step / number)
            if self.settings.prediction == "endpoint":
                moved = (moved - z) / (1 - step / number)
            z += moved / number
        return z

    def distilled(self, pairs: np.ndarray, row: int) -> float:
        """The scalar critic at one of ``pairs``, the rows of its statistics."""
        s = {k.removeprefix("distilled."): v for k, v in self.state.items() if k.startswith("distilled.")}
        if self.joint is None:
            trunk = {k.removeprefix("trunk."): v for k, v in s.items()}
            h = trunk["0.weight"] @ pairs[row] + trunk["0.bias"]
            return self.sac_layers(h, trunk, s)
        h = self.normalised(pairs, pairs, "distilled.trunk.input_norm") @ s["trunk.embed.weight"].T
        block = "trunk.blocks.0"
        u = h @ s[f"{block}.expand.weight"].T
        u = np.maximum(self.normalised(u, u, f"distilled.{block}.expand_norm"), 0) @ s[f"{block}.contract.weight"].T
        h = h + np.maximum(self.normalised(u, u, f"distilled.{block}.contract_norm"), 0)
        return float(s["head.linear.weight"][0] @ rms(h[row], s["trunk.post_norm.gain"]) + s["head.bias"][0])


def loss_by_hand(
    agent: Agent, inputs: steps.Inputs, noise: FlowNoise, bonus: bool
) -> tuple[float, list[float], list[float]]:
    """Loss, targets before they are clipped, and TD errors: member by member, row by row, noise by noise."""
    learner, settings = agent.learner, agent.learner.critic.settings
    mean, log_std = learner.actor(inputs.next_observation)
    action, log_prob = (x.detach().numpy() for x in squashed_sample(mean, log_std, noise.action))
    noises, alpha = len(action), float(learner.alpha())
    here = torch.cat((inputs.critic_observation, inputs.action), 1).numpy()
    there = [np.concatenate((inputs.next_critic_observation.numpy(), action[i]), 1) for i in range(noises)]
    joint = np.concatenate((here, *there)) if isinstance(agent, FlashSAC) else None
    online = [ByHand(learner.critic, member, joint) for member in range(MEMBERS)]
    slow = [ByHand(learner.target_critic, member, joint) for member in range(MEMBERS)]
    target_z, source, time, reading = (
        t.expand(noises, ROWS).numpy() for t in (noise.target, noise.source, noise.time, noise.reading)
    )
    total, targets, errors = 0.0, [], []
    for row in range(ROWS):
        soft = 0.0
        for i in range(noises):
            ends = [field.end(there[i][row], target_z[i, row]) for field in slow]
            soft += min(ends) if settings.target_members == "min" else sum(ends) / MEMBERS
            soft -= alpha * log_prob[i, row] if bonus else 0.0
        y = float(inputs.reward[row]) + float(inputs.discount[row]) * soft / noises
        targets.append(y)
        clipped, weight = min(max(y, -SUPPORT), SUPPORT), 1.0 if inputs.weight is None else float(inputs.weight[row])
        errors.append(0.0)
        for field in online:
            loss, read = 0.0, sum(field.end(here[row], reading[i, row]) for i in range(noises)) / noises
            for i in range(noises):
                z = (1 - time[i, row]) * source[i, row] + time[i, row] * clipped
                aim = clipped - (source[i, row] if settings.prediction == "velocity" else 0.0)
                loss += (field.velocity(here[row], z, time[i, row]) - aim) ** 2 / noises
            if settings.reading == "distilled":
                loss += (field.distilled(np.concatenate((here, there[0])), row) - read) ** 2
            total += weight * loss / (MEMBERS * ROWS)
            errors[-1] += abs(y - read) / MEMBERS
    return total, targets, errors


CASES: list[dict[str, Any]] = [
    {},
    {"noise": "bank", "target_members": "min"},
    {"prediction": "endpoint", "reading": "one_step", "steps": 2, "noises": 3},
]


@AGENTS
@pytest.mark.parametrize("settings", CASES, ids=["published", "bank and minimum", "end points"])
@pytest.mark.parametrize("bonus", [True, False])
def test_target_and_loss_are_those_of_plain_loops(name: str, settings: dict[str, Any], bonus: bool) -> None:
    agent = doubled(agent_of(name, seed=int(bonus), **settings))
    inputs, noise = inputs_of(1, weights=True), noise_of(agent)
    inputs = replace(inputs, reward=inputs.reward * 4)  # so that some targets are clipped
    loss, metrics = loss_of(agent, inputs, noise, bonus)
    expected, targets, errors = loss_by_hand(agent, inputs, noise, bonus)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    assert float(metrics["value/target_mean"]) == pytest.approx(sum(targets) / ROWS, rel=1e-6)
    np.testing.assert_allclose(metrics["td_error"], errors, rtol=1e-6)
    clipped = sum(abs(y) > SUPPORT for y in targets) / ROWS
    assert float(metrics["value/target_clipped"]) == pytest.approx(clipped) and clipped > 0
    assert not metrics["td_error"].requires_grad


@AGENTS
def test_the_field_learns_from_its_velocities_alone_and_members_learn_nothing_of_each_other(name: str) -> None:
    agent = doubled(agent_of(name))
    critic, noise = agent.learner.critic, noise_of(agent)
    field = list(critic.field.parameters())
    whole = torch.autograd.grad(loss_of(agent, inputs_of(), noise)[0], field)
    alone = copy.deepcopy(agent)
    alone.learner.critic.distilled = None
    expected = torch.autograd.grad(loss_of(alone, inputs_of(), noise)[0], alone.learner.critic.field.parameters())
    for with_distilled, without in zip(whole, expected, strict=True):
        torch.testing.assert_close(with_distilled, without, rtol=1e-9, atol=1e-12)
    pairs = inputs_of().critic_observation, inputs_of().action
    values = critic(*pairs, False) if name == "flashsac" else critic(*pairs)
    for gradient in torch.autograd.grad(values[0].sum(), field):
        assert not gradient[1].any()


def test_at_time_zero_with_one_step_a_flow_is_the_monolithic_critic() -> None:
    """z = 0 and t = 0 are constants, which a scalar critic has in its first bias."""
    single = {"steps": 1, "noises": 1, "reading": "one_step", "target_members": "min"}
    agent = doubled(agent_of("sac", seed=1, support=1000.0, **single))  # so wide that no target is clipped
    learner, inputs = agent.learner, inputs_of(weights=True)
    action = torch.randn(1, ROWS, ACTIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero = torch.zeros(1, ROWS, dtype=torch.float64)

    def monolithic(critic: Any) -> Critic:
        field = critic.field
        scalar = Critic(DIMS["critic"], ACTIONS, WIDTH, 2, Scalar(), MEMBERS).double()
        constant = torch.cat((field.encoding.code(zero[:, :1]), field.encoding.time(zero[:, :1])), -1).flatten()
        first = {
            "trunk.0.weight": field.trunk[0].weight[..., : DIMS["critic"] + ACTIONS],
            "trunk.0.bias": field.trunk[0].bias + field.trunk[0].weight[..., DIMS["critic"] + ACTIONS :] @ constant,
        }
        rest = {f"trunk.{k}": v for k, v in field.trunk.state_dict().items()}
        head = {f"head.{k}": v for k, v in field.head.state_dict().items()}
        scalar.load_state_dict(rest | first | head)
        return scalar

    critics = monolithic(learner.critic), monolithic(learner.target_critic)
    flow_loss, told = loss_of(agent, inputs, FlowNoise(action, zero, zero, zero, zero))
    loss, expected = sac_update.critic_loss(learner.actor, *critics, learner.alpha(), inputs, action[0])
    assert float(told["value/target_clipped"]) == 0
    torch.testing.assert_close(flow_loss, loss)
    torch.testing.assert_close(told["td_error"], expected["td_error"])
    pairs = inputs.critic_observation, inputs.action
    torch.testing.assert_close(learner.critic.value(*pairs), critics[0].value(*pairs))  # the bank of one noise is 0


@AGENTS
@pytest.mark.parametrize("reading", ["distilled", "one_step"])
@pytest.mark.parametrize("which", ["min", "mean"])
def test_the_actor_climbs_the_distilled_critics_or_one_step_from_the_bank(name: str, reading: str, which: str) -> None:
    critic = doubled(agent_of(name, reading=reading, actor_members=which)).learner.critic
    modes = (False,) if name == "flashsac" else ()
    observation, action = inputs_of().critic_observation, inputs_of().action.requires_grad_()
    value = critic.value(observation, action, *modes)
    if reading == "distilled":
        members = critic.distilled(observation, action, *modes)
    else:
        velocities = critic.field.given(observation, action, *modes)(critic.bank, torch.zeros(1, 1).double())
        members = (critic.bank + velocities).mean(1)
    torch.testing.assert_close(value, members.min(0).values if which == "min" else members.mean(0))
    assert all(row.any() for row in torch.autograd.grad(value.sum(), action)[0])


# The agents


def worked(agent: Agent, first: int, count: int) -> list[np.ndarray]:
    """Update ``count`` times; everything the outside sees."""
    seen = []
    for index in range(first, first + count):
        metrics = agent.update(batch_of(index, weights=True), budget_used=index / 20)
        seen += [metrics[metric].numpy().copy() for metric in sorted(metrics)]
        assert agent.td_error is not None
        seen += [agent.td_error.numpy().copy(), agent.act({"policy": np.ones((3, DIMS["policy"]), np.float32)})]
    return seen


@AGENTS
@pytest.mark.parametrize("noise", ["fresh", "bank"])
def test_equal_seeds_give_equal_bits_and_a_saved_agent_goes_on_bit_for_bit(name: str, noise: str) -> None:
    first, second = agent_of(name, noise=noise), agent_of(name, noise=noise)
    for ours, theirs in zip(worked(first, 0, 2), worked(second, 0, 2), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    state = {entry: tensor.clone() for entry, tensor in first.state_dict().items()}
    expected = worked(first, 2, 3)
    other = agent_of(name, seed=2, noise=noise)
    other.seed = 0  # noise is a function of it; all else comes from the state
    worked(other, 50, 1)
    other.load_state_dict(state)
    for ours, theirs in zip(worked(other, 2, 3), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for entry, tensor in first.state_dict().items():
        assert torch.equal(other.state_dict()[entry], tensor), entry


@AGENTS
def test_updates_never_wait_for_the_device_and_norms_stay_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, means, batches = agent_of(name), MetricMeans(), [batch_of(index, weights=True) for index in range(2)]
    before = {entry: tensor.clone() for entry, tensor in agent.state_dict().items()}
    with no_synchronisation(monkeypatch):
        for batch in batches:
            means.add(agent.update(batch, 0.5))
    monkeypatch.undo()
    assert all(float(deviation) < 1e-5 for deviation in agent.norms().values())
    moved = [entry for entry, tensor in agent.state_dict().items() if not torch.equal(tensor, before[entry])]
    for entry in before:
        if entry.startswith(("critic.", "target_critic.")) and "bank" not in entry and "running" not in entry:
            assert entry in moved, entry


@AGENTS
@pytest.mark.parametrize("reading", ["distilled", "one_step"])
def test_memory_of_the_networks_is_estimated_before_they_are_made(name: str, reading: str) -> None:
    asked = compose([f"agent={name}", "critic=flow", f"critic.reading={reading}", "env=hopper", "device=cpu"])
    config, _ = resolve(asked, probe_machine("cpu"))
    learner = make_agent(config, DIMS, 7).learner  # type: ignore[attr-defined]
    critic, actor = (sum(p.numel() for p in net.parameters()) for net in (learner.critic, learner.actor))
    assert parameter_bytes(config, DIMS, 7) == pytest.approx(4 * (5 * critic + 4 * actor), rel=0.06)


@pytest.mark.slow
@AGENTS
def test_compiled_equals_eager_and_compiles_nothing_after_the_second_update(name: str) -> None:
    settings = {"steps": 2, "noises": 2}
    eager, compiled = agent_of(name, **settings), agent_of(name, compile=compiler, **settings)
    found = worked(compiled, 0, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        found += worked(compiled, 2, 20)
    for ours, theirs in zip(found, worked(eager, 0, 22), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def chain() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A ring of five states, the last of which ends it with the next: next states, rewards, discounts, Q."""
    following, reward = torch.tensor([1, 2, 3, 4, 0]), torch.tensor([0.3, -0.5, 1.0, 0.2, -0.1])
    discount = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.5])  # of the last: five steps summed, or so
    transition = torch.zeros(5, 5).scatter_(1, following.unsqueeze(1), discount.unsqueeze(1))
    return following, reward, discount, torch.linalg.solve(torch.eye(5) - transition, reward)


@pytest.mark.slow
@AGENTS
@pytest.mark.parametrize("number", [1, 4])
def test_values_of_a_small_markov_chain_converge_to_the_closed_form(name: str, number: int) -> None:
    following, reward, discount, expected = chain()
    states = torch.eye(5)
    critic = FlowCriticConfig(steps=number, noises=4)
    common: dict[str, Any] = {"critic_width": 32, "actor_width": 8, "gamma": 0.9, "backup_entropy": False}
    common |= {"actor_every": 10**6, "target_rate": 0.05, "learning_rate": 1e-3, "final_learning_rate": 1e-4}
    agent: Agent
    if name == "flashsac":
        agent = FlashSAC({"policy": 5}, 1, 1, FlashSACConfig(**common), critic)
    else:
        agent = SAC({"policy": 5}, 1, 1, SACConfig(**common, layer_norm=True, initial_alpha=1.0), critic)
    rows = torch.arange(5).repeat(8)
    rng = torch.Generator().manual_seed(0)
    updates = 1000 if name == "flashsac" else 3000
    for index in range(updates):
        action = torch.rand(len(rows), 1, generator=rng) * 2 - 1
        here, there = {"policy": states[rows]}, {"policy": states[following[rows]]}
        agent.update(Batch(here, action, reward[rows], discount[rows], there, rows), index / updates)
    modes = (False,) if name == "flashsac" else ()
    with torch.no_grad():
        read = agent.learner.critic(states[rows], action, *modes).mean(0).view(8, 5).mean(0)
        climbed = agent.learner.critic.value(states[rows], action, *modes).view(8, 5).mean(0)
    torch.testing.assert_close(read, expected, rtol=0, atol=0.08)
    torch.testing.assert_close(climbed, expected, rtol=0, atol=0.08)
