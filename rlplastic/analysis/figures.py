"""The report's figures: learning curves, final results, what happened inside, and where the time went.

Lines are interquartile means over seeds wherever all seeds have values, thin lines the seeds themselves; bands are 95 %
stratified-bootstrap intervals (arXiv 2108.13264). One colour is one arm on the whole page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import blended_transform_factory

from rlplastic.analysis import style
from rlplastic.analysis.arms import Arm
from rlplastic.analysis.runs import CHANGES, Run
from rlplastic.analysis.statistics import (
    Curve,
    Floats,
    above,
    as_curve,
    bootstrap_interval,
    common_grid,
    interquartile_mean,
    mean,
    stacked,
)

WIDTH = 11.0
"""Inches of every figure."""
LETTERS = 170
"""That fit beside each other into a figure."""
COLUMNS = 3
FEW_POINTS = 15
"""Up to here a curve's points are marked."""
TRAINING = {
    "train/return": ("return while exploring", "return"),
    "train/replay_ratio": ("replay ratio", "updates per transition"),
    "loss/critic": ("critic loss", "loss"),
    "value/q_mean": ("value of the policy's actions", "scaled return"),
    "policy/entropy": ("policy entropy", "nats"),
    "policy/alpha": ("entropy temperature", "alpha"),
}
"""Scalars of TensorBoard that every agent has: heading and unit."""
NORMS = {
    f"norm/{network}_{what}": (f"{network}: {name}", "distance from the bound")
    for network in ("actor", "critic")
    for what, name in (("linear_rows", "weight rows"), ("batch_norm", "batch norms"), ("rms_norm", "RMS norms"))
}
"""Scalars of norm-bounded agents."""
INFORMATIVE = (
    *("probe_ratio", "held_out_td_error", "effective_rank", "dormant", "dead", "duplicates", "gradient_dormant"),
    *("angular_speed", "weight_norm", "distance_from_init", "batch_norm_lag", "logit_entropy", "value_bias", "churn"),
)
"""Metrics of plasticity that come first, by the ends of their names."""
MOST_METRICS = 12
CRITICS = {
    "error of the value": "Euler steps",
    "recovery": "share of the steps by an old copy",
    "error while the head alone learns": "updates",
    "error while all layers learn": "updates",
    "error after noise in targets": "size of the noise",
    "curvature of the path": "t",
}
"""Panels of diagnosed critics by title: the horizontal axis."""
LEARNING = {"head": "error while the head alone learns", "all layers": "error while all layers learn"}
"""Titles of the panels of copies that learn, by the layers that do."""
EVENTS = {
    "alarm": ("|", "alarm"),
    "probe": (".", "probe"),
    "committed": ("v", "intervention"),
    "scheduled": ("v", "intervention"),
    "taken_back": ("^", "taken back"),
    "dropped": ("x", "branch dropped"),
}
"""The monitor's events that are marked above a panel: marker and name; of `CHANGES` a line through it, too."""
SPENT = {
    "update": ("updating networks", "#0b4f7d"),
    "learn": ("learning", "#0b4f7d"),
    "sample": ("drawing batches", "#2f83bd"),
    "check": ("looking at losses", "#86bfe6"),
    "compile": ("compiling", "#c5e0f3"),
    "env": ("simulator", "#d55e00"),
    "act": ("acting", "#e69f00"),
    "evaluate": ("evaluating", "#009e73"),
    "monitor": ("watching plasticity", "#44aa99"),
    "store": ("storing", "#5f676f"),
    "checkpoint": ("saving", "#969ea6"),
    "log": ("logging", "#c6ccd2"),
    "start": ("starting", "#cc79a7"),
    "resume": ("resuming", "#882255"),
    "finish": ("finishing", "#8c6d31"),
    "other": ("everything else", "#d4d8dd"),
}
"""Sections of `rlplastic.time_profile` and of ``timing.csv`` as bars name and colour them, in their order."""

Colours = Mapping[str, Mapping[str, Any]]
"""Colour and line style by an arm's label."""


