"""Hints: the name that was meant comes first, and few valid names are all told. Memory that runs out is foreseen."""

from __future__ import annotations

import errno
from collections.abc import Callable

import numpy as np
import pytest
import torch

from rlplastic.command_line import run_verb
from rlplastic.errors import ConfigurationError, OutOfMemoryError, nearest, telling_of_memory

PRESETS = ("auto", "debug", "paper_cpu", "paper_gpu")
KEYS = ("agent", "agent.gamma", "critic", "env", "env.num_envs", "env.task", "evaluation.every", "seed", "threads")


@pytest.mark.parametrize(
    ("given", "valid", "meant"),
    [
        ("humanod", ("hopper", "humanoid", "humanoid_run", "go1", "g1", "h1", "ant"), "humanoid"),
        ("ANT", ("ant", "Pusher", "Reacher", "h1", "g1", "go1", "t1"), "ant"),
        ("enviroment", KEYS, "env"),
        ("seeds", KEYS, "seed"),
        ("agents.gamma", KEYS, "agent.gamma"),
        ("agent.gama", KEYS, "agent.gamma"),
        ("walker", ("walker2d", "walker_run", "pusher", "reacher", "swimmer", "hopper", "ant"), "walker2d"),
    ],
)
def test_the_name_that_was_meant_is_the_first_of_the_near_ones(given: str, valid: tuple[str, ...], meant: str) -> None:
    assert nearest(given, valid).startswith(f"did you mean {meant!r}")


def test_few_valid_names_are_all_told_beside_the_near_ones() -> None:
    assert nearest("fast", PRESETS) == "did you mean 'auto'? valid names: auto, debug, paper_cpu, paper_gpu"
    assert nearest("paper", PRESETS).startswith("did you mean 'paper_cpu' or 'paper_gpu'? valid names: auto, debug,")
    assert nearest("xyz", PRESETS) == "valid names: auto, debug, paper_cpu, paper_gpu"


def test_many_valid_names_are_not_listed_beside_near_ones() -> None:
    many = [f"task{number:02d}" for number in range(20)]
    assert "valid names" not in nearest("tusk07", many)
    assert nearest("xyz", many).endswith("task11 and 8 more")


def test_nothing_is_listed_twice_or_invented() -> None:
    assert nearest("falshsac", ["flashsac"]) == "did you mean 'flashsac'?"
    assert nearest("anything", []) == ""


def test_the_folder_of_the_names_is_shown_and_does_not_make_them_alike() -> None:
    runs = ("hopper", "ant_first", "zzz", "g1", "h1", "t1", "spot")
    assert nearest("hoper", runs, prefix="runs/") == "did you mean 'runs/hopper'?"
    assert nearest("qqqqq", runs[:2], prefix="runs/") == "valid names: runs/ant_first, runs/hopper"


def raising(error: Exception) -> Callable[[], object]:
    def work() -> object:
        raise error

    return work


CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.10 GiB of which 12.00 MiB is "
    "free.\nSee documentation for Memory Management"
)


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (
            lambda: torch.empty(2**60, dtype=torch.uint8),
            "this machine is out of memory; expected room for another 1152",
        ),
        (lambda: np.empty(2**60, np.uint8), "this machine is out of memory; expected room for another 1.00 EiB: do so"),
        (lambda: bytearray(2**62), "this machine is out of memory; expected room for more: do so"),
        (raising(torch.OutOfMemoryError(CUDA)), "the GPU is out of memory; expected room for another 20.00 MiB: do so"),
        (raising(RuntimeError("CUDA error: out of memory")), "the GPU is out of memory"),
        (
            raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
            "the GPU",
        ),
        (raising(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 80 bytes.")), "80 bytes"),
        (raising(OSError(errno.ENOMEM, "Cannot allocate memory")), "this machine is out of memory"),
    ],
)
def test_memory_that_runs_out_is_one_sentence_and_exit_code_2(
    work: Callable[[], object], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OutOfMemoryError) as caught, telling_of_memory("do so"):
        work()
    assert told in str(caught.value) and isinstance(caught.value, ConfigurationError)
    assert run_verb(lambda arguments: work(), []) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("error: ") and complaint.count("\n") == 1 and "ask for less" in complaint


@pytest.mark.parametrize(
    "error",
    [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError(errno.ENOSPC, "No space"), ValueError()],
)
def test_other_failures_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, telling_of_memory("do so"):
        raise error
    assert caught.value is error
