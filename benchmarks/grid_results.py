"""What a grid of training runs leaves behind: ``results.csv``, the learning curves, a plot and ``summary.md``.

One row of ``results.csv`` is one run that ended by itself. Intervals are Student's t intervals of the mean over seeds
(two-sided, 95 %), which assume the seeds' results are roughly normal; with one seed there is none.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib.metadata
import io
import math
import os
import platform
import statistics
import subprocess
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray
from scipy.special import stdtrit

from rlplastic.errors import ConfigurationError

ROOT = Path(__file__).resolve().parents[1]
NON_FINITE_EXIT = 3
"""A training run stopped on non-finite numbers: a result, the same however often it is run again."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#882255")
"""Okabe and Ito's palette, told apart with colour-blind eyes too; yellow is replaced, since it vanishes on white, and
Tol's wine added."""
AXES = {
    "step": "environment transitions",
    "updates": "critic updates",
    "train_seconds": "seconds of training, evaluation excluded",
}
"""Columns of ``eval.csv`` that may be a plot's horizontal axis; `rlplastic.train` writes all but ``train_seconds``."""
MANY_ARMS = 4
"""More than these in one panel leave no room for each seed, nor for a legend in a corner."""
BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": 2, "frameon": False}
"""Where a legend stands then."""
LETTERS_PER_INCH = 11.0
"""Of a plot's heading in matplotlib's default font, with some to spare for wide letters."""


Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Values of the horizontal axis (n,), rising, and evaluation returns (n,)."""


class Result(NamedTuple):
    """One row of ``results.csv``; numbers are NaN where the run left no evaluation."""

    task: str
    arm: str
    seed: int
    exit_code: int
    env_steps: float
    updates: float
    final_mean: float
    final_ci95_low: float
    final_ci95_high: float
    area: float
    wall_seconds: float
    train_seconds: float
    jobs: int
    machine: str
    versions: str
    commit: str
    command: str

    @property
    def name(self) -> str:
        """The run's directory and the stem of its curve."""
        return f"{self.task}__{self.arm}__{self.seed}"

    @property
    def complete(self) -> bool:
        """Whether the run ended well and was evaluated; only such rows enter plots and means."""
        return self.exit_code == 0 and math.isfinite(self.final_mean)

    @property
    def settled(self) -> bool:
        """Whether running it again would tell nothing new."""
        return self.complete or self.exit_code == NON_FINITE_EXIT


COLUMNS = {
    "final_mean": "final evaluation return",
    "area": "area under the evaluation curve, divided by its length in transitions (mean return while learning)",
    "env_steps": "environment transitions",
    "updates": "critic updates",
    "train_seconds": "seconds of training, evaluation excluded",
    "wall_seconds": "seconds in all",
}
"""Columns of `Result` that a summary may tabulate."""


def machine() -> str:
    """Processor and cores this process may use."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {platform.system()}"


@functools.cache
def versions(packages: tuple[str, ...] = ()) -> str:
    """Python and the packages a result depends on, those of ``packages`` too; what is not installed is left out."""
    found = [f"python {platform.python_version()}"]
    for package in ("rlplastic", "torch", "numpy", "envpool", "mujoco", "gymnasium", *packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)


def commit() -> str:
    """The checkout's commit, marked where a reader could not check out what ran.

    ``+uncommitted``: code, pinned versions or a grid's own scripts differ from it. ``+unreferenced``: no branch and no
    tag holds it.
    """
    head = _git("rev-parse", "--short=12", "HEAD")
    if head.returncode:
        return "unknown"
    # Not everything: a grid's results lie in the tree, too. In a pathspec * matches folders as well.
    code = ("rlplastic", "benchmarks/*.py", "pyproject.toml", "constraints.txt")
    changed = _git("status", "--porcelain", "--untracked-files=all", "--", *code).stdout.strip()
    held = _git("for-each-ref", "--count=1", "--contains", "HEAD").stdout.strip()
    return head.stdout.strip() + ("+uncommitted" if changed else "") + ("" if held else "+unreferenced")


def traced(recorded: str) -> str:
    """A commit as a summary tells it: with a remark if it is none of those that lead to the present one."""
    name = recorded.partition("+")[0]
    if name == "unknown" or _git("rev-parse", "HEAD").returncode:
        return recorded
    known = _git("merge-base", "--is-ancestor", name, "HEAD").returncode == 0
    return recorded if known else f"{recorded} (not in this history)"


def replace_file(path: Path, text: str) -> None:
    """Write ``path`` so that a reader, or a crash, finds the old content or the new, never a part."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    with staged.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def _cell(value: object) -> object:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.0f}" if value.is_integer() else f"{value:.6g}"


