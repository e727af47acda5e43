"""`replay_ratio=adaptive`: at the end of every window the critic is read, a rule is asked, and the ratio moves.

Reading changes nothing but through the ratio: batches are drawn from streams of their own, which are functions of the
seed and the step, and `rlplastic.plasticity` leaves networks and random states as they were. The rule's state is part
of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from statistics import fmean
from typing import Any

from torch import Tensor

from rlplastic import seeding
from rlplastic.agents import subjects
from rlplastic.agents.steps import Inputs
from rlplastic.config import Config
from rlplastic.errors import ConfigurationError, nearest
from rlplastic.plasticity import Past, gradient_dormancy, measure, snapshot, uninformative
from rlplastic.plasticity.measure import MODULE
from rlplastic.plasticity.replay_ratio import SIGNALS, ContinuousRule, Decision, PlateauRule, Rule
from rlplastic.plasticity_config import ADAPTIVE, AdaptiveConfig
from rlplastic.progress import Progress, ReplayRatio
from rlplastic.replay import ReplayRing, Sampler

ROWS = 1024
"""Transitions of a reading, or two for each unit of the critic's width, which ranks need."""
EPISODES = {"continuous": 5, "plateau": 50}
"""Full episodes whose transitions make a window, unless it is given; 50 are published."""
LEAST_VECTOR_STEPS = 100


def signals_of(settings: AdaptiveConfig) -> list[str]:
    """The names of what is read; none while that is open."""
    return [name.strip() for name in settings.signal.split(",")] if settings.signal is not None else []


def make_rule(settings: AdaptiveConfig) -> Rule:
    """The rule that resolved settings describe, at its start.

    Raises:
        ConfigurationError: numbers contradict each other.
    """
    assert settings.low is not None and settings.high is not None, "resolve the configuration first"
    if settings.rule == "plateau":
        return PlateauRule(settings.signal or "fau", settings.low, settings.high, settings.tolerance)
    try:
        return ContinuousRule(
            settings.low, settings.high, settings.step, settings.calm, settings.alarm, settings.memory
        )
    except ConfigurationError as error:
        raise ConfigurationError(f"settings of adaptive: {error}") from error


def check(config: Config) -> None:
    """Refuse a replay ratio that is neither a number nor `adaptive`, and settings that do not go with it.

    Raises:
        ConfigurationError: naming the setting and what was expected.
    """
    ratio, adaptive = config.replay_ratio, config.adaptive
    if isinstance(ratio, str) and ratio != ADAPTIVE:
        raise ConfigurationError(f"replay_ratio={ratio} is not a choice; expected a number above 0, or {ADAPTIVE}")
    if ratio != ADAPTIVE:
        if adaptive != AdaptiveConfig():
            raise ConfigurationError(
                f"settings adaptive.* are those of replay_ratio={ADAPTIVE}, but this run has "
                f"{'none' if ratio is None else f'replay_ratio={ratio}'}; leave the one out or change the other"
            )
        return
    names = signals_of(adaptive)
    for name in names:
        if name not in SIGNALS:
            raise ConfigurationError(f"adaptive.signal={name!r} is not a signal; {nearest(name, SIGNALS)}")
        if SIGNALS[name].source == "td_error" and config.replay.holdout == 0:
            raise ConfigurationError(
                f"adaptive.signal={name} needs held-out episodes, but replay.holdout=0; leave that out, or choose "
                "another signal"
            )
    if adaptive.rule == "plateau" and len(names) > 1:
        raise ConfigurationError(
            f"adaptive.rule=plateau reads one signal, but adaptive.signal={adaptive.signal}; expected one name, or "
            "adaptive.rule=continuous"
        )
    if adaptive.low is not None and adaptive.high is not None:
        make_rule(adaptive)


