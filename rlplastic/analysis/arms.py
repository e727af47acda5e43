"""Runs that differ in nothing but their seed, what sets them apart from others, and a row of results for each.

An arm is one configuration on one task; the arms of different tasks that answer to the same label are compared across
tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rlplastic.analysis.adaptation import dips
from rlplastic.analysis.runs import Run, Warn
from rlplastic.analysis.statistics import Floats, bootstrap_interval, curve_area, interquartile_mean, mean
from rlplastic.command_line import within
from rlplastic.config import HANDLING

NO_DIFFERENCE = ("seed", "threads", "env.threads", *HANDLING)
"""Settings, or sections, in which the runs of one arm may differ."""
TELLING = {
    "agent.name": "",
    "critic.kind": "",
    "monitor.mode": "monitor=",
    "preset.name": "preset=",
    "replay_ratio": "replay_ratio=",
}
"""Settings that name an arm if they can, in this order, and what stands before their value; others follow by name."""


@dataclass(frozen=True)
class Arm:
    """One configuration on one task."""

    task: str
    label: str
    """What sets it apart, such as ``sac, monitor=full``; the same for its like on other tasks."""
    settings: Mapping[str, Any]
    """Its configuration by dotted key, without `NO_DIFFERENCE`."""
    runs: tuple[Run, ...]
    """By seed."""

    @property
    def evaluated(self) -> tuple[Run, ...]:
        """Runs with an evaluation."""
        return tuple(run for run in self.runs if run.evaluations)

    @property
    def final_returns(self) -> Floats:
        """(seeds,) of the newest evaluations."""
        return np.array([run.final_return for run in self.evaluated])


class Row(NamedTuple):
    """An arm's results; NaN where nothing was evaluated, and as an interval of a single seed.

    Returns are those of every seed's newest evaluation; intervals are 95 % bootstrap intervals over seeds; the area is
    that under the evaluation curve over transitions, divided by its length; counters and times are means over seeds.
    Dips are those of the evaluation curve after switches and interventions (`rlplastic.analysis.adaptation`), means
    over all; ``recovered`` is the share that came back to the level before, ``recovery_steps`` the mean time of these.
    """

    task: str
    arm: str
    seeds: int
    finished: int
    return_mean: float
    return_low: float
    return_high: float
    return_iqm: float
    iqm_low: float
    iqm_high: float
    area_mean: float
    area_low: float
    area_high: float
    changes: float
    dip_depth: float
    dip_area: float
    recovered: float
    recovery_steps: float
    steps: float
    updates: float
    train_seconds: float
    wall_seconds: float


def arms_of(runs: Iterable[Run], warn: Warn) -> list[Arm]:
    """Group runs by task and settings, in the order of tasks and labels.

    Args:
        runs: as read.
        warn: told where a configuration and seed come twice, of which the longer run counts.
    """
    grouped: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        grouped.setdefault((run.task, repr(sorted(_settings(run).items(), key=str))), []).append(run)
    settings = [_settings(members[0]) for members in grouped.values()]
    tasks = [task for task, _ in grouped]
    keys = _distinguishing(settings, tasks)
    arms = [
        Arm(task, _label(config, keys, settings), config, _one_per_seed(members, warn))
        for task, config, members in zip(tasks, settings, grouped.values(), strict=True)
    ]
    return sorted(arms, key=lambda arm: (arm.task, arm.label))


def differences(arms: Sequence[Arm]) -> dict[str, list[str]]:
    """Every setting in which arms differ, with the value of each; ``–`` where an arm has no such setting."""
    keys = sorted({key for arm in arms for key in arm.settings})
    table = {key: [str(arm.settings.get(key, "–")) for arm in arms] for key in keys}
    return {key: values for key, values in table.items() if len(set(values)) > 1}


def row_of(arm: Arm) -> Row:
    """An arm's results."""
    returns = arm.final_returns
    areas = np.array([curve_area(*run.curve("step")) for run in arm.evaluated])
    figures: list[float] = []
    for values, statistic in ((returns, mean), (returns, interquartile_mean), (areas, mean)):
        if len(values):
            low, high = bootstrap_interval([values], statistic)
            figures += [float(statistic(values, 0)), float(low), float(high)]
        else:
            figures += [math.nan] * 3
    figures += _dips(arm)
    runs = arm.runs
    means = [float(np.mean([getattr(run, name) for run in runs])) for name in Row._fields[-4:]]
    return Row(arm.task, arm.label, len(runs), sum(run.finished for run in runs), *figures, *means)


def _dips(arm: Arm) -> list[float]:
    """`Row.changes` to `Row.recovery_steps`."""
    found = [dip for run in arm.evaluated for dip in dips(run.curve("step"), run.changes)]
    if not found:
        return [0.0, *[math.nan] * 4]
    times = [dip.recovery for dip in found if math.isfinite(dip.recovery)]
    depth, area = (float(np.mean([getattr(dip, name) for dip in found])) for name in ("depth", "area"))
    recovery = float(np.mean(times)) if times else math.nan
    return [len(found) / len(arm.evaluated), depth, area, len(times) / len(found), recovery]


def normalised(arms: Sequence[Arm]) -> dict[str, list[Floats]]:
    """Final returns by label, one array (seeds,) per task, where 0 and 1 are the lowest and highest evaluation there.

    Only labels that every task has, and only if there are several tasks: else there is nothing to compare.
    """
    tasks = list(dict.fromkeys(arm.task for arm in arms if arm.evaluated))
    scores: dict[str, list[Floats]] = {}
    for task in tasks:
        here = [arm for arm in arms if arm.task == task and arm.evaluated]
        returns = np.concatenate([run.evaluations["return_mean"] for arm in here for run in arm.evaluated])
        low, span = returns.min(), np.ptp(returns) or 1.0
        for arm in here:
            scores.setdefault(arm.label, []).append((arm.final_returns - low) / span)
    return {label: strata for label, strata in scores.items() if len(strata) == len(tasks) > 1}


def _settings(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.config.items() if not within(key, NO_DIFFERENCE)}


def _distinguishing(settings: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[str]:
    """The first of `TELLING` and then of all keys that tell the configurations of every task apart, and no more."""
    keys = [*TELLING, *sorted({key for config in settings for key in config} - {*TELLING, "env.task"})]
    chosen: list[str] = []

    def kinds(names: Sequence[str]) -> int:
        return len({(task, *(str(c.get(k)) for k in names)) for task, c in zip(tasks, settings, strict=True)})

    for candidate in keys:
        if kinds([*chosen, candidate]) > kinds(chosen):
            chosen.append(candidate)
    return chosen


def _label(config: Mapping[str, Any], keys: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> str:
    """As many values of ``keys`` as tell it from all other ``settings``; the agent's name if there are no others."""
    parts, alike = [], [*settings]
    for key in keys:
        if len({str(other.get(key)) for other in alike}) > 1:
            parts.append(TELLING.get(key, f"{key}=") + str(config[key]) if key in config else f"{key} unset")
            alike = [other for other in alike if str(other.get(key)) == str(config.get(key))]
    return ", ".join(parts) or str(config.get("agent.name", "runs"))


def _one_per_seed(runs: Sequence[Run], warn: Warn) -> tuple[Run, ...]:
    chosen: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: -run.steps):
        if run.seed in chosen:
            warn(f"{run.path} is the same configuration and seed as {chosen[run.seed].path}, which counts for both")
        else:
            chosen[run.seed] = run
    return tuple(chosen[seed] for seed in sorted(chosen))
