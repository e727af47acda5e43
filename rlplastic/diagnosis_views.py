"""A diagnosis to read: a table for the terminal and a picture.

Neither says healthy or ill. The probe's ratio is told in words, without a threshold: what is usual differs between
kinds of networks. Of metrics it is told how far they are from a fresh network's, and of those that are flat by
construction why they say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity.measure import MODULE
from rlplastic.run_directory import remedy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rlplastic.critic_diagnosis import CriticReport
    from rlplastic.diagnosis import Diagnosis, Metric, Report

WIDEST = 32.0
"""Factors beyond this are drawn at the edge."""


class Row(NamedTuple):
    """A metric of a whole network: its own, or the mean over its layers."""

    name: str
    tier: str
    value: float
    worst: float | None
    fresh: float | None
    reason: str | None


def rows(network: Diagnosis) -> list[Row]:
    """One row for each metric, those that say something first, in the order of their tiers."""
    by_name: dict[str, list[Metric]] = {}
    for metric in network.metrics:
        if metric.name != "hessian_trace_error":  # the trace's own standard error, which the document has
            by_name.setdefault(metric.name, []).append(metric)
    found = []
    for name, metrics in by_name.items():
        if whole := [metric for metric in metrics if metric.layer == MODULE]:
            metrics = whole
        fresh = [metric.fresh for metric in metrics if metric.fresh is not None]
        worst = [metric.worst for metric in metrics if metric.worst is not None]
        found.append(
            Row(
                name,
                metrics[0].tier,
                fmean(metric.value for metric in metrics),
                fmean(worst) if worst else None,
                fmean(fresh) if fresh else None,
                metrics[0].reason,
            )
        )
    return sorted(found, key=lambda row: row.reason is not None)


def verdict(network: Diagnosis) -> str:
    """What the probe found, in words."""
    probed = network.probe
    if probed is None:
        return f"{network.network}: not probed"
    ratio = probed.ratio
    if not math.isfinite(ratio):
        return f"{network.network}: the probe met numbers that are not finite"
    if ratio > 1.05:
        told = f"learns {ratio - 1:.0%} slower than a fresh network"
    elif ratio < 0.95:
        told = f"learns {1 - ratio:.0%} faster than a fresh network"
    else:
        told = "learns as fast as a fresh network"
    members = f", its members {', '.join(f'{each:.3g}' for each in probed.members)}" if len(probed.members) > 1 else ""
    return f"{network.network}: {told} (probe ratio {ratio:.3g}{members})"


def show(report: Report, console: Console) -> None:
    """Print the probe's verdicts, and a table for each network."""
    console.print(Text(f"{report.subject}: {report.rows:,} rows"), soft_wrap=True)
    for network in report.networks:
        table = Table("metric", "now", "worst member", "fresh", "beside fresh", box=None, pad_edge=False)
        silent: dict[str, list[str]] = {}
        for row in rows(network):
            if row.reason is None:
                cells = [row.name, _number(row.value), _number(row.worst), _number(row.fresh), _change(row)]
                table.add_row(*(Text(cell) for cell in cells))
            else:
                silent.setdefault(row.reason, []).append(f"{row.name} {_number(row.value)}")
        console.print(Text(f"\n{verdict(network)}", style="bold"), soft_wrap=True)
        console.print(table)
        for reason, named in silent.items():
            console.print(Text(f"says nothing here: {', '.join(named)} ({reason})", style="dim"), soft_wrap=True)
    console.print()
    if report.critic is not None:
        show_critic(report.critic, console)
    if report.td_error is not None:
        error = report.td_error
        console.print(f"held-out TD error {error.held_out:.4g}, {error.gap:+.2g} from that in training")
    for name, reason in report.unavailable.items():
        console.print(Text(f"not measured: {name}: {reason}"), soft_wrap=True)


def show_critic(report: CriticReport, console: Console) -> None:
    """Print what a critic's values and features are worth; errors are in standard deviations of the returns."""
    table = Table("what", "found", box=None, pad_edge=False)
    for name, value in critic_rows(report):
        table.add_row(Text(name), Text(value))
    told = f"values of the {report.kind} critic on {report.rows:,} recent transitions, of whose returns "
    told += f"{report.bootstrapped:.0%} are bootstrapped; errors in their standard deviations"
    console.print(Text(told, style="bold"), soft_wrap=True)
    console.print(table)
    console.print()


def critic_rows(report: CriticReport) -> list[tuple[str, str]]:
    """Each diagnostic of a critic and what was found, in words and numbers."""
    flow = report.flow
    steps = "after each Euler step" if flow else "of the value"
    rows = [(f"error {steps}", _numbers(report.value_error))]
    for name, errors in report.learning.items():
        rows.append((f"error while {name} learn{'s' if name == 'head' else ''}", _ends(errors)))
    if report.noise:
        rows.append((f"error after noise {_numbers(report.magnitudes)} in targets", _numbers(report.noise)))
    if flow is not None:
        if flow.recovery:
            told = f"error, first 0, 1, … steps by the copy of step {flow.old_step:,}"
            rows.append((told, _numbers(flow.recovery)))
        rows.append(("curvature of the path by time", _numbers(flow.curvature)))
        rows.append(("variance of end points, by member", _numbers(flow.endpoint_variance)))
        rows += [(f"norm of {name} by time", _numbers(norms)) for name, norms in flow.norms.items()]
    return rows


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(_number(value) for value in values)


