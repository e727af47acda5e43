"""Which implementation of the kernels a run uses, found out once and told with its reason.

A CPU takes the numpy and torch paths. A GPU takes Triton if it is installed and a tiny kernel runs; if not, plain torch
works too, slower, and the run says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlplastic.errors import ConfigurationError
from rlplastic.kernels import _triton
from rlplastic.kernels._triton import tl, triton


@dataclass(frozen=True)
class Kernels:
    """A choice and its reason."""

    name: str
    """`torch` or `triton`."""
    reason: str
    warning: str = ""
    """What a user should know: a faster path was expected here and could not be had."""


def choose(asked: str, device: str) -> Kernels:
    """The kernels for ``device``: `auto`, `torch` or `triton` as ``asked``.

    Raises:
        ConfigurationError: `triton` was asked for and does not run here.
    """
    if asked == "torch":
        return Kernels("torch", "as asked")
    on_cpu = torch.device(device).type == "cpu"
    if asked == "auto" and on_cpu:
        return Kernels("torch", "no GPU: batches are gathered from packed rows by numpy and torch")
    problem = _problem(device)
    if not problem:
        where = "in Triton's interpreter, for tests" if on_cpu else "a probe kernel ran"
        return Kernels("triton", f"Triton {triton.__version__}, {where}")
    if asked == "triton":
        raise ConfigurationError(f"kernels=triton cannot be used: {problem}; mend that, or use kernels=torch")
    return Kernels(
        "torch", f"Triton cannot be used: {problem}", f"kernels=torch, slower than Triton would be: {problem}"
    )


def _problem(device: str) -> str:
    """Why Triton does not run on ``device``; empty if a tiny launch gave the right answer."""
    if not _triton.AVAILABLE:
        return "Triton is not installed (pip install 'rlplastic[kernels]', on Linux)"
    if torch.device(device).type == "cpu" and not _triton.interpreted():
        return "it compiles for GPUs only and the device is the CPU"
    try:
        numbers = torch.zeros(4, dtype=torch.int64, device=device)
        _probe[(4,)](numbers)
        answer = numbers.tolist()
    except Exception as error:
        return f"a probe kernel failed ({type(error).__name__}: {str(error).strip().splitlines()[0]})"
    return "" if answer == [1, 2, 3, 4] else f"a probe kernel gave {answer} instead of [1, 2, 3, 4]"


@triton.jit
def _probe(numbers: tl.tensor) -> None:
    """Writes 1, 2, 3, ..."""
    tl.store(numbers + tl.program_id(0), tl.program_id(0) + 1)
