"""What a grid of critics says: returns, sample efficiency, equal cost and diagnoses, the flow beside the others.

    python benchmarks/flow_study.py benchmarks/flow_replay_ratio [--diagnose] [--cost flow=4.6 categorical=1 scalar=1]

Reads the grid's ``results.csv`` and ``curves/``. An arm is ``<group>_<kind>``, such as ``plain_16_flow``, or a kind
alone; kinds of one task and group are compared, paired by seed, with 95 % t intervals: *flow minus it* is above 0 where
the flow does better (errors: where it errs more). An effect size is the mean difference over its standard deviation.

- *times as far*: how far the flow's mean final return is above the floor, over how far the other's is; the floor is
  the mean of all first evaluations of the task.
- *times as fast*: transitions in which the other's mean curve gets to its last value, over those in which the flow's
  gets there; "never" where it does not.
- *equal cost*: the return when the cheapest kind of the group is through, in core time. A run's time is taken to be
  spent evenly over its updates, and is what ``train_seconds`` says, which means little for runs beside other work:
  ``--cost`` gives the time of an update of each kind instead, in any unit, as `rlplastic.bench what=update` told it.

``--diagnose`` diagnoses the runs whose directories are there (`rlplastic.diagnose_run`); ``diagnoses.csv`` keeps a row
for each run, ``study.md`` has the tables, ``returns.png`` and ``study.png`` are the pictures.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from grid_results import (
    COLOURS,
    Curve,
    Result,
    fit_height,
    interval,
    mean_curve,
    number,
    read_results,
    read_table,
    replace_file,
    with_interval,
)
from rlplastic import diagnose_run
from rlplastic.diagnosis import Report
from rlplastic.errors import RlplasticError

KINDS = ("flow", "categorical", "scalar")
ROWS, STEPS = 256, 100
"""Transitions of a diagnosis, and updates of its probe and of the critic's copies."""
MEASURES = {
    "value_error": "error of the value, in standard deviations of the returns",
    "held_out_td_error": "held-out TD error, in units of the critic's own loss",
    "head_over_all": "error of a copy that learned the returns with its head alone, over that of one with all layers",
    "head_error": "error of the copy that used its head alone",
    "noise_cost": "error after noise of 2 standard deviations in targets, over that without",
    "recovered": "share of an old copy's error that is repaired when it takes the first half of the steps",
    "curvature": "E|v - v(0)| at the last Euler step",
    "probe_ratio": "trainability probe of the critic, over a fresh network's",
}
"""What is kept of a diagnosis; empty where a kind has no such thing."""


class Arm(NamedTuple):
    """Runs that differ in their seed alone."""

    task: str
    group: str
    kind: str
    runs: dict[int, Result]


def arms_of(results: Sequence[Result]) -> list[Arm]:
    """Tasks in the order of the results, groups by their words and numbers, kinds in the order of `KINDS`."""
    found: dict[tuple[str, str, str], dict[int, Result]] = {}
    for result in results:
        group, _, kind = result.arm.rpartition("_")
        key = (result.task, group, kind) if kind in KINDS else (result.task, "", result.arm)
        found.setdefault(key, {})[result.seed] = result
    tasks = list(dict.fromkeys(task for task, _, _ in found))

    def place(arm: Arm) -> tuple[Any, ...]:
        words = [(word.isdigit(), int(word) if word.isdigit() else word) for word in arm.group.split("_")]
        return tasks.index(arm.task), words, place_of(arm.kind)

    return sorted((Arm(*key, runs) for key, runs in found.items()), key=place)


def place_of(kind: str) -> tuple[int, str]:
    """`KINDS` first, in their order, then others by name."""
    return (KINDS.index(kind) if kind in KINDS else len(KINDS)), kind


def colours_of(arms: Sequence[Arm]) -> dict[str, str]:
    """A colour for each kind, in the order of `place_of`."""
    kinds = sorted({arm.kind for arm in arms}, key=place_of)
    return {kind: COLOURS[place % len(COLOURS)] for place, kind in enumerate(kinds)}