def read_results(path: Path) -> dict[str, Result]:
    """The newest row of every run, by the run's name; empty without a file.

    Raises:
        ConfigurationError: the file has other columns.
    """
    if not path.exists():
        return {}
    kinds = get_type_hints(Result)
    results = {}
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        if tuple(table.fieldnames or ()) != Result._fields:
            raise ConfigurationError(
                f"{path} has the columns {table.fieldnames}, expected {list(Result._fields)}: "
                "move the file away to start anew"
            )
        for row in table:
            result = Result(**{column: kind(row[column] or "nan") for column, kind in kinds.items()})
            results[result.name] = result
    return results


def append_result(path: Path, result: Result) -> None:
    """Add a row, atomically; the caller holds the grid's lock, so nobody else writes meanwhile."""
    text = path.read_text(encoding="utf-8") if path.exists() else ",".join(Result._fields) + "\n"
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(map(_cell, result))
    replace_file(path, text + line.getvalue())


def read_table(path: Path) -> dict[str, NDArray[np.float64]]:
    """A CSV file of numbers as columns (rows,); empty without a file, and without a last line that is not whole."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
    return {column: np.array([float(row[column]) for row in rows]) for column in (rows[0] if rows else ())}


def seconds(run: Path, column: str) -> float:
    """What all attempts of a run took by its ``timing.csv``; 0 without the file.

    ``wall_seconds`` starts from zero in every attempt, so their largest values are added. ``train_seconds`` goes on
    from the checkpoint that an attempt resumed from: the last value is that of the whole run. A table without the
    column ``attempt`` is that of one attempt.
    """
    table = read_table(run / "timing.csv")
    if column not in table:
        return 0.0
    values = table[column]
    if column == "train_seconds":
        return float(values[-1])
    attempts = table.get("attempt", np.ones(len(values)))
    return float(sum(values[attempts == attempt].max() for attempt in np.unique(attempts)))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t interval; the half-width is NaN for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, float(stdtrit(len(values) - 1, 0.975)) * statistics.stdev(values) / math.sqrt(len(values))


def mean_curve(curves: Sequence[Curve]) -> NDArray[np.float64]:
    """Columns x, mean and half-width (3, n) of several (x, y) curves.

    Runs stopped by time are evaluated at different x: each curve is interpolated linearly at all x from the last of
    the first points on. A curve that ends earlier than others holds its last value, so that the mean ends with that of
    the final evaluations.
    """
    low = max(x[0] for x, _ in curves)
    grid = np.unique(np.concatenate([x for x, _ in curves]))
    grid = grid[grid >= low]
    columns = [interval([float(np.interp(x, *curve)) for curve in curves]) for x in grid]
    return np.vstack([grid, np.array(columns).reshape(-1, 2).T])


def random_policy(directory: Path) -> dict[str, tuple[float, float, float]]:
    """Mean return and its 95 % interval by task, of ``random_policy.csv`` beside the results; empty without the file.

    Raises:
        ConfigurationError: the file has other columns than `random_policy.py` writes.
    """
    path = directory / "random_policy.csv"
    if not path.exists():
        return {}
    columns = ("return_mean", "return_ci95_low", "return_ci95_high")
    with path.open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        if not {"task", *columns} <= set(table.fieldnames or ()):
            raise ConfigurationError(
                f"{path} has the columns {table.fieldnames}, expected task, {', '.join(columns)}: make it with "
                "benchmarks/random_policy.py"
            )
        return {row["task"]: (float(row[columns[0]]), float(row[columns[1]]), float(row[columns[2]])) for row in table}


def _curve(path: Path, axis: str) -> Curve | None:
    """Evaluation returns over the column ``axis``; None without a file.

    Raises:
        ConfigurationError: the file has no such column.
    """
    table = read_table(path)
    if not table:
        return None
    if axis not in table:
        there = ", ".join(name for name in AXES if name in table)
        raise ConfigurationError(f"{path} has no column {axis}, and the grid's x is {axis}: choose one of {there}")
    return table[axis], table["return_mean"]


def _draw_arm(
    panel: Axes, colour: str, label: str, curves: Sequence[Curve], crowded: bool
) -> list[NDArray[np.float64]]:
    """The mean of an arm's runs, dotted once one of them has ended, its band, and, with room, the runs.

    Returns what to show.
    """
    x, mean, half_width = mean_curve(curves)
    band = 0.07 if crowded else 0.15
    panel.fill_between(x, mean - half_width, mean + half_width, color=colour, alpha=band, linewidth=0)
    for curve in curves if len(curves) > 1 and not crowded else ():
        panel.plot(*curve, color=colour, linewidth=0.6, alpha=0.6)
    all_run = x <= min(steps[-1] for steps, _ in curves)
    marker = "." if len(x) < 15 else ""
    panel.plot(x[all_run], mean[all_run], color=colour, label=label, marker=marker)
    last = int(all_run.sum()) - 1
    if 0 <= last < len(x) - 1:
        panel.plot(x[last:], mean[last:], color=colour, linestyle=":", linewidth=2)
    return [mean] if crowded else [mean, *(returns for _, returns in curves)]


def _draw_random(panel: Axes, mean: float, low: float, high: float) -> NDArray[np.float64]:
    panel.axhspan(low, high, color="grey", alpha=0.25, linewidth=0)
    panel.axhline(mean, color="grey", linestyle="--", linewidth=1, label="random policy, 95 % interval")
    return np.array([mean])


def _explain(figure: Figure, columns: int, seeds: bool, several: bool, held: bool) -> None:
    """One legend for what the panels share, in black: the colours are the arms'."""
    entries: list[Artist] = [Line2D([], [], color="black", label="mean over seeds")]
    if held:
        what = "mean once a run has ended (it counts with its last value)"
        entries.append(Line2D([], [], color="black", linestyle=":", linewidth=2, label=what))
    if seeds:
        entries.append(Line2D([], [], color="black", linewidth=0.6, alpha=0.6, label="each seed"))
    if several:
        what = "95 % t interval of the mean (may go on beyond the panel)"
        entries.append(Patch(color="black", alpha=0.15, label=what))
    figure.legend(handles=entries, loc="outside lower center", ncols=min(columns, 2), fontsize="small", frameon=False)