class Pacer:
    """Moves the replay ratio of one run.

    Args:
        config: resolved.
        agent: whose critic is read.
        ring: what is read on.
        pace: whose ratio moves.
        time_limit: steps of a full episode.

    Attributes:
        window: environment transitions between two readings.
        readings: the last values of the signals, without those that were not finite or had no data.
    """

    def __init__(
        self, config: Config, agent: subjects.Agent, ring: ReplayRing, pace: ReplayRatio, time_limit: int
    ) -> None:
        settings = config.adaptive
        assert config.agent.critic_width and config.agent.gamma is not None, "resolve the configuration first"
        self.agent, self.ring, self.pace = agent, ring, pace
        self.rule = make_rule(settings)
        self.signals = signals_of(settings)
        self.window = settings.window or max(
            EPISODES[settings.rule] * time_limit, LEAST_VECTOR_STEPS * ring.num_envs * agent.group.size
        )
        self.readings: dict[str, float] = {}
        self._weights: dict[str, Tensor] = {}  # at the last reading, for the angular speed since
        self._read_at = 0  # updates
        rows = min(max(ROWS, 2 * config.agent.critic_width), ring.capacity)
        key = seeding.key("replay ratio", config.seed)
        self._group = agent.group
        drawn = ring, -(-rows // agent.group.size), config.agent.n_step, config.agent.gamma, key
        self._trained = Sampler(*drawn)
        self._held_out = Sampler(*drawn, held_out=True) if ring.holdout is not None else None

    @property
    def uninformative(self) -> dict[str, str]:
        """Those signals that say nothing on this critic, each with the reason."""
        critic = subjects.subjects(self.agent)["critic"]
        reasons = uninformative(critic, {SIGNALS[name].metric: 0.0 for name in self.signals})
        return {name: reasons[SIGNALS[name].metric] for name in self.signals if SIGNALS[name].metric in reasons}

    def after(self, progress: Progress, added: int) -> Decision | None:
        """What was decided, if ``added`` transitions ended a window of a critic that has begun to learn."""
        if not (progress.crossed(self.window, added) and self.agent.updates):
            return None
        if not self._group.all(self.ring.transitions > 0):
            return None
        self.readings = {name: value for name, value in self._read(progress.transitions).items() if isfinite(value)}
        decision = self.rule.decide(self.readings)
        self.pace.ratio = decision.ratio
        return decision

    def rebase(self) -> None:
        """An intervention edited the critic, or was taken back: signals are compared from the next reading on."""
        self.rule.rebase()
        self._weights = {}

    def _read(self, draw: int) -> dict[str, float]:
        """The signals, on batches number ``draw``."""
        critic = subjects.subjects(self.agent)["critic"]
        trained = self._batch(self._trained, draw)
        sources = {SIGNALS[name].source for name in self.signals}
        measured: dict[str, float] = {}
        if "forward" in sources:
            measured |= measure(critic, trained, "forward", previous=self._past())
        if "ranks" in sources:
            measured |= measure(critic, trained, "ranks")
        if "gradients" in sources:
            measured |= gradient_dormancy(critic, trained)
        metrics = {SIGNALS[name].metric for name in self.signals}
        found = {metric: value for metric in metrics if (value := _of_module(measured, metric)) is not None}
        if "td_error" in sources and self._held_out is not None and self._group.all(self.ring.held_out > 0):
            error = subjects.held_out_td_error(self.agent, self._batch(self._held_out, draw), trained)
            found |= {"held_out": error.held_out, "gap": error.gap / max(error.held_out - error.gap, 1e-12)}
        if "angular_speed" in self.signals:
            self._weights, self._read_at = snapshot(critic.module), self.agent.updates
        return {name: found[SIGNALS[name].metric] for name in self.signals if SIGNALS[name].metric in found}

    def _batch(self, sampler: Sampler, draw: int) -> Inputs:
        return subjects.inputs_of(self.agent, sampler.sample(draw, self.agent.reward_scale.to(self.ring.device)))

    def _past(self) -> Past | None:
        """The weights at the last reading, if anything was learned since."""
        since = self.agent.updates - self._read_at
        return Past(self._weights, since) if self._weights and since else None

    def state_dict(self) -> dict[str, Any]:
        """The rule's state, and the updates until the last reading, as JSON can hold them."""
        return {"rule": self.rule.state_dict(), "read_at": self._read_at}

    def tensors(self) -> dict[str, Tensor]:
        """The critic's weights at the last reading, where a signal needs them."""
        return self._weights

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict` and `tensors`, bit for bit."""
        self.rule.load_state_dict(state["rule"])
        self.pace.ratio = self.rule.ratio
        self._weights = {name: tensor.to(self.agent.device) for name, tensor in tensors.items()}
        self._read_at = state["read_at"]


def _of_module(measured: Mapping[str, float], metric: str) -> float | None:
    """A metric of the module as a whole, or the mean over its layers where it is one of layers; None without any."""
    of_layers = {key.split("/")[-2]: value for key, value in measured.items() if key.rsplit("/", 1)[-1] == metric}
    if not of_layers:
        return None
    return of_layers[MODULE] if MODULE in of_layers else fmean(of_layers.values())