def learning(arms: Sequence[Arm], colours: Colours) -> Figure | None:
    """Evaluation returns over transitions, over updates and over the time of training; None without any."""
    arms = [arm for arm in arms if arm.evaluated]
    if not arms:
        return None
    figure = Figure(figsize=(WIDTH, 3.6))
    panels = figure.subplots(1, 3, sharey=True)
    longest = max((run.train_seconds for arm in arms for run in arm.runs), default=0.0)
    unit, seconds = ("h", 3600) if longest >= 7200 else ("min", 60) if longest >= 120 else ("s", 1)
    for panel, axis in zip(panels, ("step", "updates", "seconds"), strict=True):
        scale = seconds if axis == "seconds" else 1
        for arm in arms:
            curves = [(x / scale, y) for x, y in (run.curve(axis) for run in arm.evaluated)]
            _draw(panel, curves, colours[arm.label], band=True)
        if axis != "seconds":
            style.engineering(panel)
    panels[0].set(xlabel="environment transitions", ylabel="evaluation return")
    panels[1].set(xlabel="gradient updates")
    panels[2].set(xlabel=f"time of training ({unit}), evaluation excluded")
    explained: list[Artist] = [
        Line2D([], [], color=style.INK, label="interquartile mean"),
        Patch(color=style.INK, alpha=0.18, linewidth=0, label="95 % interval"),
        Line2D([], [], color=style.INK, linewidth=0.7, alpha=0.5, label="each seed"),
    ]
    _legend(figure, arms, colours, explained if any(len(arm.evaluated) > 1 for arm in arms) else ())
    return figure


def outcome(arms: Sequence[Arm], colours: Colours) -> Figure | None:
    """The newest evaluations: interquartile mean and mean with their intervals, and the profile; None without any."""
    strata = {arm.label: [arm.final_returns] for arm in arms if arm.evaluated}
    return _outcome(strata, arms, colours, "return of the newest evaluation") if strata else None


def across(scores: Mapping[str, Sequence[Floats]], arms: Sequence[Arm], colours: Colours) -> Figure:
    """The same over all tasks, of `rlplastic.analysis.arms.normalised` scores."""
    return _outcome(scores, arms, colours, "normalised return of the newest evaluation")


def scalars(arms: Sequence[Arm], colours: Colours, tags: Mapping[str, tuple[str, str]]) -> Figure | None:
    """A panel for each of the TensorBoard scalars that a run has; None without any."""
    there = {tag: told for tag, told in tags.items() if any(tag in run.scalars for arm in arms for run in arm.runs)}
    if not there:
        return None
    figure, panels = _multiples(len(there), "environment transitions")
    for panel, (tag, (title, unit)) in zip(panels, there.items(), strict=True):
        for arm in arms:
            _draw(panel, [run.scalars[tag] for run in arm.runs if tag in run.scalars], colours[arm.label])
        panel.set(title=title, ylabel=unit)
    _legend(figure, [arm for arm in arms if any(tag in run.scalars for tag in there for run in arm.runs)], colours)
    return figure


def plasticity(arms: Sequence[Arm], colours: Colours) -> Figure | None:
    """What the monitor measured over updates, and when it did something; None if it measured nothing."""
    curves = {id(run): _measured(run) for arm in arms for run in arm.runs}
    names = sorted({name for measured, _ in curves.values() for name in measured}, key=_importance)[:MOST_METRICS]
    if not names:
        return None
    figure, panels = _multiples(len(names), "gradient updates")
    for panel, name in zip(panels, names, strict=True):
        for arm in arms:
            pairs = [curves[id(run)] for run in arm.runs]
            measured, fresh = ([each[i][name] for each in pairs if name in each[i]] for i in (0, 1))
            _draw(panel, measured, colours[arm.label])
            for run in arm.runs:
                _mark(panel, run, colours[arm.label]["color"])
            if fresh and len(grid := common_grid(fresh)):
                middle = interquartile_mean(stacked(fresh, grid))
                panel.plot(grid, middle, ":", color=colours[arm.label]["color"], linewidth=1.2)
        if name.endswith("probe_ratio"):
            panel.axhline(1.0, color=style.INK, linewidth=0.9, linestyle=":")
        panel.set_title(name.replace("_", " "), pad=12)
    events = {record.event for arm in arms for run in arm.runs for record in run.records}
    marks = {told: marker for event, (marker, told) in EVENTS.items() if event in events}
    explained: list[Artist] = [Line2D([], [], color=style.INK, linewidth=1.2, linestyle=":", label="fresh network")]
    explained += [
        Line2D([], [], color=style.INK, marker=marker, linestyle="none", label=told) for told, marker in marks.items()
    ]
    _legend(figure, [arm for arm in arms if any(curves[id(run)][0] for run in arm.runs)], colours, explained)
    return figure


