"""Settings of the plasticity monitor and of the adaptive replay ratio: parts of `rlplastic.config.Config`."""

from __future__ import annotations

from dataclasses import dataclass, field

ADAPTIVE = "adaptive"
"""`replay_ratio=adaptive`."""


@dataclass
class AdaptiveConfig:
    """How `replay_ratio=adaptive` moves the ratio: see `rlplastic.plasticity.replay_ratio`."""

    rule: str = "continuous"
    """continuous: in small steps, up while no signal is worse than its reference and down while one is; plateau: `low`
    until the signal has settled, then `high` for good (arXiv 2310.07418)."""
    signal: str | None = None
    """What is read of the critic: for plateau one name, for continuous also several, separated by commas; None: fau for
    plateau, as published, else gradient_dormant, and td_gap where episodes are held out."""
    window: int | None = None
    """Environment transitions between two readings; None: those of 50 full episodes for plateau, as published, else
    those of 5, and at least 100 vector steps."""
    low: float | None = None
    """The first and the least ratio; None: 0.5 for plateau, as published, else what the run would have anyway."""
    high: float | None = None
    """The most; None: four times `low`, as published."""
    tolerance: float = 1e-3
    """plateau: the signal has settled when it moved by at most this in a window; published 0.001."""
    step: float = 1.05
    """continuous: factor of one move."""
    calm: float = 0.05
    """continuous: it rises while no signal is worse than its reference by this relative amount."""
    alarm: float = 0.1
    """continuous: it falls while one is worse by more than this."""
    memory: float = 5.0
    """continuous: windows over which signals are smoothed."""


@dataclass
class MonitorConfig:
    """The plasticity monitor (docs/plasticity.md).

    Cadences and windows are in updates; in runs with a budget in steps they shrink to a part of the planned ones.
    """

    mode: str = "watch"
    """off; watch: measure and raise alarms, never act; full: probe, treat a branch, verify, commit or roll back;
    scheduled: intervene at given updates, asking nobody (a baseline)."""
    forward_every: int = 1_000
    """Between readings of units and weights; at most a 20th of the planned updates."""
    ranks_every: int = 10_000
    """Between readings of ranks; at most a 5th."""
    probe_every: int = 50_000
    """Between probes without an alarm; at most a half."""
    probe_steps: int = 300
    """Optimizer steps of a probe on each function."""
    probe_functions: int = 3
    """Random functions of a probe."""
    ill: float = 1.5
    """A network is ill if its probe is this many times a fresh network's: healthy runs measured up to 1, ill ones 3."""
    ill_gap: float = 0.1
    """And if its area under the loss curve is larger by this share of the targets' variance, for of two small areas the
    ratio says nothing: ill networks measured 0.15 and more, FlashSAC's 0.06 at 2.2, a solved Pendulum's 0.16 at 2.9."""
    healthy: float = 1.2
    """A treated network must come below this."""
    ladder: list[str] = field(
        default_factory=lambda: [
            "optimizer_reset",
            "redo",
            "last_layer_reset",
            "shrink_and_perturb",
            "agent_reset",
        ]
    )
    """Interventions in the order in which they are tried, smallest first; agent_reset renews all networks and alpha.
    A full_reset of one network is left out: it leaves a policy that went astray with its critic."""
    max_interventions: int = 4
    """Commits in a run; 0: probe, but never act."""
    budget: float = 0.15
    """Share of the planned updates (of those done, where none are planned) that probes and branches may cost."""
    verify_updates: int | None = None
    """Updates of a branch before it is judged; None: 2,000, at most a 20th of the planned ones."""
    verify_rounds: int = 4
    """How often so many updates a branch may have before it is dropped."""
    value_margin: float = 0.1
    """By how much a branch's errors may exceed its twin's, in standard deviations of the targets."""
    rank_margin: float = 0.05
    """By how much its rank correlation of values and returns may fall short."""
    return_margin: float = 0.2
    """Share of the training return that may be missing at the end of the recovery window."""
    recovery_updates: int | None = None
    """The recovery window after a commit; None: 5,000, at most a 10th of the planned updates."""
    cooldown: int | None = None
    """Updates after a decision in which no other is taken, but after a drop that leaves larger ones; None: 5,000,
    at most a 20th of the planned ones."""
    scheduled_every: int = 50_000
    """Between scheduled interventions."""
    scheduled_intervention: str = "full_reset"
    """What is done to actor and critic then."""
    scheduled_count: int | None = None
    """So many interventions at random moments of the planned updates, instead of every `scheduled_every`."""
    histograms: bool = False
    """Also show the networks' weights as histograms in TensorBoard, with every forward reading."""
