"""What a saved critic's values and features are worth: errors against returns, and whether it can follow new targets.

The diagnostics of `rlplastic.plasticity.flow_diagnostics` on a run's critic. Some ask what the Euler steps of a flow
do; the others can be asked of critics of any kind, so that kinds can be compared. All errors are mean absolute ones,
in standard deviations of the returns.

Returns are those of the newest episodes of the replay, scaled as the agent's rewards are, summed to the end of the
episode or over `rlplastic.watching.horizon` steps; beyond that the target critic's value counts. Of the transitions
drawn, those with the least of it are kept, and its mean share is told. They are the returns of what was done, which
explored and was a slightly older policy, without the entropy bonus on the way: equally off for critics of every kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from rlplastic import seeding
from rlplastic.agents import subjects
from rlplastic.agents.flashsac import FlashSAC, networks
from rlplastic.agents.flow import FlowCritic, Velocity
from rlplastic.agents.patients import patients
from rlplastic.agents.sac import SAC
from rlplastic.agents.sac import networks as sac_networks
from rlplastic.agents.steps import Inputs
from rlplastic.config import Config
from rlplastic.plasticity import ModuleReader, flow_diagnostics
from rlplastic.plasticity.activations import Kind, Reader
from rlplastic.plasticity.flow_diagnostics import FlowReport
from rlplastic.replay import ReplayRing, Sampler
from rlplastic.watching import horizon

DRAWN = 4
"""Transitions drawn for each that is kept."""
MAGNITUDES = (0.0, 0.5, 1.0, 2.0)
"""Of noise in targets, in standard deviations of the returns."""
BATCH = 128
"""Rows of an update of a copy."""
RATE = 1e-3
"""Of Adam, where only some layers learn."""
EVERY = 10
"""Updates between two errors of a copy that learns."""
Floats = tuple[float, ...]


@dataclass(frozen=True)
class Flow:
    """What only a flow has.

    recovery: error where the copy of step ``old_step`` took the first k of K Euler steps, k = 0..K; empty without an
    earlier checkpoint; norms: of hidden rows by layer, at t = k/K, as is the curvature E|v(t) - v(0)|;
    endpoint_variance: over noises, of every member, in squared units of the value.
    """

    recovery: Floats
    old_step: int | None
    norms: Mapping[str, Floats]
    curvature: Floats
    endpoint_variance: Floats


@dataclass(frozen=True)
class CriticReport:
    """Of one critic, on ``rows`` transitions.

    kind: flow, categorical or scalar; bootstrapped: mean share of the returns that is the target critic's; value_error:
    after each Euler step, or one number; learning: error after every ``every`` updates of copies that learn the
    returns, with ``head`` only the last hidden layer and the head, with ``all layers`` everything; noise: error after
    as many updates on the replay with noise U[-M, M] in the targets, M in `MAGNITUDES`. The last two are empty if no
    updates were asked for.
    """

    kind: str
    rows: int
    bootstrapped: float
    value_error: Floats
    learning: Mapping[str, Floats] = field(default_factory=dict)
    magnitudes: Floats = MAGNITUDES
    noise: Floats = ()
    every: int = EVERY
    flow: Flow | None = None

    def figure(self) -> FlowReport:
        """What `rlplastic.plasticity.flow_diagnostics.figure` draws."""
        flow = self.flow
        return FlowReport(
            value_errors=self.value_error if flow else None,
            recovery=(flow.recovery or None) if flow else None,
            plasticity=self.learning or None,
            noise={self.kind: self.noise} if self.noise else None,
            magnitudes=self.magnitudes,
            norms=flow.norms if flow else None,
            curvature=flow.curvature if flow else None,
            every=self.every,
        )


@dataclass(frozen=True)
class Truth:
    """Transitions and their returns (rows,)."""

    inputs: Inputs
    returns: Tensor
    bootstrapped: float

    @property
    def spread(self) -> float:
        """Their standard deviation: the unit of all errors."""
        return float(self.returns.double().std(correction=0))


def diagnose_critic(
    config: Config,
    ring: ReplayRing,
    agent: FlashSAC | SAC,
    old: tuple[FlashSAC | SAC, int] | None,
    rows: int,
    updates: int,
    seed: int,
) -> CriticReport:
    """All that can be asked of the agent's critic; the agent stays as it is.

    Args:
        config: of the run, resolved.
        ring: its replay.
        agent: as saved.
        old: an earlier copy, and the step it is of; None: there is none.
        rows: transitions to keep.
        updates: of every copy that learns; 0: none does.
        seed: of draws and noise.
    """
    truth = truth_of(config, ring, agent, rows, seed)
    critic = agent.learner.critic
    flow = None
    if isinstance(critic, FlowCritic):
        flow = _of_flow(critic, old, truth)
    return CriticReport(
        kind=config.critic.kind,
        rows=len(truth.returns),
        bootstrapped=truth.bootstrapped,
        value_error=_floats(value_errors(critic, truth)),
        learning=_learning(agent, truth, updates) if updates else {},
        noise=_noise(config, ring, agent, truth, updates, seed) if updates else (),
        flow=flow,
    )


def truth_of(config: Config, ring: ReplayRing, agent: FlashSAC | SAC, rows: int, seed: int) -> Truth:
    """Recent transitions that training samples, of whose returns the least is bootstrapped; see the module."""
    gamma = config.agent.gamma
    assert gamma is not None, "a run's configuration is resolved"
    longest = horizon(gamma)
    drawn = min(DRAWN * rows, ring.capacity)
    sampler = Sampler(
        ring, drawn, longest, gamma, seeding.key("returns", config.seed), half_life=float(ring.num_envs * longest)
    )
    inputs = subjects.inputs_of(agent, sampler.sample(seed, agent.reward_scale))
    # In the order of the draw, so that any part of them is a sample, too.
    kept = inputs.discount.argsort(stable=True)[: max(drawn // DRAWN, 1)].sort().values
    returns = subjects.td_targets(agent, inputs)[kept]
    names = ("observation", "next_observation", "critic_observation", "next_critic_observation", "action")
    chosen = {name: getattr(inputs, name)[kept] for name in names}
    # A transition that ends its episode with the return as its reward has it as its target, for critics of any kind.
    ended = Inputs(**chosen, reward=returns, discount=torch.zeros_like(returns))
    return Truth(ended, returns, float(inputs.discount[kept].mean()))


@torch.no_grad()
def value_errors(critic: nn.Module, truth: Truth) -> Tensor:
    """Errors after each Euler step, (K,), or (1,) of a critic that has none."""
    inputs = truth.inputs
    if isinstance(critic, FlowCritic):
        points = critic.trajectory(_velocity(critic, inputs), critic.bank)
    else:
        read = subjects.critic_values(critic, inputs.critic_observation, inputs.action).unsqueeze(-2)
        points = [read, read]
    return flow_diagnostics.value_errors(points, truth.returns) / truth.spread


def _velocity(critic: FlowCritic, inputs: Inputs) -> Velocity:
    return critic.field.given(inputs.critic_observation, inputs.action, *subjects.kind_of(critic).modes)


@torch.no_grad()
def _of_flow(critic: FlowCritic, old: tuple[FlashSAC | SAC, int] | None, truth: Truth) -> Flow:
    steps = critic.settings.steps
    velocity = _velocity(critic, truth.inputs)
    points = critic.trajectory(velocity, critic.bank)
    recovery: Floats = ()
    if old is not None:
        before = old[0].learner.critic
        assert isinstance(before, FlowCritic)
        earlier = _velocity(before, truth.inputs)
        found = flow_diagnostics.recovery(
            lambda z, k: critic.euler_step(velocity, z, k, steps),
            lambda z, k: before.euler_step(earlier, z, k, steps),
            critic.bank,
            steps,
            truth.returns,
        )
        recovery = _floats(found / truth.spread)
    norms = flow_diagnostics.feature_norms(_reader(critic, velocity), [k / steps for k in range(steps)])
    return Flow(
        recovery=recovery,
        old_step=None if old is None else old[1],
        norms={name: _floats(curve) for name, curve in norms.items()},
        curvature=_floats(flow_diagnostics.path_curvature(points)),
        endpoint_variance=_floats(flow_diagnostics.endpoint_variance(points[-1])),
    )


def _reader(critic: FlowCritic, velocity: Velocity) -> Reader:
    """Hidden layers of the field by time; of FlashSAC's the blocks, whose rectifiers are fused, and the last norm."""
    field = critic.field
    assert isinstance(field, nn.Module)
    layers: dict[str, Kind] | None = None
    if isinstance(field, networks.VelocityField):
        layers = {f"blocks.{index}": "linear" for index in range(len(field.blocks))} | {"post_norm": "linear"}

    def run(time: float) -> Tensor:
        return velocity(critic.bank, torch.full((1, 1), time))

    return ModuleReader(field, run, layers, units=subjects.kind_of(critic).units)


