"""The sweep: one perturbation at a time, compared with the same episodes without it."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from rlplastic.envs.perturbation import NAMES, Perturbation
from rlplastic.evaluation import Evaluation
from rlplastic.playing.robustness import SWEEP, Row, plot, sweep, table


def evaluation(mean: float) -> Evaluation:
    return Evaluation(mean + np.array([-1.0, 0.0, 1.0]), np.full(3, 9), np.array([True, False, False]))


def rows(base: Perturbation, names: tuple[str, ...] = NAMES) -> tuple[list[Row], list[Perturbation]]:
    asked: list[Perturbation] = []

    def score(perturbation: Perturbation) -> Evaluation:
        asked.append(perturbation)
        return evaluation(100.0 - len(asked))

    return list(sweep(score, base, names, lambda items: items)), asked


def test_every_perturbation_has_values_to_sweep_that_are_in_range_and_change_something() -> None:
    assert tuple(SWEEP) == NAMES
    for name, values in SWEEP.items():
        assert list(values) == sorted(set(values))
        for value in values:
            assert getattr(Perturbation(**{name: value}), name) != getattr(Perturbation(), name)  # type: ignore[arg-type]


def test_each_evaluation_changes_one_value_of_what_is_there_in_any_case() -> None:
    base = Perturbation(friction=0.9, push=0.2)
    found, asked = rows(base)
    assert asked[0] == base and (found[0].name, found[0].value) == ("", 0.0)
    assert len(asked) == 1 + sum(map(len, SWEEP.values()))
    for row, perturbation in zip(found[1:], asked[1:], strict=True):
        assert asdict(perturbation) == {**asdict(base), row.name: row.value}


def test_only_the_names_asked_for_are_swept() -> None:
    found, _ = rows(Perturbation(), ("mass",))
    assert [row.name for row in found] == ["", *["mass"] * len(SWEEP["mass"])]


def test_a_row_tells_mean_interval_and_difference() -> None:
    told = Row("mass", 1.3, evaluation(97.0)).as_json(nominal=99.0)
    assert (told["mean"], told["difference"], told["episodes"]) == (97.0, -2.0, 3)
    assert told["terminated"] == pytest.approx(1 / 3)
    half = 4.302652729911275 / 3**0.5  # Student's t, 2 degrees of freedom, of a deviation of 1
    assert told["ci95"] == pytest.approx([97.0 - half, 97.0 + half])


@pytest.mark.parametrize("names", [NAMES, ("mass",), NAMES[:3], NAMES[:5]])
def test_table_and_plot_show_every_row_and_nothing_else(names: tuple[str, ...]) -> None:
    found, _ = rows(Perturbation(), names)
    assert table(found, "return").row_count == len(found)
    panels = [panel for panel in plot(found, "return", "a title").axes if panel.get_visible()]
    assert [panel.get_xlabel() for panel in panels] == list(names)
    for panel, name in zip(panels, names, strict=True):
        means = [row.evaluation.mean for row in found if row.name == name]
        values, drawn = panel.containers[0].lines[0].get_data()
        assert (list(values), list(drawn)) == (list(SWEEP[name]), means)
