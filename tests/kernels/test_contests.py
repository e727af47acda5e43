"""`python -m rlplastic.bench what=kernels`: every kernel is timed beside torch's operations, on a GPU alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlplastic.bench import main
from rlplastic.benchmarking.kernels import contests
from rlplastic.command_line import run_verb


def test_all_kernels_have_a_contest_whose_implementations_run(kernel_device: str) -> None:
    seen = set()
    for contest in contests(kernel_device, quick=True):
        assert {"triton", "torch"} <= set(contest.works) and contest.moved > 0
        for name, work in contest.works.items():
            if "compiled" not in name:  # minutes of compiling, for torch's sake
                work()
        seen.add(contest.kernel)
    assert seen == {"store a vector step", "draw a batch", "categorical target", "norm bounds"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where there is no GPU")
def test_without_a_gpu_it_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(main, ["what=kernels"]) == 2
    assert "what=kernels measures Triton kernels, but torch sees no GPU here" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu_it_ends_with_times_and_floors(tmp_path: Path) -> None:
    main(["what=kernels", "quick=true", "repeats=2", f"out={tmp_path / 'kernels.json'}"])
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    for row in rows:
        assert min(row["us called"], row["us on the device"], row["floor us"]) > 0
