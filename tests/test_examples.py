"""Every example runs and shows what it says."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The example that the test names, imported in an empty working directory."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, request.param, raising=False)
    return importlib.import_module(request.param)


def test_every_example_of_the_table_is_there_and_says_how_it_is_run_and_what_one_sees() -> None:
    table = dict(re.findall(r"^\| \[([^\]]+)\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    assert len(table) >= 6 and all((EXAMPLES / target).exists() for target in table.values())
    for name in (name for name in table if name.endswith(".py")):
        source = (EXAMPLES / name).read_text()
        assert f"    python examples/{name}\n" in source and "\nWhat one sees" in source


@pytest.mark.slow
@pytest.mark.parametrize("example", ["train_from_python"], indirect=True)
def test_a_policy_is_trained_and_used_from_python(example: ModuleType) -> None:
    assert -2000 < example.main() < 0
    assert (Path("runs") / "from_python" / "eval.csv").exists()
    assert example.main() == example.main(), "the run is finished, and its policy is the same"


@pytest.mark.slow
@pytest.mark.parametrize("example", ["own_environment"], indirect=True)
def test_an_environment_of_ones_own_keeps_the_contract_and_is_learned(
    example: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = example.Docking()
    starts = [float(environment.reset(seed=seed)[0][0]) for seed in range(20)]
    idle = -100 * float(np.mean(np.square(starts)))  # a cart that is not pushed stays where it is
    achieved = example.main("runs", "threads=1")
    assert "fail" not in capsys.readouterr().out
    assert achieved > -10 > idle


@pytest.mark.slow
@pytest.mark.parametrize("example", ["shuffled_labels"], indirect=True)
def test_a_network_that_is_left_alone_stops_learning_and_its_treated_twin_does_not(example: ModuleType) -> None:
    alone, treated = example.main(tasks=12)
    assert alone[0] == treated[0] and alone[0].accuracy > 0.99
    assert alone[-1].accuracy < 0.3 and alone[-1].probed > 1.1
    assert min(task.accuracy for task in treated) > 0.7
    assert {task.treated for task in treated} == {"", "shrink_and_perturb"}
    assert {task.treated for task in alone} == {""}


@pytest.mark.slow
def test_the_critic_of_stable_baselines3_is_watched_and_treated(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("stable_baselines3")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("watch_stable_baselines3")
    ratios, after = example.main(steps=900)
    assert len(ratios) == 3 and all(0 < ratio < example.ILL for ratio in ratios)
    assert set(after) == {name for name in example.INTERVENTIONS if name != "batch_norm_reestimation"}
    assert after["full_reset"] == pytest.approx(1, abs=0.2), "a network that was reset learns like a fresh one"
    assert after["full_reset"] > after["optimizer_reset"]