def plot(directory: Path, title: str, axis: str, results: Iterable[Result]) -> Path:
    """Draw ``curves.png``: a panel per task, and per arm its mean and, with several, its seeds' own curves and a band.

    With more than `MANY_ARMS` in a panel the seeds' curves are left out, and the legend stands below it.

    The band never sets the vertical axis: with two seeds t is 12.7, and the curves would be flat lines inside it. The
    tasks of a ``random_policy.csv`` beside it get that policy's mean and interval as the floor.
    """
    complete = [result for result in results if result.complete]
    tasks = list(dict.fromkeys(result.task for result in complete)) or ["no run has finished"]
    arms = list(dict.fromkeys(result.arm for result in complete))
    floor = random_policy(directory)
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    width = 4.8 * columns + 0.4
    counts = {task: len({r.arm for r in complete if r.task == task}) for task in tasks}
    below = max((count for count in counts.values() if count > MANY_ARMS), default=0) // 2  # rows of a panel's legend
    figure = Figure(figsize=(width, (3.6 + 0.2 * below) * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    seeds = several = held = False
    for panel in panels[len(tasks) :]:
        panel.remove()
    for panel, task in zip(panels, tasks, strict=False):
        shown: list[NDArray[np.float64]] = []
        crowded = counts[task] > MANY_ARMS
        for arm in arms:
            named = [r.name for r in complete if (r.task, r.arm) == (task, arm)]
            curves = [curve for name in named if (curve := _curve(directory / "curves" / f"{name}.csv", axis))]
            if curves:
                label = f"{arm} ({len(curves)} seeds)" if len(curves) > 1 else f"{arm} (1 seed)"
                shown += _draw_arm(panel, COLOURS[arms.index(arm) % len(COLOURS)], label, curves, crowded)
                several |= len(curves) > 1
                seeds |= len(curves) > 1 and not crowded
                held |= len({float(x[-1]) for x, _ in curves}) > 1
        if shown and task in floor:
            shown.append(_draw_random(panel, *floor[task]))
        if shown:
            fit_height(panel, shown)
        panel.set(title=task, xlabel=AXES[axis])
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="small", **(BELOW if crowded else {}))
    for row in range(rows):
        panels[row * columns].set_ylabel("evaluation return")
    figure.suptitle("\n".join(textwrap.wrap(title, int(width * LETTERS_PER_INCH))), fontsize="medium")
    _explain(figure, columns, seeds, several, held)
    path = directory / "curves.png"
    figure.savefig(path, dpi=120)
    return path


def number(value: float) -> str:
    """Four significant digits below a thousand, whole numbers above, and never an exponent for large ones."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def fit_height(panel: Axes, shown: Sequence[NDArray[np.float64]]) -> None:
    """Let a panel's vertical axis hold these curves, with a margin, and nothing of their bands beyond."""
    low, high = float(np.min(np.concatenate(shown))), float(np.max(np.concatenate(shown)))
    margin = 0.05 * (high - low) or 1.0
    panel.set_ylim(low - margin, high + margin)


def with_interval(mean: float, half_width: float) -> str:
    """A mean and its half-width, if there is one, for a table."""
    return number(mean) + (f" ± {number(half_width)}" if math.isfinite(half_width) else "")


def _tables(columns: Sequence[str], results: Sequence[Result]) -> list[str]:
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.task, result.arm), []).append(result)
    lines = []
    for column in columns:
        lines += ["", f"## {column}", "", f"{COLUMNS[column].capitalize()}.", ""]
        lines += ["| task | arm | runs | mean ± 95 % CI | per seed |", "|---|---|---|---|---|"]
        for (task, arm), members in groups.items():
            values = [getattr(member, column) for member in members]
            shown = with_interval(*interval(values))
            per_seed = ", ".join(
                f"{member.seed}: {number(value)}" for member, value in zip(members, values, strict=True)
            )
            lines.append(f"| {task} | {arm} | {len(members)} | {shown} | {per_seed} |")
    return lines