def flow_of(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The flow that an arm is compared with; None if it is that itself, or there is none."""
    flows = [other for other in arms if (other.task, other.group, other.kind) == (arm.task, arm.group, "flow")]
    return flows[0] if flows and arm.kind != "flow" else None


def compared(mine: Mapping[int, float], flow: Mapping[int, float]) -> tuple[str, str]:
    """The flow's mean difference with its interval, and the effect size, over the seeds that both have."""
    differences = [flow[seed] - value for seed, value in mine.items() if seed in flow]
    if not differences:
        return "", ""
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    effect = f"{statistics.fmean(differences) / spread:.2f}" if spread else ""
    return with_interval(*interval(differences)), effect


# Returns


def curves_of(directory: Path, arm: Arm, axis: str = "step") -> dict[int, Curve]:
    """Evaluation returns by seed."""
    tables = {seed: read_table(directory / "curves" / f"{run.name}.csv") for seed, run in arm.runs.items()}
    return {seed: (table[axis], table["return_mean"]) for seed, table in tables.items()}


def mean_of(curves: Mapping[int, Curve]) -> Curve:
    """The mean curve at the points of the first one."""
    grid = next(iter(curves.values()))[0]
    return grid, np.mean([np.interp(grid, *curve) for curve in curves.values()], axis=0)


def reached(curve: Curve, level: float) -> float:
    """Where a curve first gets to a level, between its points; infinite if it never does."""
    x, y = curve
    above = np.flatnonzero(y >= level)
    if not len(above):
        return math.inf
    first = int(above[0])
    if first == 0:
        return float(x[0])
    share = (level - y[first - 1]) / (y[first] - y[first - 1])
    return float(x[first - 1] + share * (x[first] - x[first - 1]))


def times_as_fast(mine: Curve, flow: Curve) -> str:
    """Of the module's documentation."""
    level = float(mine[1][-1])
    there = reached(flow, level)
    return "never" if math.isinf(there) else f"{reached(mine, level) / there:.2f}"


def returns_table(directory: Path, arms: Sequence[Arm]) -> list[str]:
    """A row for each arm."""
    lines = [
        "| task | group | critic | seeds | final return | area | flow minus it (area) | effect | times as far | "
        "times as fast |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    curves = {arm[:3]: curves_of(directory, arm) for arm in arms}
    for arm in arms:
        firsts = [float(y[0]) for key, of in curves.items() if key[0] == arm.task for _, y in of.values()]
        floor = statistics.fmean(firsts)
        finals = [run.final_mean for run in arm.runs.values()]
        areas = {seed: run.area for seed, run in arm.runs.items()}
        cells = ["", "", "", ""]
        if (flow := flow_of(arm, arms)) is not None:
            mine, theirs = (statistics.fmean(run.final_mean for run in each.runs.values()) for each in (arm, flow))
            far = f"{(theirs - floor) / (mine - floor):.2f}" if mine > floor else ""
            fast = times_as_fast(mean_of(curves[arm[:3]]), mean_of(curves[flow[:3]]))
            cells = [*compared(areas, {seed: run.area for seed, run in flow.runs.items()}), far, fast]
        shown = [with_interval(*interval(finals)), with_interval(*interval(list(areas.values())))]
        lines.append(f"| {' | '.join([arm.task, arm.group, arm.kind, str(len(arm.runs)), *shown, *cells])} |")
    return lines


def equal_cost_table(directory: Path, arms: Sequence[Arm], cost: Mapping[str, float]) -> list[str]:
    """Returns of all kinds of a group when its cheapest one is through."""

    def of_run(arm: Arm, run: Result) -> float:
        return cost[arm.kind] * run.updates if cost else run.train_seconds

    totals = {arm[:3]: statistics.fmean(of_run(arm, run) for run in arm.runs.values()) for arm in arms}
    lines = [
        "| task | group | critic | cost, times the cheapest | return then | flow minus it |",
        "|---|---|---|---|---|---|",
    ]
    then: dict[tuple[str, str, str], dict[int, float]] = {}
    for arm in arms:
        least = min(total for key, total in totals.items() if key[:2] == arm[:2])
        share = least / totals[arm[:3]]
        curves = curves_of(directory, arm, "updates")
        then[arm[:3]] = {seed: float(np.interp(share * x[-1], x, y)) for seed, (x, y) in curves.items()}
    for arm in arms:
        least = min(total for key, total in totals.items() if key[:2] == arm[:2])
        mine = then[arm[:3]]
        flow = flow_of(arm, arms)
        minus = "" if flow is None else compared(mine, then[flow[:3]])[0]
        cells = (f"{totals[arm[:3]] / least:.2f}", with_interval(*interval(list(mine.values()))), minus)
        lines.append(f"| {' | '.join([arm.task, arm.group, arm.kind, *cells])} |")
    return lines


# Diagnoses


def measures(report: Report) -> dict[str, float]:
    """`MEASURES` of a diagnosis; NaN for what there is not."""
    critic = report.critic
    assert critic is not None, "a run has a critic"
    head, whole = critic.learning["head"][-1], critic.learning["all layers"][-1]
    probed = next(network.probe for network in report.networks if network.network == "critic")
    found = {
        "value_error": critic.value_error[-1],
        "held_out_td_error": report.td_error.held_out if report.td_error else math.nan,
        "head_over_all": head / whole,
        "head_error": head,
        "noise_cost": critic.noise[-1] / critic.noise[0],
        "probe_ratio": probed.ratio if probed else math.nan,
    }
    if (flow := critic.flow) is not None:
        found["curvature"] = flow.curvature[-1]
        if flow.recovery:
            new, half, old = (flow.recovery[index] for index in (0, len(flow.recovery) // 2, -1))
            found["recovered"] = (old - half) / (old - new) if old > new else math.nan
    return {name: found.get(name, math.nan) for name in MEASURES}


def read_diagnoses(path: Path) -> dict[str, dict[str, float]]:
    """``diagnoses.csv`` by run; empty without the file."""
    if not path.exists():
        return {}
    table = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))
    return {row.pop("run"): {name: float(value or "nan") for name, value in row.items()} for row in table}


def diagnose(directory: Path, results: Sequence[Result]) -> None:
    """Add to ``diagnoses.csv`` the runs that are not in it and whose directories are there."""
    path = directory / "diagnoses.csv"
    found = read_diagnoses(path)
    for run in results:
        folder = directory / "runs" / run.name
        if run.name in found or not (folder / "checkpoints").is_dir():
            continue
        try:
            found[run.name] = measures(diagnose_run(folder, rows=ROWS, probe_steps=STEPS))
        except RlplasticError as error:
            print(f"{run.name} is left out: {error}", file=sys.stderr)
            continue
        print(run.name, *(f"{name} {value:.3g}" for name, value in found[run.name].items()), flush=True)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("run", *MEASURES))
        for name in sorted(found):
            values = (found[name][measure] for measure in MEASURES)
            writer.writerow((name, *("" if math.isnan(value) else f"{value:.6g}" for value in values)))
        replace_file(path, text.getvalue())


def of_arm(arm: Arm, diagnoses: Mapping[str, Mapping[str, float]], measure: str) -> dict[int, float]:
    """A measure by seed, where there is one."""
    rows = {seed: diagnoses[run.name][measure] for seed, run in arm.runs.items() if run.name in diagnoses}
    return {seed: value for seed, value in rows.items() if math.isfinite(value)}


def diagnoses_table(arms: Sequence[Arm], diagnoses: Mapping[str, Mapping[str, float]]) -> list[str]:
    """For every measure a row for each arm that has it."""
    lines = []
    for measure, told in MEASURES.items():
        lines += ["", f"### {measure}", "", f"{told[0].upper()}{told[1:]}.", ""]
        lines += [
            "| task | group | critic | seeds | mean ± 95 % CI | flow minus it | effect |",
            "|---|---|---|---|---|---|---|",
        ]
        for arm in arms:
            mine = of_arm(arm, diagnoses, measure)
            if not mine:
                continue
            flow = flow_of(arm, arms)
            minus = ("", "") if flow is None else compared(mine, of_arm(flow, diagnoses, measure))
            cells = (str(len(mine)), with_interval(*interval(list(mine.values()))), *minus)
            lines.append(f"| {' | '.join([arm.task, arm.group, arm.kind, *cells])} |")
    return lines


# The pictures


def draw_returns(directory: Path, arms: Sequence[Arm], path: Path) -> None:
    """A panel for each task and group: every kind's mean learning curve with its interval, on one scale a task."""
    groups = list(dict.fromkeys(arm[:2] for arm in arms))
    means = {arm[:3]: mean_curve(list(curves_of(directory, arm).values())) for arm in arms}
    colours = colours_of(arms)
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(0.6 + 3.4 * columns, 0.4 + 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for (task, group), panel in zip(groups, panels, strict=False):
        here = [arm for arm in arms if arm[:2] == (task, group)]
        for arm in here:
            x, mean, width = means[arm[:3]]
            panel.plot(x, mean, ".-", color=colours[arm.kind], label=arm.kind)
            panel.fill_between(x, mean - width, mean + width, color=colours[arm.kind], alpha=0.15, linewidth=0)
        fit_height(panel, [mean for key, (_, mean, _) in means.items() if key[0] == task])
        panel.set_title(f"{task} {group}".strip() + f", {max(len(arm.runs) for arm in here)} seeds", fontsize=9)
        panel.grid(alpha=0.3)
    for panel in list(panels):
        panel.set_axis_off()
    figure.axes[0].legend(fontsize=8)
    figure.supxlabel("environment transitions", fontsize=9)
    figure.supylabel("evaluation return, mean and 95 % interval", fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def draw(arms: Sequence[Arm], diagnoses: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """A row of panels for each task: every arm's mean, its interval and its seeds."""

    def area(arm: Arm) -> dict[int, float]:
        return {seed: run.area for seed, run in arm.runs.items()}

    panels: dict[str, Callable[[Arm], dict[int, float]]] = {"area under the curve": area}
    for measure in ("value_error", "head_over_all", "noise_cost") if diagnoses else ():
        panels[measure] = lambda arm, measure=measure: of_arm(arm, diagnoses, measure)
    tasks = list(dict.fromkeys(arm.task for arm in arms))
    most = max(sum(arm.task == task for arm in arms) for task in tasks)
    size = (2 + 3 * len(panels), (0.8 + 0.2 * most) * len(tasks))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(tasks), len(panels), squeeze=False, sharey="row")
    colours = colours_of(arms)
    for line, task in zip(grid, tasks, strict=True):
        here = [arm for arm in arms if arm.task == task]
        for panel, (name, of) in zip(line, panels.items(), strict=True):
            for place, arm in enumerate(here):
                values = list(of(arm).values())
                if values:
                    colour = colours[arm.kind]
                    mean, width = interval(values)
                    panel.errorbar(mean, place, xerr=width, fmt="o", color=colour, capsize=3, markersize=4)
                    panel.plot(values, [place] * len(values), "|", color=colour, alpha=0.6)
            panel.set_title(f"{task}: {name.replace('_', ' ')}", fontsize=9)
            panel.set_yticks(range(len(here)), [f"{arm.group} {arm.kind}".strip() for arm in here], fontsize=8)
            panel.grid(alpha=0.3)
        line[0].invert_yaxis()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def study(directory: Path, cost: Mapping[str, float]) -> str:
    """Write ``study.md`` and its pictures; returns its text."""
    results = [result for result in read_results(directory / "results.csv").values() if result.complete]
    arms = arms_of(results)
    diagnoses = read_diagnoses(directory / "diagnoses.csv")
    given = ", ".join(f"{kind} {number(value)}" for kind, value in cost.items())
    lines = [f"# Flow critics beside others: {directory.name}", ""]
    lines += [f"Made by `python benchmarks/flow_study.py benchmarks/{directory.name}` of {len(results)} runs; what the"]
    lines += ["columns mean is in [the script](../flow_study.py).", "", "## Returns", ""]
    lines += [*returns_table(directory, arms), "", "## Returns at equal cost", ""]
    lines += [f"Cost of an update: {given}." if cost else "Cost: seconds of training as measured.", ""]
    lines += [*equal_cost_table(directory, arms, cost), "", "## Diagnoses at the end", ""]
    lines += [f"{len(diagnoses)} of these runs were diagnosed, on {ROWS} transitions, with {STEPS} updates of copies."]
    lines += diagnoses_table(arms, diagnoses) if diagnoses else []
    text = "\n".join([*lines, "", "![learning curves](returns.png)", "", "![arms](study.png)"]) + "\n"
    replace_file(directory / "study.md", text)
    draw_returns(directory, arms, directory / "returns.png")
    draw(arms, diagnoses, directory / "study.png")
    return text


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--diagnose", action="store_true", help="diagnose runs that have not been yet")
    parser.add_argument("--cost", nargs="*", default=[], metavar="KIND=NUMBER", help="time of an update of each kind")
    arguments = parser.parse_args()
    results = [result for result in read_results(arguments.directory / "results.csv").values() if result.complete]
    if not results:
        sys.exit(f"{arguments.directory} has no finished run: run its grid first")
    if arguments.diagnose:
        diagnose(arguments.directory, results)
    cost = {kind: float(value) for kind, _, value in (text.partition("=") for text in arguments.cost)}
    if cost and (missing := {arm.kind for arm in arms_of(results)} - set(cost)):
        sys.exit(f"--cost lacks {', '.join(sorted(missing))}: give the time of an update of every kind")
    print(study(arguments.directory, cost), end="")


if __name__ == "__main__":
    main()
