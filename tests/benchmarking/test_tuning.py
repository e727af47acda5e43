"""The grid behind `preset=auto`: its arms are settings that training takes, and its ranking is what it says."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rlplastic.composition import compose
from rlplastic.machine import Machine
from rlplastic.presets import resolve

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "tuning"


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    spec = importlib.util.spec_from_file_location("rank", FOLDER / "rank.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "rank", loaded)
    spec.loader.exec_module(loaded)
    return loaded


def test_every_arm_differs_from_the_preset_in_what_its_name_says(rank: ModuleType) -> None:
    grid = importlib.import_module("grid").load(FOLDER / "grid.yaml")
    machine = Machine("x86", 2, "2.13", "cpu", "cpu", bf16_hardware=True, compiler="/usr/bin/g++")

    def settings(words: list[str]) -> dict[str, object]:
        config, _ = resolve(compose(["env=walker2d", "max_minutes=3", *words]), machine)
        return {
            "envs": config.env.num_envs,
            "batch": config.replay.batch_size,
            "width": config.agent.critic_width,
            "ratio": config.replay_ratio,
            "rates": (config.agent.learning_rate, config.agent.target_rate),
            "compile": config.compile,
        }

    auto = settings(grid.arms["auto"])
    said = {"envs": 8, "batch": 256, "width": 64, "ratio": 0.5, "rates": (3e-3, 0.03), "compile": "on"}
    assert auto == said, "the grid's question says so"
    for arm, words in grid.arms.items():
        changed = {key for key, value in settings(words).items() if value != auto[key]}
        assert changed == (set() if arm == "auto" else {"compile" if arm == "eager" else arm.split("_")[0]}), arm


def test_arms_are_ranked_by_the_geometric_mean_of_their_ratios(rank: ModuleType, tmp_path: Path) -> None:
    results = rank.grid_results

    def add(arm: str, task: str, seed: int, value: float, exit_code: int = 0) -> None:
        values = dict.fromkeys(results.Result._fields, 0.0) | {"final_mean": value, "jobs": 1}
        result = results.Result(**values | {"task": task, "arm": arm, "seed": seed, "exit_code": exit_code})
        results.append_result(tmp_path / "results.csv", result)

    assert rank.main(tmp_path) == 1
    for seed, (walker, ant) in enumerate([(100.0, 1000.0), (300.0, 3000.0)]):
        add("auto", "walker", seed, walker), add("auto", "ant", seed, ant)
        add("uneven", "walker", seed, 4 * walker), add("uneven", "ant", seed, ant / 2)
    add("half", "walker", 1, 150.0), add("half", "ant", 0, 500.0)  # compared on the seeds that it has
    add("missing", "walker", 0, 9000.0), add("missing", "ant", 0, 1.0, exit_code=3)
    assert rank.main(tmp_path) == 0

    rows = {arm: (score, of_task) for arm, score, of_task in rank.ranking(rank.returns(tmp_path))}
    assert list(rows) == ["uneven", "auto", "half", "missing"]
    assert rows["uneven"] == (pytest.approx(math.sqrt(2)), {"walker": 4, "ant": 0.5})
    assert rows["half"] == (pytest.approx(0.5), {"walker": 0.5, "ant": 0.5})
    assert math.isnan(rows["missing"][0]) and rows["missing"][1]["walker"] == 90
    text = (tmp_path / "ranking.md").read_text()
    assert "| uneven | 1.41 | 0.50 | 400, 1200 (4.00) | 500, 1500 (0.50) |" in text
    assert "| missing | nan | nan | 9000 (90.00) | – (nan) |" in text
