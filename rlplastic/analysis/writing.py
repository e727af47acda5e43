"""From run directories to a folder with the page, its figures and the table of results."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from rlplastic.analysis import figures, style
from rlplastic.analysis.arms import Arm, Row, arms_of, normalised, row_of
from rlplastic.analysis.page import Picture, Section, page
from rlplastic.analysis.runs import Warn, find_runs, read_run
from rlplastic.errors import ConfigurationError
from rlplastic.run_directory import remedy, write_atomically

CURVES = (
    "Evaluation return of the deterministic policy. Lines end where the first seed ends; the seeds' own curves go on."
)
RESULTS = (
    "Left: every run's newest evaluation, and the interquartile mean and mean over runs with their 95 % intervals. "
    "Right: performance profile, the fraction of runs that got beyond a return; higher is better everywhere."
)
ACROSS = (
    "The same over all tasks at once. Scores are normalised in each task: 0 is the lowest and 1 the highest evaluation "
    "that any of these runs made there, so they say how arms compare here and nothing beyond these runs."
)
INSIDE = "Means since the last log point. Lines are interquartile means over seeds, thin lines the seeds."
BOUNDS = "Largest relative distance of a weight row or a gain from the norm it is held to: 0 up to rounding."
MEASURED = (
    "What the plasticity monitor measured, of whole networks, or the mean over layers where it measured only these; "
    "dotted: of fresh networks on the same states. Marks above a panel are the monitor's events; a vertical line is a "
    "change of the network. A probe ratio above 1 means: slower to learn than a fresh network."
)
JUDGED = (
    "What the critics of diagnosed runs are worth (python -m rlplastic.diagnose run=…): mean absolute errors against "
    "returns of the replay, in their standard deviations. Of flows: after each Euler step, and with the first ones "
    "taken by an old copy. Of all kinds: while a copy learns the returns, and after updates with noise in the targets."
)
SPENT = "Where wall time went, all seeds together; of profile.json where every run has one, else of timing.csv."

Maker = Callable[[Sequence[Arm], figures.Colours], Figure | None]
FIGURES: dict[str, tuple[str, str, Maker]] = {
    "curves": ("Learning curves", CURVES, figures.learning),
    "results": ("Final results", RESULTS, figures.outcome),
    "plasticity": ("Plasticity", MEASURED, figures.plasticity),
    "critics": ("Critics", JUDGED, figures.critics),
    "training": ("Training", INSIDE, partial(figures.scalars, tags=figures.TRAINING)),
    "norms": ("Bounded norms", BOUNDS, partial(figures.scalars, tags=figures.NORMS)),
    "time": ("Time", SPENT, figures.time_spent),
}
"""A task's figures by the ends of their files' names: heading, how to read them, and how they are made."""


def write(runs: str, out: Path, warn: Warn) -> list[Row]:
    """Write the report of ``runs`` into ``out``; the page comes last, when all it tells of is there.

    Args:
        runs: as `rlplastic.analysis.runs.find_runs` takes it.
        out: made if it does not exist; files of an earlier report there are replaced.
        warn: told of what is left out, and why.

    Returns:
        The results, one row per arm.

    Raises:
        ConfigurationError: no run is there or readable, or ``out`` cannot be written.
    """
    found = [run for path in find_runs(runs, warn) if (run := read_run(path, warn)) is not None]
    if not found:
        raise ConfigurationError(f"runs={runs} matches no run that can be read; expected one with a whole config.yaml")
    for run in found:
        if not run.evaluations:
            warn(f"{run.path} has no evaluation yet: it counts as a seed without a return")
    arms = arms_of(found, warn)
    labels = dict.fromkeys(arm.label for arm in arms)
    colours = {label: style.colour(index) for index, label in enumerate(labels)}
    rows = [row_of(arm) for arm in arms]
    try:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        sections = _sections(arms, colours, out / "figures")
        write_atomically(out / "results.csv", _csv(rows))
        write_atomically(out / "results.json", _json(rows, arms))
        write_atomically(out / "index.html", page(rows, sections, colours))
    except OSError as error:
        raise ConfigurationError(
            f"out={out} cannot be written ({error.strerror or error}); {remedy(error)} or name another folder"
        ) from error
    return rows


def _sections(arms: Sequence[Arm], colours: figures.Colours, folder: Path) -> list[Section]:
    sections = []
    scores = normalised(arms)
    if scores:
        with style.drawing("across"):
            svg = style.save(figures.across(scores, arms, colours), folder, "all_tasks")
        sections.append(Section("All tasks", [Picture("Final results", svg, ACROSS)]))
    for task in dict.fromkeys(arm.task for arm in arms):
        here = [arm for arm in arms if arm.task == task]
        sections.append(Section(task, _pictures(task, here, colours, folder), here))
    return sections


def _pictures(task: str, arms: Sequence[Arm], colours: figures.Colours, folder: Path) -> list[Picture]:
    """A task's figures; those are left out for which its runs logged nothing."""
    pictures = []
    for name, (title, caption, make) in FIGURES.items():
        file = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', task)}_{name}"
        with style.drawing(file):
            figure = make(arms, colours)
            if figure is not None:
                pictures.append(Picture(title, style.save(figure, folder, file), caption))
    return pictures


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(Row._fields)
    table.writerows(rows)
    return text.getvalue()


def _json(rows: Sequence[Row], arms: Sequence[Arm]) -> str:
    """The same with the configuration and the runs of every arm; null where there is no number."""
    arms_told = [
        {
            **{name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row._asdict().items()},
            "settings": dict(sorted(arm.settings.items())),
            "runs": [{"path": str(run.path), "seed": run.seed, "finished": run.finished} for run in arm.runs],
        }
        for row, arm in zip(rows, arms, strict=True)
    ]
    return json.dumps({"arms": arms_told}, indent=1) + "\n"
