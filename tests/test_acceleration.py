"""What is set once per process: compiled losses belong to one agent, recordings to one process on a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlplastic import acceleration
from rlplastic.agents.graphs import cuda_graph
from rlplastic.composition import compose
from rlplastic.errors import ConfigurationError
from rlplastic.machine import probe_machine
from rlplastic.presets import resolve


def loss(network: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = network(x).square().mean()
    return result


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_networks_of_other_depths_do_not_run_through_each_others_code() -> None:
    x = torch.randn(4, 3)
    for depth in (1, 2):  # the first parameters have equal shapes
        network = nn.Sequential(*(nn.Linear(3, 3) for _ in range(depth)))
        torch.testing.assert_close(acceleration.compiled(loss)(network, x), loss(network, x))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_copy_runs_through_the_same_code_with_its_own_parameters() -> None:
    compiled, x = acceleration.compiled(loss), torch.randn(4, 3)
    for index in range(3):
        network = nn.Linear(3, 3)
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            torch.testing.assert_close(compiled(network, x), loss(network, x))


def test_recordings_are_for_one_process_on_a_gpu() -> None:
    config, _ = resolve(compose(["cuda_graphs=true", "device=cpu"]), probe_machine("cpu"))
    with pytest.raises(ConfigurationError, match="does not go with device=cpu and 1 ranks"):
        acceleration.recorder(config)
    config.device = "cuda"
    assert acceleration.recorder(config) is cuda_graph
    config.cuda_graphs = False
    assert acceleration.recorder(config) is None


def by_another(change: Callable[[Tensor], Tensor]) -> Callable[..., Callable[..., tuple[Tensor, int]]]:
    """A stand-in for `torch.compile` that makes something else of a loss."""

    def compile(function: Callable[..., tuple[Tensor, int]], **_options: object) -> Callable[..., tuple[Tensor, int]]:
        def other(*arguments: object) -> tuple[Tensor, int]:
            value, told = function(*arguments)
            return change(value), told

        return other

    return compile


def counted(network: nn.BatchNorm1d, x: Tensor, power: int) -> tuple[Tensor, int]:
    return network(x).pow(power).sum(), power


@pytest.mark.parametrize(
    ("change", "difference"), [(lambda v: 2 * v, "100%"), (lambda v: v * torch.nan, "nan%"), (lambda v: -v, "200%")]
)
def test_a_compiler_that_gets_the_gradient_wrong_is_found_at_the_first_call(
    change: Callable[[Tensor], Tensor], difference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", by_another(change))
    network, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    sentence = f"compile=on makes another gradient of counted than plain torch .* differ by {difference}.*compile=off"
    with pytest.raises(ConfigurationError, match=sentence):
        acceleration.compiled(counted)(network, x, 3)
    assert network.num_batches_tracked == 0, "a copy was tried"
    value, _ = acceleration.compiled(counted, proven=True)(network, x, 3)
    assert torch.isfinite(value) or difference == "nan%"


def test_a_compiler_that_rounds_otherwise_is_trusted_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", by_another(lambda value: 1.05 * value))
    network, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    loss = acceleration.compiled(counted)
    for calls in (1, 2):
        loss(network, x, 3)
        assert network.num_batches_tracked == calls


DOUBLED = """
import sys
import torch
from torch._dynamo.utils import counters
from rlplastic.acceleration import compiled

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slope):
        ctx.slope = slope
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.slope, None

def loss(x):
    return Doubled.apply(x, float(sys.argv[1])).sum()

x = torch.ones(3, requires_grad=True)
compiled(loss)(x).backward()
print(x.grad.tolist(), counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_what_was_compiled_is_found_again_by_the_next_process_and_only_that(tmp_path: Path) -> None:
    """Torch's cache leaves out custom autograd functions unless it is told; they must be told apart by what they do."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    told = []
    for slope in ("3", "3", "5"):
        command = [sys.executable, "-c", DOUBLED, slope]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        told.append(done.stdout)
    assert told == ["[3.0, 3.0, 3.0] 0\n", "[3.0, 3.0, 3.0] 1\n", "[5.0, 5.0, 5.0] 0\n"]
