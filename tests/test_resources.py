"""Memory is predicted before training within a tenth of what it comes to; the age of a process is its age."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_runs import run

from rlplastic.resources import peak_bytes, resident_bytes

SHORT = ["replay.minimum=500", "evaluation.every=0", "threads=1"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["env=pendulum", "env_steps=1200", "compile=off"],
        pytest.param(["env=pendulum", "env_steps=1200", "compile=on"], marks=pytest.mark.slow),
        pytest.param(["env=humanoid", "env_steps=1200", "compile=on"], marks=pytest.mark.slow),
        pytest.param(
            ["env=humanoid", "env_steps=1200", "compile=off", "agent.critic_width=256", "replay.batch_size=512"],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["env=humanoid", "env_steps=1200", "compile=off", "replay.capacity=10000"], marks=pytest.mark.slow
        ),
    ],
    ids=["pendulum", "compiled", "humanoid, compiled", "large networks", "small replay"],
)
def test_the_peak_of_memory_is_told_beforehand_within_a_tenth(tmp_path: Path, overrides: list[str]) -> None:
    result = run(*overrides, *SHORT, f"runs={tmp_path}", "name=run")
    assert result.returncode == 0, result.stderr
    told = re.search(r"peak memory: ([\d.]+) GB; ([\d.]+) GB were expected", result.stdout)
    assert told, result.stdout
    peak, expected = map(float, told.groups())
    assert expected == pytest.approx(peak, rel=0.1)
    assert re.search(rf"memory +{expected:.2f} GB +expected at the peak", result.stdout)


def test_memory_held_and_its_peak_follow_an_allocation() -> None:
    before = resident_bytes()
    block = np.ones(100_000_000, np.uint8)
    assert 90_000_000 < resident_bytes() - before < 120_000_000
    del block
    assert peak_bytes() >= before + 90_000_000


def test_what_the_parent_held_is_no_part_of_a_childs_peak() -> None:
    block = np.ones(500_000_000, np.uint8)
    code = "from rlplastic.resources import peak_bytes; print(peak_bytes())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(told.stdout) < 100_000_000 < block.nbytes


def test_the_age_of_a_process_counts_from_its_beginning() -> None:
    code = "from rlplastic.resources import process_age; import time; time.sleep(0.3); print(process_age())"
    began = time.perf_counter()
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.3 <= float(told.stdout) <= time.perf_counter() - began + 0.02
