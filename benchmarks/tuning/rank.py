"""Which arm of the tuning grid is best: returns by task, and their ratio to the arm ``auto``, as ``ranking.md``.

    python benchmarks/tuning/rank.py

An arm's score is the geometric mean over tasks of (its mean return / that of ``auto``): no task counts more for paying
larger rewards. It is told beside the score on its worst task, since a default must not cost one task for another, and
beside every seed's return, since two seeds rank nobody who is close.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import grid_results  # noqa: E402 - found by the line above

REFERENCE = "auto"
Returns = dict[str, dict[str, dict[int, float]]]
"""By arm, by task, by seed."""


def returns(directory: Path) -> Returns:
    """Final returns of the runs that ended well."""
    found: Returns = {}
    for run in grid_results.read_results(directory / "results.csv").values():
        if run.complete:
            found.setdefault(run.arm, {}).setdefault(run.task, {})[run.seed] = run.final_mean
    return found


def ratios(arm: dict[str, dict[int, float]], reference: dict[str, dict[int, float]]) -> dict[str, float]:
    """By task, over the seeds that both have; NaN where the arm has none of them or a mean is not positive."""
    found = {}
    for task, theirs in reference.items():
        seeds = arm.get(task, {}).keys() & theirs.keys()
        ours, base = (sum(values[seed] for seed in seeds) for values in (arm.get(task, {}), theirs))
        found[task] = ours / base if ours > 0 and base > 0 else math.nan
    return found


def ranking(found: Returns) -> list[tuple[str, float, dict[str, float]]]:
    """Arm, score and ratios by task, best first; arms that lack a task come last, with a score of NaN."""
    rows = []
    for arm, by_task in found.items():
        of_task = ratios(by_task, found[REFERENCE])
        rows.append((arm, float(np.exp(np.log(list(of_task.values())).mean())), of_task))
    return sorted(rows, key=lambda row: (math.isnan(row[1]), -row[1]))


def document(found: Returns) -> list[str]:
    """Markdown lines."""
    tasks = list(found[REFERENCE])
    header = ["arm", "score", "worst task", *(f"{task}: return by seed (ratio)" for task in tasks)]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for arm, score, of_task in ranking(found):
        cells = [arm, f"{score:.2f}", f"{np.min(list(of_task.values())):.2f}"]
        for task in tasks:
            seeds = ", ".join(grid_results.number(value) for _, value in sorted(found[arm].get(task, {}).items()))
            cells.append(f"{seeds or '–'} ({of_task[task]:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(directory: Path = HERE) -> int:
    """Write ``ranking.md``; 1 before the reference has a result."""
    found = returns(directory)
    if REFERENCE not in found:
        print(f"{directory} holds no finished run of {REFERENCE} yet: run the grid first", file=sys.stderr)
        return 1
    intro = [
        "# preset=auto, one setting at a time",
        "",
        "Made by `python benchmarks/tuning/rank.py` from results.csv; what made that, and what is missing:",
        f"[summary.md](summary.md). Score: geometric mean over tasks of the mean return's ratio to `{REFERENCE}`'s.",
        "",
    ]
    grid_results.replace_file(directory / "ranking.md", "\n".join(intro + document(found)) + "\n")
    print(f"wrote {directory / 'ranking.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
