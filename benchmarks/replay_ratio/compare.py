"""Fixed and adaptive replay ratios at equal steps and at equal time, and what the published signal says.

    python benchmarks/replay_ratio/compare.py [--cost sac=1.5,6 flashsac=1.5,12]

Reads the run directories that the grid left beside this file, and writes ``comparison.md`` (returns with 95 % t
intervals over seeds) and ``comparison.png``: mean returns, ratios, and the fraction of active units that the published
rule decides by, over environment transitions. Equal time is that of the quickest run of a task; it is what the clock
told, which means little for runs beside other work, or with ``--cost`` what a task's transitions and updates took:
milliseconds of one of either, measured alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import grid  # noqa: E402 - found by the line above
from grid_results import interval, replace_file, with_interval  # noqa: E402
from rlplastic.analysis.runs import Curve, Run, read_run  # noqa: E402

Trace = tuple[list[int], list[float]]
LATE = 0.75
"""The mean over evaluations from this share of the steps, or of the time, on: single ones move by more than arms do."""
Cost = tuple[float, float] | None
"""Milliseconds of a transition and of an update; None: the clock's time counts."""


def seconds(run: Run, cost: Cost) -> tuple[Curve, float]:
    """Evaluations over the time of training, and how long that was."""
    if cost is None:
        return run.curve("seconds"), run.train_seconds
    spent = [cost[0] * run.evaluations["step"], cost[1] * run.evaluations["updates"]]
    return (sum(spent) / 1e3, run.evaluations["return_mean"]), (cost[0] * run.steps + cost[1] * run.updates) / 1e3


def late_return(curve: Curve, end: float) -> float:
    """Mean of the evaluations in the last quarter before ``end`` on a curve, the one interpolated there included."""
    x, y = curve
    inside = (x >= LATE * end) & (x < end)
    return float(np.append(y[inside], np.interp(end, x, y)).mean())


def decisions(path: Path) -> tuple[Trace, Trace]:
    """The ratio and, where it was read, the fraction of active units, each over environment transitions."""
    ratios: Trace = ([], [])
    active: Trace = ([], [])
    log = path / "plasticity.jsonl"
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        event = json.loads(line)
        if event["event"] == "replay_ratio":
            for trace, value in ((ratios, event["ratio"]), (active, event["readings"].get("fau"))):
                if value is not None:
                    trace[0].append(event["step"])
                    trace[1].append(value)
    return ratios, active


def table(task: str, runs: dict[str, list[Run]], cost: Cost = None) -> list[str]:
    """Rows of one task."""
    times = {arm: [seconds(run, cost) for run in members] for arm, members in runs.items()}
    quickest = min(end for members in times.values() for _, end in members)
    how = "" if cost is None else f", at {cost[0]:g} ms for a transition and {cost[1]:g} for an update"
    lines = [
        f"## {task}",
        "",
        f"Equal time: {quickest:.0f} s of training{how}. Late return: mean over the last quarter of the steps, and of "
        "that.",
        "",
        "| arm | seeds | late return at equal steps ± 95 % CI | at equal time | updates | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for arm, members in runs.items():
        at_steps = [late_return(run.curve("step"), run.steps) for run in members]
        at_time = [late_return(curve, quickest) for curve, _ in times[arm]]
        shown = (with_interval(*interval(values)) for values in (at_steps, at_time))
        means = (np.mean([run.updates for run in members]), np.mean([end for _, end in times[arm]]))
        cells = arm, str(len(members)), *shown, *(f"{mean:,.0f}" for mean in means)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def draw(tasks: dict[str, dict[str, list[Run]]], path: Path) -> None:
    """Mean returns, ratios, and the fraction of active units; a column per task."""
    figure = Figure(figsize=(4.6 * len(tasks), 8), layout="constrained")
    panels = figure.subplots(3, len(tasks), squeeze=False, sharex="col")
    for panel in panels[2, 1:]:  # that the one hardly moves shows beside the other
        panel.sharey(panels[2, 0])
    for column, (task, runs) in enumerate(tasks.items()):
        for index, (arm, members) in enumerate(runs.items()):
            curves = [run.curve("step") for run in members]
            steps = curves[0][0]
            panels[0, column].plot(steps, np.mean([np.interp(steps, *each) for each in curves], axis=0), label=arm)
            traces = [decisions(run.path) for run in members]
            for panel, of_panel in zip(panels[1:, column], zip(*traces, strict=True), strict=True):
                _lines(panel, [trace for trace in of_panel if trace[0]], arm, f"C{index}")
        panels[0, column].set(title=task, ylabel="evaluation return, mean")
        panels[0, column].legend(fontsize="small")
        panels[1, column].set(ylabel="updates per transition", yscale="log", yticks=(0.25, 0.5, 1, 2, 4))
        panels[1, column].yaxis.set_major_formatter("{x:g}")
        panels[1, column].yaxis.set_minor_locator(NullLocator())
        panels[2, column].set(xlabel="environment transitions", ylabel="fraction of active units")
    figure.savefig(path, dpi=120)


def _lines(panel: Axes, traces: Iterable[Trace], label: str, colour: str) -> None:
    for number, trace in enumerate(traces):
        panel.plot(*trace, color=colour, alpha=0.8, label=None if number else label)


def main(arguments: Sequence[str] = (), warn: Callable[[str], None] = print) -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cost", nargs="*", default=[], metavar="TASK=TRANSITION,UPDATE", help="milliseconds of one")
    given = (pair.partition("=") for pair in parser.parse_args(arguments).cost)
    costs = {task: tuple(float(number) for number in numbers.split(",")) for task, _, numbers in given}
    plan = grid.load(HERE / "grid.yaml")
    tasks: dict[str, dict[str, list[Run]]] = {}
    for run in grid.plan(plan, HERE):
        read = read_run(HERE / "runs" / run.name, warn)
        if read is not None and read.finished:
            tasks.setdefault(run.task, {}).setdefault(run.arm, []).append(read)
    lines = ["# Adaptive replay ratio, beside fixed ones", ""]
    for task, runs in tasks.items():
        lines += table(task, runs, costs.get(task))
    replace_file(HERE / "comparison.md", "\n".join(lines))
    draw(tasks, HERE / "comparison.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