def _ends(values: Sequence[float]) -> str:
    return f"from {_number(values[0])} to {_number(values[-1])}"


def _change(row: Row) -> str:
    """How far a metric is from a fresh network's."""
    if row.fresh is None:
        return ""
    if not (math.isfinite(row.value) and math.isfinite(row.fresh)):
        return "not finite"
    factor = _factor(row)
    if factor is None:
        return "as fresh" if row.value == row.fresh else f"{row.value - row.fresh:+.3g}"
    return f"{factor:.3g} x fresh"


def _factor(row: Row) -> float | None:
    """Now over fresh, where that means something: both of one sign and not 0."""
    if row.fresh is None or not row.value * row.fresh > 0 or not math.isfinite(row.value * row.fresh):
        return None
    return row.value / row.fresh


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


# The picture


def draw(report: Report, path: Path) -> None:
    """The probe's ratios, and how far every metric is from a fresh network's, as a PNG.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    tables = [rows(network) for network in report.networks]
    height = max(len(table) for table in tables)
    figure = Figure(figsize=(1.5 + 5.5 * len(tables), 2.6 + 0.27 * height), layout="constrained")
    grid = figure.subplots(2, len(tables), squeeze=False, height_ratios=[1.1, 0.27 * height])
    figure.suptitle(report.subject, fontsize=11, x=0.01, ha="left")
    for column, (network, table) in enumerate(zip(report.networks, tables, strict=True)):
        _draw_probe(grid[0][column], network)
        _draw_metrics(grid[1][column], table)
    _save(figure, path)


def draw_critic(report: Report, path: Path) -> bool:
    """The diagnostics of a run's critic as a PNG; False where there is nothing to draw.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    from rlplastic.plasticity import flow_diagnostics

    critic = report.critic
    if critic is None or not (critic.flow or critic.learning):
        return False
    _save(flow_diagnostics.figure(critic.figure()), path)
    return True


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=140)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written ({error.strerror or error}); {remedy(error)}") from error


def _draw_probe(axes: Axes, network: Diagnosis) -> None:
    axes.set_title(network.network, fontsize=11, fontweight="bold", loc="left")
    axes.set_yticks([])
    axes.set_xlabel("trainability probe: area under the loss, over a fresh network's", fontsize=8)
    axes.tick_params(labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    probed = network.probe
    members = [each for each in probed.members if math.isfinite(each)] if probed is not None else []
    if probed is None or not members:
        axes.text(0.5, 0.5, "not probed" if probed is None else "not finite", ha="center", transform=axes.transAxes)
        return
    axes.axvline(1.0, color="0.5", lw=1, ls="--")
    axes.barh(0.4, probed.ratio, 0.4, color="tab:blue")
    axes.plot(members, [0.4] * len(members), "k|", ms=14)
    axes.text(max(members), 0.4, f"  {probed.ratio:.2f}", fontsize=9, va="center")
    axes.set_xlim(0, max(2.0, 1.2 * max(members)))
    axes.set_ylim(0, 1)


def _draw_metrics(axes: Axes, table: Sequence[Row]) -> None:
    axes.axvline(1.0, color="0.5", lw=1, ls="--")
    for place, row in enumerate(table):
        colour = "tab:blue" if row.reason is None else "0.7"
        factor = _factor(row)
        if factor is not None:
            shown = min(max(factor, 1 / WIDEST), WIDEST)
            axes.plot([1, shown], [place, place], color=colour, lw=2, solid_capstyle="butt")
            axes.plot(shown, place, "o" if shown == factor else (">" if factor > 1 else "<"), color=colour, ms=6)
        told = _number(row.value) + (f"  (fresh {_number(row.fresh)})" if row.fresh is not None else "")
        axes.text(
            1.02,
            place,
            told,
            fontsize=8,
            va="center",
            color="0.5" if row.reason else "0",
            transform=axes.get_yaxis_transform(),
        )
    axes.set_xscale("log", base=2)
    axes.set_xlim(1 / WIDEST / 1.2, WIDEST * 1.2)
    axes.set_yticks(range(len(table)), [row.name for row in table], fontsize=8)
    for label, row in zip(axes.get_yticklabels(), table, strict=True):
        label.set_color("0.6" if row.reason else "0")
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=8)
    ticks = [1 / 32, 1 / 8, 1 / 2, 1, 2, 8, 32]
    axes.set_xticks(ticks, [f"1/{round(1 / tick)}" if tick < 1 else f"{tick:g}" for tick in ticks])
    axes.set_xlabel("now over fresh; grey says nothing on this kind of network", fontsize=8)
    axes.grid(axis="y", color="0.93")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