def summarise(
    directory: Path,
    title: str,
    question: str,
    note: str,
    command: str,
    columns: Sequence[str],
    results: Sequence[Result],
    missing: dict[str, str],
) -> Path:
    """Write ``summary.md``.

    Args:
        directory: the grid's folder.
        title: the grid's name.
        question: what the grid was run to find out.
        note: what a reader of the numbers has to know beside them.
        command: the command line that makes all of it.
        columns: what to tabulate, of `COLUMNS`.
        results: rows of the grid in its own order, failed ones too.
        missing: why each run without a complete row has none, by the run's name.
    """
    complete = [result for result in results if result.complete]
    lines = [f"# {title}", "", *([question.strip(), ""] if question.strip() else [])]
    lines += [f"Made by `{command}`: {len(complete)} of {len(complete) + len(missing)} runs finished.", ""]
    seeds = sorted({result.seed for result in complete})
    facts = {"seeds": [", ".join(map(str, seeds))], "runs at a time": [str(result.jobs) for result in complete]}
    facts |= {fact: [getattr(result, fact) for result in complete] for fact in ("machine", "versions", "commit")}
    facts["commit"] = [traced(commit) for commit in dict.fromkeys(facts["commit"])]
    lines += [f"- {fact}: {'; '.join(dict.fromkeys(values)) or 'none'}" for fact, values in facts.items()]
    lines += ["", f"Note: {note.strip()}"] if note.strip() else []
    lines += ["", "![learning curves](curves.png)", *_tables(columns, complete)]
    first = {(result.task, result.arm): result.command for result in reversed(complete)}
    lines += ["", "## Commands", "", "The first seed of each arm; the others differ in `seed` and `name`.", "", "```"]
    lines += [*(first[key] for key in dict.fromkeys((r.task, r.arm) for r in complete)), "```", "", "## Shortfall", ""]
    lines += [f"- {name}: {reason}" for name, reason in missing.items()] or ["None: every run finished."]
    path = directory / "summary.md"
    replace_file(path, "\n".join(lines) + "\n")
    return path
