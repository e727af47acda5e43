"""The plasticity monitor in training: what `rlplastic.plasticity` asks for, answered from an agent and its replay.

Readings come from draws of their own, keyed by (seed, updates), so training's draws stay what they were; a branch
learns from training's very batches, and its noise is that of the live agent, since it is a function of (seed, updates).
Where the monitor may not act, a run has the same bits with and without it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rlplastic import seeding
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.patients import patients
from rlplastic.agents.sac import SAC
from rlplastic.agents.steps import Inputs, part
from rlplastic.agents.subjects import (
    critic_values,
    held_out_td_error,
    inputs_of,
    policy_mean,
    subjects,
    td_targets,
    values,
)
from rlplastic.config import Config
from rlplastic.plasticity import Past, measure, snapshot, uninformative
from rlplastic.plasticity.decision_loop import PlasticityMonitor
from rlplastic.plasticity.interventions import full_reset
from rlplastic.plasticity.monitor import Evidence, Rules, unaided_returns
from rlplastic.plasticity.patient import Patient
from rlplastic.plasticity.ranks import effective_rank
from rlplastic.plasticity.representation import relative_churn, value_bias
from rlplastic.plasticity_config import MonitorConfig
from rlplastic.replay import ReplayRing, Sampler
from rlplastic.replay.sample import Batch

Agent = FlashSAC | SAC
ROWS = 1024
"""Transitions of a reading, a probe, or a verification."""
FEW = 256
"""Fewer held-out transitions than these verify nothing."""
TAIL = 0.05
"""Returns are summed until what follows counts for less than this share, and at most over `LONGEST` steps."""
LONGEST = 300
PROBED = 128
"""Rows of an optimizer step of a probe."""


@dataclass(frozen=True)
class Event:
    """A line of plasticity.jsonl, what of it is a curve, and a sentence for people where it is a decision."""

    record: dict[str, Any]
    scalars: Mapping[str, float]
    sentence: str = ""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """For histograms, by name."""


@dataclass
class Common:
    """Targets that neither twin nor branch made, from the moment they parted."""

    observation: Tensor
    """What critics see of the transitions set aside, (rows, D)."""
    policy_observation: Tensor
    action: Tensor
    returns: Tensor
    unaided: Tensor
    frozen: Tensor
    source: str


def horizon(gamma: float) -> int:
    """Over how many steps a return is summed: see `TAIL`."""
    return 1 if gamma == 0 else min(math.ceil(math.log(TAIL) / math.log(gamma)), LONGEST)


def rules_of(config: MonitorConfig, planned: int | None) -> Rules:
    """The rules of a run; in a short one cadences shrink to a twentieth, a fifth and a half of the planned updates."""

    def at_most(every: int, parts: int) -> int:
        return every if planned is None else max(min(every, planned // parts), 1)

    return Rules(
        forward_every=at_most(config.forward_every, 20),
        ranks_every=at_most(config.ranks_every, 5),
        probe_every=at_most(config.probe_every, 2),
        probe_steps=config.probe_steps,
        probe_functions=config.probe_functions,
        ill=config.ill,
        ill_gap=config.ill_gap,
        healthy=config.healthy,
        ladder=tuple(config.ladder),
        max_interventions=config.max_interventions,
        budget=config.budget,
        planned_updates=planned,
        verify_updates=config.verify_updates or at_most(2_000, 20),
        verify_rounds=config.verify_rounds,
        value_margin=config.value_margin,
        rank_margin=config.rank_margin,
        return_margin=config.return_margin,
        recovery_updates=config.recovery_updates or at_most(5_000, 10),
        cooldown=config.cooldown or at_most(5_000, 20),
    )


def schedule_of(config: MonitorConfig, seed: int, planned: int | None) -> Callable[[int], bool]:
    """When a scheduled intervention is due: every so many updates, or as often at random over the planned ones."""
    if config.scheduled_count is None:
        every = config.scheduled_every
        return lambda updates: updates % every == 0
    assert planned is not None, "checked by `rlplastic.presets`"
    rng = torch.Generator().manual_seed(seeding.key("scheduled", seed))
    moments = set((1 + torch.randperm(planned, generator=rng)[: config.scheduled_count]).tolist())
    return lambda updates: updates in moments


class Watcher:
    """Reads, probes and treats an agent while it trains; the loop calls it, `rlplastic.reporting` tells its events.

    Args:
        config: resolved, its monitor not ``off``.
        agent: live, just made.
        replay: what it learns from.
        planned_updates: of the whole run, where a budget in steps tells it.
    """

    def __init__(self, config: Config, agent: Agent, replay: ReplayRing, planned_updates: int | None) -> None:
        self.config, self.agent, self.replay, self.planned_updates = config, agent, replay, planned_updates
        self.events: list[Event] = []
        self.edited: Callable[[], None] = lambda: None
        assert config.agent.gamma is not None and config.agent.critic_width and config.agent.actor_width
        self._key = partial(seeding.key, "monitor", config.seed)
        widths = max(config.agent.critic_width, config.agent.actor_width)
        self._rows = min(max(ROWS, 2 * widths), replay.capacity)
        self._ranks = self._rows >= 2 * widths
        self._horizon = horizon(config.agent.gamma)
        self._samplers: dict[tuple[int, bool], Sampler] = {}
        self._monitor = self._new_monitor()
        self._branch: Agent | None = None
        self._frozen_critic: nn.Module = agent.learner.target_critic
        self._common: Common | None = None
        self._before: dict[str, Tensor] | None = None
        self._probe_batch: Inputs | None = None
        self._said: dict[str, Tensor] = {}
        self._said_at = 0
        self._norms: dict[str, float] = {}
        self._initial = self._weights()
        self._previous, self._previous_at = self._initial, agent.updates

    def _new_monitor(self) -> PlasticityMonitor[Agent]:
        settings = self.config.monitor
        schedule = None
        if settings.mode == "scheduled":
            due = schedule_of(settings, self.config.seed, self.planned_updates)
            schedule = settings.scheduled_intervention, due
        mode: Any = settings.mode
        return PlasticityMonitor(self, rules_of(settings, self.planned_updates), mode, self._key, schedule)

    # What the loop calls

    def after_update(self, batch: Batch, budget_used: float, waiting: bool = False) -> None:
        """Let the branch learn from the same batch, and the monitor do what is due; see its own for ``waiting``."""
        if self._branch is not None:
            self._branch.update(batch, budget_used)
        self._monitor.after_update(self.agent.updates, waiting)
        # Churn is that of the last updates before a reading, as many as move both networks.
        if (self.agent.updates + self.config.agent.actor_every) % self._monitor.rules.forward_every == 0:
            self._said, self._said_at = self._say(), self.agent.updates

    def episodes_ended(self, returns: NDArray[Any]) -> None:
        """Training episodes that ended in the last vector step, (episodes,)."""
        for theirs in self.agent.group.exchange(returns.tolist()):
            for value in theirs:
                self._monitor.episode(self.agent.updates, value)

    def pop_events(self) -> list[Event]:
        """What happened since the last call."""
        events, self.events = self.events, []
        return events

    # What the monitor asks: readings

    def measure(self, tier: Literal["forward", "ranks"], updates: int) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics on a fresh batch, and what alarms compare them with: those of fresh networks.

        Units are told on a batch that stays, too.
        """
        if tier == "ranks" and not self._ranks:
            return {}, {}
        inputs = self._draw(updates)
        if self._probe_batch is None:
            self._probe_batch = inputs
        found, silent = self._measure(self.agent, inputs, tier, past=True)
        told = dict(found)
        record: dict[str, Any] = {"event": "measurement", "updates": updates, "tier": tier}
        if tier == "ranks":
            fresh = self._fresh_ranks(inputs)
        else:
            fresh = self._fresh_norms(inputs)
            kept, _ = self._measure(self.agent, self._probe_batch, tier)
            told |= {name.replace("plasticity/", "plasticity/frozen/", 1): value for name, value in kept.items()}
            told |= self._churn()
            record["churn_over"] = updates - self._said_at if self._said else None
            outside = self._held_out(inputs, updates)
            found, told = found | outside, told | outside
            record["held_out_td_error"] = "measured" if outside else self._unavailable
            self._previous, self._previous_at = self._weights(), updates
        record |= {"values": told, "fresh": fresh, "uninformative": silent}
        shown: dict[str, Tensor] = {}
        if tier == "forward" and self.config.monitor.histograms:
            shown = {f"plasticity/weights/{name}": value for name, value in self._previous.items()}
        self.events.append(Event(_plain(record), _finite(told), weights=shown))
        return found, fresh

    def _measure(
        self, agent: Agent, inputs: Inputs, tier: Literal["forward", "ranks"], past: bool = False
    ) -> tuple[dict[str, float], list[str]]:
        """Informative metrics of both networks, and the names of the others."""
        found: dict[str, float] = {}
        silent: list[str] = []
        for name, subject in subjects(agent).items():
            passed = self.agent.updates - self._previous_at
            initial = Past(part(self._initial, f"{name}."), self.agent.updates) if past else None
            previous = Past(part(self._previous, f"{name}."), passed) if past and passed else None
            measured = measure(subject, inputs, tier, initial=initial, previous=previous)
            without = uninformative(subject, measured)
            silent += sorted(without)
            found |= {metric: value for metric, value in measured.items() if metric not in without}
        return found, silent

    def _fresh(self, inputs: Inputs) -> Agent:
        """An agent with networks that never learned, batch-norm statistics of this batch."""
        fresh = self.agent.branch()
        for patient in patients(fresh, inputs).values():
            full_reset(patient, self._key("fresh"))
        return fresh

    def _fresh_norms(self, inputs: Inputs) -> dict[str, float]:
        """How large fresh weights are: measured once, since it depends on no batch."""
        if not self._norms:
            fresh, _ = self._measure(self._fresh(inputs), inputs, "forward")
            self._norms = {name: value for name, value in fresh.items() if name.endswith("/weight_norm")}
        return self._norms

    def _fresh_ranks(self, inputs: Inputs) -> dict[str, float]:
        """Effective ranks of fresh networks on this batch; other ranks raise no alarm."""
        found = {}
        for name, subject in subjects(self._fresh(inputs)).items():
            layers = subject.read(inputs)
            for layer in subject.rank_layers or ():
                rank = effective_rank(layers[layer].values).mean()
                found[f"plasticity/{name}/{layer}/effective_rank"] = float(rank)
        return found

    @property
    def _unavailable(self) -> str:
        """Why nothing can be said of held-out episodes."""
        return "unavailable: " + ("too few are there yet" if self.config.replay.holdout else "replay.holdout is 0")

    @property
    def _held_out_rows(self) -> int:
        """Held-out transitions that all ranks can draw from in equal parts."""
        group = self.agent.group
        return group.size * int(min(count for (count,) in group.numbers([self.replay.held_out])))

    def _held_out(self, trained: Inputs, updates: int) -> dict[str, float]:
        if not self._held_out_rows:
            return {}
        held_out = self._draw(updates, held_out=True)
        error = held_out_td_error(self.agent, held_out, trained)
        returns = td_targets(self.agent, self._draw(updates, self._horizon, held_out=True))
        bias = value_bias(self._values(held_out), returns)
        return {
            "plasticity/critic/all/held_out_td_error": error.held_out,
            "plasticity/critic/all/held_out_td_gap": error.gap,
            "plasticity/critic/all/value_bias": float(bias.mean()),
        }

    @torch.no_grad()
    def _values(self, inputs: Inputs) -> Tensor:
        """Q of every member, (members, rows)."""
        return values(self.agent, inputs.critic_observation, inputs.action)

    @torch.no_grad()
    def _say(self) -> dict[str, Tensor]:
        """What both networks say of the batch that stays, (..., rows, outputs); nothing before there is one."""
        batch = self._probe_batch
        if batch is None:
            return {}
        return {"actor": policy_mean(self.agent, batch.observation), "critic": self._values(batch).unsqueeze(-1)}

    def _churn(self) -> dict[str, float]:
        """How much the last updates before this reading moved them, in units of their spread."""
        now = self._say() if self._said else {}
        return {
            f"plasticity/{name}/all/churn": float(relative_churn(self._said[name], now[name]).mean()) for name in now
        }

    def _draw(self, updates: int, n_step: int | None = None, held_out: bool = False) -> Inputs:
        """Transitions of a draw of the monitor's own; with other ``n_step`` the same transitions with other returns."""
        n_step = n_step or self.config.agent.n_step
        sampler = self._samplers.get((n_step, held_out))
        if sampler is None:
            gamma = self.config.agent.gamma
            assert gamma is not None
            # The torch path: the others draw ahead, for one batch after the other.
            key = self._key("draws")
            rows = -(-self._rows // self.agent.group.size)
            sampler = Sampler(self.replay, rows, n_step, gamma, key, held_out=held_out, kernels="torch")
            self._samplers[n_step, held_out] = sampler
        return inputs_of(self.agent, sampler.sample(updates, self.agent.reward_scale.to(sampler.device)))

    def _weights(self) -> dict[str, Tensor]:
        networks = {"actor": self.agent.learner.actor, "critic": self.agent.learner.critic}
        return {f"{name}.{key}": value for name, module in networks.items() for key, value in snapshot(module).items()}

    # What the monitor asks: treatment

    def patients(self, learner: Agent | None, updates: int) -> Mapping[str, Patient]:
        """The networks of a branch, or of the live agent, with replay states of this update."""
        return patients(self.agent if learner is None else learner, self._draw(updates))

    def probe_cost(self, module: str) -> float:
        """Multiplications of a probe's optimizer step over those of an update: 1 forward, 2 backward, by parameter.

        An update predicts, bootstraps and learns with the critics, and, when it is due, moves the actor through them.
        """
        learner, settings = self.agent.learner, self.config
        networks = {"actor": learner.actor, "critic": learner.critic}
        sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
        due = 1 / settings.agent.actor_every
        update = sizes["critic"] * (4 + 2 * due) + sizes["actor"] * (1 + 3 * due)
        assert settings.replay.batch_size is not None
        return 3 * sizes[module] * PROBED / (update * settings.replay.batch_size * self.agent.ACTOR_ROWS)

    def branch(self) -> Agent:
        """A twin that is updated after every update of the live agent; common targets are made now."""
        self._branch = self.agent.branch()
        self._frozen_critic = copy.deepcopy(self.agent.learner.target_critic)
        held_out = self._held_out_rows >= FEW
        short = self._draw(self.agent.updates, held_out=held_out)
        long = self._draw(self.agent.updates, self._horizon, held_out)
        source = "held-out episodes" if held_out else f"replay that training samples too; held-out {self._unavailable}"
        self._common = Common(
            short.critic_observation,
            short.observation,
            short.action,
            returns=td_targets(self.agent, long),
            unaided=unaided_returns(long.reward, long.discount),
            frozen=td_targets(self.agent, short),
            source=source,
        )
        return self._branch

    @torch.no_grad()
    def evidence(self, branch: Agent, treated: Collection[str]) -> Evidence:
        """What both say of the common transitions, and where the actor was treated, what its actions are worth."""
        common = self._common
        assert common is not None, "targets are made with the branch"
        twin, other = (
            values(agent, common.observation, common.action).mean(0).double() for agent in (self.agent, branch)
        )
        worth = None
        if "actor" in treated:
            actions = [torch.tanh(policy_mean(agent, common.policy_observation)) for agent in (self.agent, branch)]
            first, second = (float(critic_values(self._frozen_critic, common.observation, a).mean()) for a in actions)
            worth = first, second
        return Evidence(twin, other, common.returns, common.frozen, common.source, worth, common.unaided)

    def adopt(self, branch: Agent) -> None:
        """In place, so that compiled steps and references stay valid; what was there is kept."""
        self._before = {name: value.detach().clone() for name, value in self.agent.learned_state().items()}
        self.agent.load_learned_state(branch.learned_state())
        self._branch = self._common = None

    def take_back(self) -> None:
        """All that an update moves becomes what it was before `adopt`."""
        assert self._before is not None, "nothing was adopted"
        self.agent.load_learned_state(self._before)
        self._before = None

    def drop(self) -> None:
        """Forget the branch, or what was there before `adopt`."""
        self._branch = self._common = self._before = None

    def rebase(self) -> None:
        """Angles, distances and speeds are measured from the weights as they are now; `edited` is called."""
        self.edited()
        self._initial = self._previous = self._weights()
        self._previous_at = self.agent.updates
        self._said = {}  # what an edit moves is no churn

    def tell(self, event: Mapping[str, Any], sentence: str) -> None:
        """Record a decision with its evidence."""
        numbers = {
            f"plasticity/decisions/{name}": float(value)
            for name, value in event.items()
            if isinstance(value, int | float) and name != "updates"
        }
        self.events.append(Event(_plain({**event, "sentence": sentence}), _finite(numbers), sentence))

    # State

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A document and tensors: the monitor, the branch, what a commit replaced, common targets, references."""
        tensors = {f"initial.{name}": value for name, value in self._initial.items()}
        tensors |= {f"previous.{name}": value for name, value in self._previous.items()}
        if self._probe_batch is not None:
            names = [entry.name for entry in fields(Inputs) if entry.name != "weight"]
            tensors |= {f"probe_batch.{name}": getattr(self._probe_batch, name) for name in names}
        tensors |= {f"said.{name}": value for name, value in self._said.items()}
        if self._branch is not None:
            assert self._common is not None
            tensors |= {f"branch.{name}": value for name, value in self._branch.learned_state().items()}
            tensors |= {f"frozen.{name}": value for name, value in self._frozen_critic.state_dict().items()}
            common = {name: value for name, value in vars(self._common).items() if name != "source"}
            tensors |= {f"common.{name}": value for name, value in common.items()}
        if self._before is not None:
            tensors |= {f"before.{name}": value for name, value in self._before.items()}
        document = {
            "monitor": self._monitor.state_dict(),
            "planned_updates": self.planned_updates,
            "previous_at": self._previous_at,
            "said_at": self._said_at,
            "source": self._common.source if self._common is not None else None,
        }
        plain: dict[str, Any] = _plain(document)
        return plain, {name: value.detach().cpu() for name, value in tensors.items()}

    def load_state_dict(self, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`; the agent has been restored already."""
        if self.config.monitor.mode != "watch":  # a budget that was raised since must not change what is decided
            self.planned_updates = document["planned_updates"]
            self._monitor = self._new_monitor()
        device = self.agent.device
        tensors = {name: value.to(device) for name, value in tensors.items()}
        self._initial, self._previous = part(tensors, "initial."), part(tensors, "previous.")
        self._previous_at = document["previous_at"]
        batch = part(tensors, "probe_batch.")
        self._probe_batch = Inputs(**batch) if batch else None
        self._said, self._said_at = part(tensors, "said."), document.get("said_at", 0)
        self._before = part(tensors, "before.") or None
        learned = part(tensors, "branch.")
        if learned:
            self._branch = self.agent.branch()
            self._branch.load_learned_state(learned)
            self._frozen_critic = copy.deepcopy(self.agent.learner.target_critic)
            self._frozen_critic.load_state_dict(part(tensors, "frozen."))
            common = part(tensors, "common.")
            common.setdefault("unaided", common["returns"])  # not saved by earlier versions
            self._common = Common(**common, source=document["source"])
        self._monitor.load_state_dict(document["monitor"], self._branch)


def _plain(value: Any) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """The same for JSON: tuples as lists, None for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}
