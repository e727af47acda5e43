"""Fixed and adaptive replay ratios at equal steps and at equal time, and what the published signal says.

    python benchmarks/replay_ratio/compare.py

Reads the run directories that the grid left beside this file, and writes ``comparison.md`` (returns with 95 % t
intervals over seeds) and ``comparison.png``: the ratio over environment transitions, and the fraction of active units
that the published rule decides by. Equal time is that of the quickest run of a task.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import grid  # noqa: E402 - found by the line above
from grid_results import interval, replace_file, with_interval  # noqa: E402
from rlplastic.analysis.runs import Run, read_run  # noqa: E402

Trace = tuple[list[int], list[float]]
LATE = 0.75
"""The mean over evaluations from this share of the steps, or of the time, on: single ones move by more than arms do."""


def late_return(run: Run, axis: str, end: float) -> float:
    """Mean of the evaluations in the last quarter before ``end`` on an axis, the one interpolated there included."""
    x, y = run.curve(axis)
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


def table(task: str, runs: dict[str, list[Run]]) -> list[str]:
    """Rows of one task."""
    quickest = min(run.train_seconds for members in runs.values() for run in members)
    lines = [
        f"## {task}",
        "",
        f"Equal time: {quickest:.0f} s of training. Late return: mean over the last quarter of the steps, and of that.",
        "",
        "| arm | seeds | late return at equal steps ± 95 % CI | at equal time | updates | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for arm, members in runs.items():
        at_steps = [late_return(run, "step", run.steps) for run in members]
        at_time = [late_return(run, "seconds", quickest) for run in members]
        shown = (with_interval(*interval(values)) for values in (at_steps, at_time))
        means = (f"{np.mean([getattr(run, name) for run in members]):,.0f}" for name in ("updates", "train_seconds"))
        lines.append(f"| {' | '.join((arm, str(len(members)), *shown, *means))} |")
    return [*lines, ""]


def draw(tasks: dict[str, dict[str, list[Run]]], path: Path) -> None:
    """Above the ratios, below the fraction of active units; a column per task."""
    figure = Figure(figsize=(4.6 * len(tasks), 6), layout="constrained")
    panels = figure.subplots(2, len(tasks), squeeze=False, sharex="col")
    for column, (task, runs) in enumerate(tasks.items()):
        for index, (arm, members) in enumerate(runs.items()):
            traces = [decisions(run.path) for run in members]
            for panel, of_panel in zip(panels[:, column], zip(*traces, strict=True), strict=True):
                _lines(panel, [trace for trace in of_panel if trace[0]], arm, f"C{index}")
        panels[0, column].set(title=task, ylabel="updates per transition", yscale="log")
        panels[1, column].set(xlabel="environment transitions", ylabel="fraction of active units")
        if panels[0, column].get_legend_handles_labels()[0]:
            panels[0, column].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _lines(panel: Axes, traces: Iterable[Trace], label: str, colour: str) -> None:
    for number, trace in enumerate(traces):
        panel.plot(*trace, color=colour, alpha=0.8, label=None if number else label)


def main(warn: Callable[[str], None] = print) -> None:
    """See the module."""
    plan = grid.load(HERE / "grid.yaml")
    tasks: dict[str, dict[str, list[Run]]] = {}
    for run in grid.plan(plan, HERE):
        read = read_run(HERE / "runs" / run.name, warn)
        if read is not None and read.finished:
            tasks.setdefault(run.task, {}).setdefault(run.arm, []).append(read)
    lines = ["# Adaptive replay ratio, beside fixed ones", ""]
    for task, runs in tasks.items():
        lines += table(task, runs)
    replace_file(HERE / "comparison.md", "\n".join(lines))
    draw(tasks, HERE / "comparison.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