def critics(arms: Sequence[Arm], colours: Colours) -> Figure | None:
    """What `rlplastic.diagnose` found critics' values and features worth; None if no run was diagnosed."""
    curves = {id(run): _judged(run.critic) for arm in arms for run in arm.runs if run.critic}
    titles = [title for title in CRITICS if any(title in found for found in curves.values())]
    if not titles:
        return None
    figure, panels = _multiples(len(titles), "")
    for panel, title in zip(panels, titles, strict=True):
        for arm in arms:
            found = [curves[id(run)] for run in arm.runs if id(run) in curves]
            _draw(panel, [each[title] for each in found if title in each], colours[arm.label])
        panel.xaxis.set_major_formatter("{x:.4g}")
        panel.set(title=title, xlabel=CRITICS[title])
    _legend(figure, [arm for arm in arms if any(run.critic for run in arm.runs)], colours)
    return figure


def time_spent(arms: Sequence[Arm], colours: Colours) -> Figure | None:
    """Fractions of wall time by section as a bar for each arm; None without any timing."""
    spent = {arm.label: _spent(arm.runs) for arm in arms}
    spent = {label: sections for label, sections in spent.items() if sections}
    if not spent:
        return None
    figure = Figure(figsize=(WIDTH, 1.3 + 0.42 * len(spent)))
    panel = figure.subplots()
    used = [name for name in SPENT if any(sections.get(name, 0.0) >= 0.005 for sections in spent.values())]
    left = np.zeros(len(spent))
    for name in used:
        told, shade = SPENT[name]
        width = np.array([sections.get(name, 0.0) for sections in spent.values()])
        bars = panel.barh(list(spent), width, left=left, height=0.62, label=told, color=shade, edgecolor=style.PAPER)
        texts = [f"{fraction:.0%}" if fraction >= 0.05 else "" for fraction in width]
        panel.bar_label(bars, texts, label_type="center", fontsize="small", color=style.on(shade))
        left += width
    for row, label in enumerate(spent):
        (chip,) = panel.plot(-0.008, row, "s", color=colours[label]["color"], markersize=5, clip_on=False)
        chip.set_in_layout(False)
    panel.set(xlim=(0, 1.001), xlabel="fraction of wall time")
    panel.tick_params(axis="y", pad=13, length=0)
    panel.xaxis.set_major_formatter("{x:.0%}")
    panel.grid(False)
    panel.invert_yaxis()
    figure.legend(loc="outside upper left", ncols=_columns([SPENT[name][0] for name in used]), handlelength=1.2)
    return figure


def _draw(panel: Axes, curves: Sequence[Curve], look: Mapping[str, Any], band: bool = False) -> None:
    """The interquartile mean of an arm's curves where all of them have values, its interval, and the curves."""
    if not curves:
        return
    for curve in curves if len(curves) > 1 else ():
        panel.plot(*curve, color=look["color"], linewidth=0.7, alpha=0.4)
    grid = common_grid(curves)
    if not len(grid):
        return
    values = stacked(curves, grid)
    panel.plot(grid, interquartile_mean(values), **look, marker="o" if len(grid) <= FEW_POINTS else "", markersize=3)
    if band and len(curves) > 1:
        low, high = bootstrap_interval([values], interquartile_mean)
        panel.fill_between(grid, low, high, color=look["color"], alpha=0.18, linewidth=0)


