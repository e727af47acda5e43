"""Returns at 3 and 6 minutes, with the ratio to the best peer, by task: ``returns.md`` and ``returns.png``.

    python benchmarks/time_to_return/compare.py

Reads what the grid left (``results.csv`` and ``curves/``) and writes beside it. The best peer of a task and time is the
contender with the highest mean there, rlplastic left out; chosen by the very numbers it is then compared with, it is
more likely flattered than wronged. Intervals are 95 % t intervals over seeds; one seed has none.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import grid_results  # noqa: E402 - found by the line above

OURS = "rlplastic"
MINUTES = (3, 6)


class Score(NamedTuple):
    """A contender on a task at a time; means over its seeds, ``half_width`` NaN for one seed."""

    arm: str
    seeds: int
    mean: float
    half_width: float
    steps: float
    updates: float


def score(directory: Path, runs: list[grid_results.Result], minutes: float) -> Score | None:
    """Of the runs of one task and arm; None if one of them was never evaluated then."""
    reached = []
    for run in runs:
        table = grid_results.read_table(directory / "curves" / f"{run.name}.csv")
        rows = [row for row, at in enumerate(table.get("train_seconds", ())) if at >= 60 * minutes]
        if not rows:
            return None
        reached.append([float(table[column][rows[0]]) for column in ("return_mean", "step", "updates")])
    returns, steps, updates = zip(*reached, strict=True)
    mean, half_width = grid_results.interval(returns)
    return Score(runs[0].arm, len(runs), mean, half_width, sum(steps) / len(runs), sum(updates) / len(runs))


def scores(directory: Path, minutes: float) -> dict[str, list[Score]]:
    """By task, best first; only runs that ended well count."""
    groups: dict[tuple[str, str], list[grid_results.Result]] = {}
    for run in grid_results.read_results(directory / "results.csv").values():
        if run.complete:
            groups.setdefault((run.task, run.arm), []).append(run)
    found: dict[str, list[Score]] = {}
    for (task, _), runs in groups.items():
        if (one := score(directory, runs, minutes)) is not None:
            found.setdefault(task, []).append(one)
    return {task: sorted(several, key=lambda one: -one.mean) for task, several in found.items()}


def ratio(one: Score, several: list[Score]) -> float:
    """Of its mean to the best peer's; NaN without a peer, or where that peer's return is not positive."""
    peer = max((other.mean for other in several if other.arm != OURS), default=math.nan)
    return one.mean / peer if peer > 0 else math.nan


def table(minutes: float, by_task: dict[str, list[Score]]) -> list[str]:
    """Markdown lines."""
    columns = ("task", "contender", "seeds", "return ± 95 % CI", "to the best peer", "steps", "updates")
    lines = ["", f"## After {minutes:g} minutes", "", _row(columns), _row(["---"] * len(columns))]
    number = grid_results.number
    for task, several in by_task.items():
        for one in several:
            spread = f" ± {number(one.half_width)}" if math.isfinite(one.half_width) else ""
            to_best = ratio(one, several)
            shown = f"{to_best:.2f}" if math.isfinite(to_best) else "–"
            done = (f"{one.steps:.0f}", f"{one.updates:.0f}")
            lines.append(_row([task, one.arm, one.seeds, number(one.mean) + spread, shown, *done]))
    return lines


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def draw(panel: Axes, several: list[Score], title: str) -> None:
    """Bars, best first, ours filled."""
    names = [f"{one.arm} ({one.seeds})" for one in several]
    means = [one.mean for one in several]
    errors = [0.0 if math.isnan(one.half_width) else one.half_width for one in several]
    colours = [grid_results.COLOURS[0] if one.arm == OURS else "#BBBBBB" for one in several]
    panel.barh(names, means, xerr=errors, color=colours, error_kw={"linewidth": 1})
    panel.invert_yaxis()
    panel.set_title(title, fontsize="medium")
    panel.tick_params(labelsize="small")


def main(directory: Path = HERE) -> int:
    """Write both files; 1 without any result."""
    found = {minutes: scores(directory, minutes) for minutes in MINUTES}
    tasks = list(dict.fromkeys(task for by_task in found.values() for task in by_task))
    if not tasks:
        print(f"{directory} holds no finished run yet: run the grid first", file=sys.stderr)
        return 1
    lines = ["# Return after equal minutes", ""]
    lines += ["Made by `python benchmarks/time_to_return/compare.py` from results.csv and curves; what made those, and"]
    lines += ["what is missing: [summary.md](summary.md).", "", "![returns](returns.png)"]
    for minutes, by_task in found.items():
        lines += table(minutes, by_task)
    grid_results.replace_file(directory / "returns.md", "\n".join(lines) + "\n")
    figure = Figure(figsize=(4.6 * len(tasks), 2.9 * len(MINUTES)), layout="constrained")
    panels = figure.subplots(len(MINUTES), len(tasks), squeeze=False)
    for row, minutes in zip(panels, MINUTES, strict=True):
        for panel, task in zip(row, tasks, strict=True):
            draw(panel, found[minutes].get(task, []), f"{task}, {minutes} minutes")
    figure.supxlabel("mean deterministic return; (seeds); lines: 95 % t interval over seeds", fontsize="small")
    figure.savefig(directory / "returns.png", dpi=120)
    print(f"wrote {directory / 'returns.md'} and {directory / 'returns.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
