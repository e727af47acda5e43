"""The scripts that compare critics: what they compute by hand, and what they write."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("flow_study")


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("flow_chain")


# flow_chain


def test_values_are_what_long_sums_of_rewards_come_to(chain: ModuleType) -> None:
    made = chain.chain_of(0)
    reward, value = chain.rewards_of(made, 0, 1)
    torch.testing.assert_close(made.transition.sum(1), torch.ones(chain.STATES))
    total, reach = torch.zeros(chain.STATES), torch.eye(chain.STATES)
    for step in range(400):
        total += chain.GAMMA**step * reach @ reward
        reach = reach @ made.transition
    torch.testing.assert_close(value, total, rtol=1e-4, atol=1e-4)
    assert float(value.abs().max()) == pytest.approx(chain.LARGEST)
    assert not torch.equal(reward, chain.rewards_of(made, 0, 2)[0])


def test_the_exact_solution_of_much_data_is_the_chains(chain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    few = chain.exact_error(0, 0)
    monkeypatch.setattr(chain, "DATA", 200_000)
    assert chain.exact_error(0, 0) < 0.05 < few


def test_a_critic_of_the_chain_gets_nearer_to_its_values_and_errors_are_kept(
    chain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(chain, "PHASES", 1)
    monkeypatch.setattr(chain, "DATA", 40)
    (slow,), (fast,) = (chain.run("plain", "scalar", ratio, 0) for ratio in (1, 12))
    assert fast.error < slow.error
    chain.write(tmp_path / "errors.csv", [slow, fast])
    kept = chain.read(tmp_path / "errors.csv")
    assert [row[:5] for row in kept] == [slow[:5], fast[:5]]
    assert kept[0].error == pytest.approx(slow.error, rel=1e-5)


def test_the_chains_table_pairs_seeds_and_divides_by_the_first_phase(chain: ModuleType, tmp_path: Path) -> None:
    rows = [
        chain.Row("plain", critic, 4, seed, phase, level * (1 + phase) + seed / 10)
        for critic, level in (("flow", 1.0), ("scalar", 1.5))
        for seed in range(2)
        for phase in range(chain.PHASES)
    ]
    (line,) = [line for line in chain.summary(rows).splitlines() if line.startswith("| plain | 4 | scalar |")]
    later = 1 + np.arange(1, chain.PHASES).mean()
    expected = [1.5 * later + seed / 10 for seed in range(2)]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert float(cells[4].split(" ")[0]) == pytest.approx(np.mean(expected), rel=1e-3)
    assert float(cells[5].split(" ")[0]) == pytest.approx(0.5 * later, rel=1e-3)
    ratios = [value / (1.5 + seed / 10) for seed, value in enumerate(expected)]
    assert float(cells[6].split(" ")[0]) == pytest.approx(np.mean(ratios), rel=1e-2)
    chain.draw(rows, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").stat().st_size > 1000


# flow_study


def test_a_level_is_reached_between_the_points_of_a_curve(study: ModuleType) -> None:
    curve = np.array([0.0, 10.0, 20.0]), np.array([0.0, 4.0, 2.0])
    assert study.reached(curve, 3.0) == pytest.approx(7.5)
    assert study.reached(curve, -1.0) == 0.0
    assert math.isinf(study.reached(curve, 5.0))
    slow = np.array([0.0, 10.0, 20.0]), np.array([0.0, 1.5, 3.0])
    assert study.times_as_fast(slow, curve) == f"{20 / 7.5:.2f}"
    told = f"{5 / (20 * 2 / 3):.2f}"  # to the last value of the curve, 2, not to its 4
    assert study.times_as_fast(curve, slow) == told
    assert study.times_as_fast((slow[0], slow[1] + 9), curve) == "never"


def made_grid(study: ModuleType, folder: Path) -> Path:
    """Flow and scalar at two replay ratios: returns rise to 100 and 50 over 400 steps, flow at thrice the cost."""
    grid_results = importlib.import_module("grid_results")
    (folder / "curves").mkdir(parents=True)
    for ratio in (16, 4):
        for kind, height, seconds in (("flow", 100.0, 30.0), ("scalar", 50.0, 10.0)):
            for seed in range(2):
                arm = f"plain_{ratio}_{kind}"
                returns = [(height + seed * ratio) * point / 4 for point in range(5)]
                lines = [f"{100 * point},{10 * point},{value}" for point, value in enumerate(returns)]
                text = "\n".join(["step,updates,return_mean", *lines]) + "\n"
                (folder / "curves" / f"pendulum__{arm}__{seed}.csv").write_text(text)
                numbers = (400.0, 40.0, returns[-1], 0.0, 0.0, float(np.mean(returns)), seconds, seconds)
                row = grid_results.Result("pendulum", arm, seed, 0, *numbers, 1, "", "", "", "")
                grid_results.append_result(folder / "results.csv", row)
    return folder


def test_kinds_are_compared_within_their_group_paired_by_seed(study: ModuleType, tmp_path: Path) -> None:
    folder = made_grid(study, tmp_path / "grid")
    text = study.study(folder, {})
    lines = [line for line in text.splitlines() if line.startswith("| pendulum | plain_4 | scalar |")]
    returns, cost = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert returns[6].startswith("25 ± 0") and returns[7] == ""  # (100 - 50) / 2 for every seed: no spread
    assert float(returns[8]) == pytest.approx(102 / 52, abs=0.01)
    assert float(returns[9]) == pytest.approx(400 / (400 * 52 / 102), abs=0.01)
    assert cost[3] == "1.00" and cost[5].startswith("-18")  # a third of the flow's way, 34, against 52
    assert all((folder / name).stat().st_size > 1000 for name in ("study.png", "returns.png"))
    assert "0 of these runs were diagnosed" in text
    rows = [
        line.split("|")[2:4] for line in text.split("## Returns at equal cost")[0].splitlines() if "| plain_" in line
    ]
    assert [f"{group.strip()} {kind.strip()}" for group, kind in rows] == [
        f"plain_{ratio} {kind}" for ratio in (4, 16) for kind in ("flow", "scalar")
    ]
    given = study.study(folder, {"flow": 1.0, "scalar": 1.0})
    line = next(line for line in given.splitlines() if line.startswith("| pendulum | plain_4 | scalar | 1.00"))
    assert line.split("|")[-2].strip().startswith("50"), "at equal cost of an update both are through"


def test_every_kind_has_a_colour_of_its_own(study: ModuleType) -> None:
    arms = [study.Arm("pendulum", "", kind, {}) for kind in ("steps_8", "scalar", "endpoint", "flow", "steps_1")]
    colours = study.colours_of(arms)
    assert list(colours) == ["flow", "scalar", "endpoint", "steps_1", "steps_8"] and len(set(colours.values())) == 5


def test_diagnoses_are_kept_and_tabulated(study: ModuleType, tmp_path: Path) -> None:
    folder = made_grid(study, tmp_path / "grid")
    errors = {"flow": 2, "scalar": 5}
    rows = [f"pendulum__plain_4_{kind}__{seed},{error},,1,1,1,,," for kind, error in errors.items() for seed in (0, 1)]
    (folder / "diagnoses.csv").write_text("\n".join([",".join(("run", *study.MEASURES)), *rows]) + "\n")
    text = study.study(folder, {})
    section = text.partition("### value_error")[2].partition("###")[0]
    line = next(line for line in section.splitlines() if "| plain_4 | scalar |" in line)
    assert "| 5 ± 0 | -3 ± 0 |" in line and "plain_1" not in section
    assert "| plain_4 |" not in text.partition("### curvature")[2].partition("###")[0]