def _learning(agent: FlashSAC | SAC, truth: Truth, updates: int) -> dict[str, Floats]:
    """Errors while copies of the critic learn the returns by its own loss."""
    critic = agent.learner.critic
    rows = len(truth.returns)
    size = min(BATCH, rows)
    target = subjects.outputs_target(agent, truth.inputs)
    bound = patients(agent)["critic"].bound
    found = {}
    for name, layers in {"head": last_layers(critic), "all layers": [""]}.items():
        errors: list[Tensor] = []

        def loss(copy: nn.Module, index: int, errors: list[Tensor] = errors) -> Tensor:
            if index % EVERY == 0:
                errors.append(value_errors(copy, truth)[-1])
            start = index * size % (rows - size + 1)
            part = subjects.rows_of(truth.inputs, start, start + size)
            return subjects.losses_to(copy, part, target[start : start + size], index).mean()

        flow_diagnostics.feature_plasticity(critic, loss, layers, updates, RATE, bound)
        found[name] = _floats(torch.stack(errors))
    return found


def last_layers(critic: nn.Module) -> list[str]:
    """Names of the last hidden layer, with its norms, and of the head; of a flow, those of its field."""
    network, prefix = (critic.field, "field.") if isinstance(critic, FlowCritic) else (critic, "")
    if isinstance(network, networks.VelocityField):
        return [f"{prefix}blocks.{len(network.blocks) - 1}", f"{prefix}post_norm", f"{prefix}head"]
    if isinstance(network, networks.Critic):
        return [f"trunk.blocks.{len(network.trunk.blocks) - 1}", "trunk.post_norm", "head"]
    assert isinstance(network, sac_networks.Critic | sac_networks.VelocityField)
    hidden = list(network.trunk)
    first = max(index for index, layer in enumerate(hidden) if isinstance(layer, sac_networks.Linear))
    learn = [index for index in range(first, len(hidden)) if list(hidden[index].parameters())]
    return [*(f"{prefix}trunk.{index}" for index in learn), f"{prefix}head"]


def _noise(config: Config, ring: ReplayRing, agent: FlashSAC | SAC, truth: Truth, updates: int, seed: int) -> Floats:
    """Errors after more of the agent's own updates on its replay, with noise in the targets."""
    assert config.agent.gamma is not None, "a run's configuration is resolved"
    size, key = min(BATCH, ring.capacity), seeding.key("noisy targets", config.seed, seed)
    sampler = Sampler(ring, size, config.agent.n_step, config.agent.gamma, key)

    def train(perturb: flow_diagnostics.Perturb) -> float:
        twin = agent.branch()
        for batch in sampler.batches(0, updates, agent.reward_scale):
            twin.update(replace(batch, reward=perturb(batch.reward)), 1.0)
        return float(value_errors(twin.learner.critic, truth)[-1])

    return _floats(flow_diagnostics.target_noise(train, [truth.spread * each for each in MAGNITUDES], seed))


def _floats(values: Tensor | Sequence[float]) -> Floats:
    return tuple(float(value) for value in values)
