"""What the scripts beside grids make of run directories, against sums done by hand."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from made_runs import made_run

from rlplastic.analysis.runs import Run, read_run

ROOT = Path(__file__).resolve().parents[1]


def script(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = spec_from_file_location(f"{name}_compare", ROOT / "benchmarks" / name / "compare.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def decision(step: int, ratio: float, **readings: float) -> dict[str, Any]:
    return {"event": "replay_ratio", "step": step, "updates": step, "ratio": ratio, "readings": readings}


def run_at(path: Path, **options: Any) -> Run:
    run = read_run(made_run(path, **options), lambda told: pytest.fail(told))
    assert run is not None
    return run


def test_arms_are_compared_at_equal_steps_and_at_the_time_of_the_quickest_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Evaluations at 1000, 2000, 3000 and 4000 transitions, which take 10 ms each: so at 10, 20, 30 and 40 seconds."""
    compare = script(monkeypatch, "replay_ratio")
    long = run_at(tmp_path / "long", returns=(0.0, 10.0, 20.0, 40.0))
    quick = run_at(tmp_path / "quick", returns=(5.0, 15.0, 30.0))
    assert compare.late_return(long.curve("step"), 4000) == (20 + 40) / 2
    assert compare.late_return(long.curve("seconds"), 25.0) == (10 + 15) / 2, "at 20 s, and between 20 and 30"
    lines = compare.table("sac", {"fixed_4": [long], "ours": [quick]})
    assert lines[2].startswith("Equal time: 30 s of training")
    assert lines[-3] == "| fixed_4 | 1 | 30 | 20 | 2,000 | 40 |"
    assert lines[-2] == "| ours | 1 | 30 | 30 | 1,500 | 30 |"
    # At 2 ms and 4 for the two updates of a transition: evaluations at 4, 8, 12 and 16 seconds.
    lines = compare.table("sac", {"fixed_4": [long], "ours": [quick]}, (2.0, 4.0))
    assert lines[2].startswith("Equal time: 12 s of training, at 2 ms for a transition and 4 for an update")
    assert lines[-3] == "| fixed_4 | 1 | 30 | 20 | 2,000 | 16 |"


def test_the_signal_is_drawn_where_it_was_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compare = script(monkeypatch, "replay_ratio")
    records = [decision(500, 0.5, fau=0.6), decision(1000, 2.0), {"event": "measurement", "step": 1, "values": {}}]
    path = made_run(tmp_path / "run")
    (path / "plasticity.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert compare.decisions(path) == (([500, 1000], [0.5, 2.0]), ([500], [0.6]))
    assert compare.decisions(made_run(tmp_path / "fixed")) == (([], []), ([], []))
    compare.draw({"sac": {"published": [run_at(tmp_path / "other")]}}, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_watching_costs_what_its_updates_a_second_are_fewer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare = script(monkeypatch, "watch_cost")
    for arm, rates in (("off", (100.0, 200.0)), ("watch", (98.0, 194.0))):
        for seed, rate in enumerate(rates):
            folder = tmp_path / "runs" / f"humanoid__{arm}__{seed}"
            folder.mkdir(parents=True)
            seconds = 60 + np.arange(3) * 10.0
            rows = [f"{1000 * rate * (second - 50):.0f},{rate * (second - 50):.0f},{second}\n" for second in seconds]
            # compilation and the first transitions: no update for 55 seconds
            (folder / "timing.csv").write_text("step,updates,train_seconds\n5,0,55\n" + "".join(rows))
    monkeypatch.setattr(compare, "HERE", tmp_path)
    compare.main()
    text = (tmp_path / "cost.md").read_text()
    assert text == capsys.readouterr().out
    assert "| 0 | 100.00 | 98.00 | 2.0% |" in text and "| 1 | 200.00 | 194.00 | 3.0% |" in text
    assert "Cost of monitor=watch: 2.5 ±" in text
    (tmp_path / "runs" / "humanoid__off__0" / "timing.csv").write_text("step,updates,train_seconds\n5,1,55\n")
    with pytest.raises(ValueError, match="train for longer"):
        compare.main()
