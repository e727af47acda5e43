"""How much of its return a policy keeps under each perturbation: one at a time, the same episodes every time.

Every value of `SWEEP` is played with the same starting states as the unperturbed episodes, so that differences are the
perturbation's. Intervals are Student's t over episodes, as in `rlplastic.evaluation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlplastic.envs.perturbation import Perturbation
from rlplastic.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

SWEEP: Mapping[str, tuple[float, ...]] = {
    "observation_noise": (0.01, 0.03, 0.1, 0.3),
    "observation_delay": (1, 2, 3, 5),
    "action_delay": (1, 2, 3, 5),
    "friction": (0.25, 0.5, 0.75, 1.5, 2.0),
    "mass": (0.7, 0.85, 1.15, 1.3),
    "gain": (0.7, 0.85, 1.15, 1.3),
    "push": (0.1, 0.25, 0.5, 1.0),
}
"""Values of each perturbation, in the units of `Perturbation`."""


@dataclass(frozen=True)
class Row:
    """One perturbed evaluation; ``name`` is empty for the one that all others are compared with."""

    name: str
    value: float
    evaluation: Evaluation

    def as_json(self, nominal: float) -> dict[str, Any]:
        """Mean, interval and what they are of the unperturbed mean."""
        low, high = self.evaluation.ci95
        return {
            "perturbation": self.name,
            "value": self.value,
            "mean": self.evaluation.mean,
            "ci95": [low, high],
            "difference": self.evaluation.mean - nominal,
            "terminated": float(self.evaluation.terminated.mean()),
            "episodes": len(self.evaluation.returns),
        }


def sweep(
    score: Callable[[Perturbation], Evaluation],
    base: Perturbation,
    names: Sequence[str],
    track: Callable[[Sequence[tuple[str, float]]], Iterable[tuple[str, float]]],
) -> Iterator[Row]:
    """Evaluate ``base``, then each value of each name in its place.

    Args:
        score: plays the episodes of one perturbation.
        base: what is there in any case.
        names: keys of `SWEEP`.
        track: wraps the list of evaluations in a progress bar.
    """
    values = [(name, value) for name in names for value in SWEEP[name]]
    for axis, value in track([("", 0.0), *values]):
        changed: dict[str, Any] = {axis: value} if axis else {}
        yield Row(axis, value, score(replace(base, **changed)))


def table(rows: Sequence[Row], unit: str) -> Table:
    """The sweep for a terminal; ``unit`` says what is scored."""
    from rich.table import Column, Table

    nominal = rows[0].evaluation.mean
    columns = ("perturbation", "value", unit, "95 %", "difference", "ended early")
    shown = Table(*(Column(name, no_wrap=True) for name in columns), box=None, pad_edge=False)
    for row in rows:
        found = row.as_json(nominal)
        shown.add_row(
            row.name or "none",
            f"{row.value:g}" if row.name else "",
            f"{found['mean']:.5g}",
            f"± {found['ci95'][1] - found['mean']:.3g}",
            f"{found['difference']:+.4g}" if row.name else "",
            f"{found['terminated']:.0%}",
        )
    return shown


def plot(rows: Sequence[Row], unit: str, title: str) -> Figure:
    """One panel for each perturbation: mean and interval by value, beside the unperturbed mean and interval."""
    from matplotlib.figure import Figure

    nominal = rows[0].evaluation
    names = list(dict.fromkeys(row.name for row in rows[1:]))
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * lines), layout="constrained")
    figure.suptitle(f"{title} (grey: unperturbed)")
    panels = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for panel in panels[len(names) :]:
        panel.set_visible(False)
    for panel, name in zip(panels, names, strict=False):
        of_name = [row for row in rows if row.name == name]
        values = [row.value for row in of_name]
        means = [row.evaluation.mean for row in of_name]
        halves = [row.evaluation.ci95[1] - row.evaluation.mean for row in of_name]
        panel.axhspan(*nominal.ci95, color="0.85")
        panel.axhline(nominal.mean, color="0.5", linewidth=1)
        panel.errorbar(values, means, halves, marker="o", markersize=4, capsize=3)
        panel.set_xlabel(name)
    for panel in panels[::columns]:
        panel.set_ylabel(unit)
    return figure