def _outcome(strata: Mapping[str, Sequence[Floats]], arms: Sequence[Arm], colours: Colours, unit: str) -> Figure:
    figure = Figure(figsize=(WIDTH, max(2.9, 1.2 + 0.5 * len(strata))))
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    every = np.concatenate([scores for arrays in strata.values() for scores in arrays])
    margin = 0.06 * np.ptp(every) or 1.0
    thresholds = np.linspace(every.min() - margin, every.max() + margin, 201)
    for row, (label, arrays) in enumerate(strata.items()):
        look = colours[label]
        scores = np.concatenate(arrays)
        left.plot(scores, np.full(len(scores), row), "|", color=look["color"], markersize=13, alpha=0.6)
        for statistic, marker, offset in ((interquartile_mean, "o", -0.13), (mean, "s", 0.13)):
            low, high = bootstrap_interval(arrays, statistic)
            left.plot([low, high], [row + offset] * 2, color=look["color"], linewidth=5, alpha=0.3)
            left.plot(statistic(scores, 0), row + offset, marker, color=look["color"], markersize=6)
        profile = above(thresholds)
        right.step(thresholds, profile(scores, 0), where="post", **look)
        low, high = bootstrap_interval(arrays, profile)
        right.fill_between(thresholds, low, high, step="post", color=look["color"], alpha=0.18, linewidth=0)
    left.set(yticks=range(len(strata)), yticklabels=list(strata), ylim=(len(strata) - 0.5, -0.5), xlabel=unit)
    left.grid(axis="y", visible=False)
    right.set(xlabel=f"{unit}, τ", ylabel="fraction of runs above τ", ylim=(-0.03, 1.03))
    explained: list[Artist] = [
        Line2D([], [], color=style.INK, marker="o", linestyle="none", label="interquartile mean"),
        Line2D([], [], color=style.INK, marker="s", linestyle="none", label="mean"),
        Patch(color=style.INK, alpha=0.3, linewidth=0, label="95 % interval"),
        Line2D([], [], color=style.INK, marker="|", linestyle="none", markersize=9, label="each run"),
    ]
    _legend(figure, [arm for arm in arms if arm.label in strata], colours, explained)
    return figure


