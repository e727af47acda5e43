"""What watching costs the main job: updates a second with ``monitor=watch`` over those with ``monitor=off``, in pairs.

    python benchmarks/watch_cost/compare.py

Reads ``timing.csv`` of the runs that the grid left beside this file and writes ``cost.md``. A rate is that of the rows
after the first update was logged, so that neither the first transitions nor compilation count: they are the same in
both. Runs of one seed are a pair, one after the other; their order in the grid is off, watch.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from grid_results import interval, read_table, replace_file, with_interval  # noqa: E402 - found by the line above


def rate(path: Path) -> float:
    """Updates in a second of training, from the first row with an update to the last.

    Raises:
        ValueError: fewer than two rows have one: the run was too short.
    """
    table = read_table(path)
    rows = table["updates"] > 0
    updates, seconds = table["updates"][rows], table["train_seconds"][rows]
    if len(updates) < 2:
        raise ValueError(f"{path} has {len(updates)} rows with updates; expected two or more, so train for longer")
    return float((updates[-1] - updates[0]) / (seconds[-1] - seconds[0]))


def main() -> None:
    """See the module."""
    lines = ["# Cost of watching", "", "| seed | updates a second, off | watch | cost |", "|---|---|---|---|"]
    costs = []
    for off in sorted(HERE.glob("runs/humanoid__off__*/timing.csv")):
        watch = off.parents[1] / off.parent.name.replace("__off__", "__watch__") / "timing.csv"
        if not watch.exists():
            continue
        one, other = rate(off), rate(watch)
        costs.append(1 - other / one)
        lines.append(f"| {off.parent.name.rpartition('__')[2]} | {one:.2f} | {other:.2f} | {costs[-1]:.1%} |")
    mean = with_interval(*(100 * value for value in interval(costs))) if costs else "–"
    lines += ["", f"Cost of monitor=watch: {mean} % of the updates (mean of pairs, 95 % t interval)."]
    replace_file(HERE / "cost.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