def _multiples(count: int, axis: str) -> tuple[Figure, list[Axes]]:
    """Small panels over ``axis``, three in a row."""
    rows = -(-count // COLUMNS)
    figure = Figure(figsize=(WIDTH, 0.5 + 2.45 * rows))
    panels = list(figure.subplots(rows, COLUMNS, squeeze=False).flatten())
    for panel in panels[count:]:
        panel.remove()
    for index, panel in enumerate(panels[:count]):
        style.engineering(panel)
        panel.yaxis.set_major_formatter("{x:.4g}")
        if index + COLUMNS >= count:
            panel.set_xlabel(axis)
    return figure, panels[:count]


def _legend(figure: Figure, arms: Sequence[Arm], colours: Colours, explained: Sequence[Artist] = ()) -> None:
    """The arms, with the runs that each has in the figure, and what the figure's signs mean."""
    counts: dict[str, int] = {}
    for arm in arms:
        counts[arm.label] = counts.get(arm.label, 0) + len(arm.runs)
    told = {label: f"{label} ({count} run{'s' if count > 1 else ''})" for label, count in counts.items()}
    entries: list[Artist] = [Line2D([], [], label=name, **colours[label]) for label, name in told.items()]
    entries += explained
    columns = _columns([str(entry.get_label()) for entry in entries])
    figure.set_figheight(figure.get_figheight() + 0.19 * (-(-len(entries) // columns) - 1))  # inches of a further row
    figure.legend(handles=entries, loc="outside upper left", ncols=columns, columnspacing=1.4)


def _columns(labels: Sequence[str]) -> int:
    """Of a legend: all in one row where they fit."""
    letters = [len(label) + 8 for label in labels]
    return len(letters) if sum(letters) <= LETTERS else max(1, LETTERS // max(letters))


def _measured(run: Run) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Metrics over updates, and those of fresh networks, by module and name; what is not finite is left out."""
    found: tuple[dict[str, list[tuple[float, float]]], ...] = ({}, {})
    for record in run.records:
        for points, values in zip(found, (record.values, record.fresh), strict=True):
            for name, value in _of_modules(values).items():
                if np.isfinite(value):
                    points.setdefault(name, []).append((record.updates, value))
    measured, fresh = ({name: as_curve(pairs) for name, pairs in points.items()} for points in found)
    return measured, fresh


def _of_modules(values: Mapping[str, float]) -> dict[str, float]:
    """``<module> <metric>``: of the module as a whole, else the mean over its layers; worst members are left out."""
    layers: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        parts = name.split("/")
        if len(parts) == 3 and not name.endswith("_worst"):  # readings of a batch that stays have more parts
            layers.setdefault(f"{parts[0]} {parts[2]}", {})[parts[1]] = value
    return {name: found.get("all", float(np.mean([*found.values()]))) for name, found in layers.items()}


def _importance(name: str) -> tuple[int, str]:
    place = next((i for i, metric in enumerate(INFORMATIVE) if name.endswith(metric)), len(INFORMATIVE))
    return place, name


def _judged(critic: Mapping[str, Any]) -> dict[str, Curve]:
    """A diagnosed critic's curves by the titles of their panels; what was not measured is left out."""
    flow = critic["flow"] or {"recovery": (), "curvature": ()}
    count, steps = len(critic["value_error"]), len(flow["curvature"])
    curves = {
        "error of the value": (range(1, count + 1), critic["value_error"]),
        "recovery": (np.arange(steps + 1) / max(steps, 1), flow["recovery"]),
        "error after noise in targets": (critic["magnitudes"], critic["noise"]),
        "curvature of the path": (np.arange(steps) / max(steps, 1), flow["curvature"]),
    }
    for layers, title in LEARNING.items():
        errors = critic["learning"].get(layers, ())
        curves[title] = (np.arange(len(errors)) * critic["every"], errors)
    return {title: (np.array(x, np.float64), np.array(y, np.float64)) for title, (x, y) in curves.items() if len(y)}


def _mark(panel: Axes, run: Run, colour: str) -> None:
    """Mark a run's events above a panel, and by a line through it those that changed the network."""
    above_panel = blended_transform_factory(panel.transData, panel.transAxes)
    look: dict[str, Any] = {"color": colour, "transform": above_panel, "clip_on": False, "markersize": 5}
    for event, (marker, _) in EVENTS.items():
        moments = [record.updates for record in run.records if record.event == event]
        (marks,) = panel.plot(moments, [1.04] * len(moments), marker, **look)
        marks.set_in_layout(False)  # the layout would take its height for a width
        for moment in moments if event in CHANGES else ():
            panel.axvline(moment, color=colour, linewidth=0.8, alpha=0.6)


def _spent(runs: Sequence[Run]) -> dict[str, float]:
    """Fractions of wall time by section over an arm's runs: of their profiles, or else of ``timing.csv``."""
    seconds: dict[str, float] = {}
    profiled = all(run.profile for run in runs)
    for run in runs:
        for name, value in (run.profile if profiled else _from_timing(run)).items():
            known = name if name in SPENT else "other"
            seconds[known] = seconds.get(known, 0.0) + value
    total = sum(seconds.values())
    return {name: value / total for name, value in seconds.items()} if total > 0 else {}


def _from_timing(run: Run) -> dict[str, float]:
    """Seconds by section, of the rows' fractions and what passed between them."""
    if not run.timings:
        return {}
    wall, attempt = run.timings["wall_seconds"], run.timings["attempt"]
    passed = np.diff(wall, prepend=0.0)
    first = np.diff(attempt, prepend=0.0) > 0
    passed[first] = wall[first]
    columns = [name for name in run.timings if name.startswith("fraction_")]
    return {name.removeprefix("fraction_"): float((run.timings[name] * passed).sum()) for name in columns}
