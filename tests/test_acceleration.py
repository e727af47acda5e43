"""What is set once per process: compiled gradients belong to one agent, recordings to one process on a GPU."""

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
from rlplastic.agents.steps import Gradient, Metrics, gradient_of
from rlplastic.composition import compose
from rlplastic.errors import ConfigurationError
from rlplastic.machine import probe_machine
from rlplastic.presets import resolve


def loss(network: nn.Module, x: Tensor) -> tuple[Tensor, Metrics]:
    result: Tensor = network(x).square().mean()
    return result, {"loss": result.detach()}


def arguments_of(network: nn.Module) -> tuple[list[nn.Parameter], nn.Module, Tensor]:
    return list(network.parameters()), network, torch.linspace(-1, 2, 12).reshape(4, 3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_networks_of_other_depths_do_not_run_through_each_others_code() -> None:
    for depth in (1, 2):  # the first parameters have equal shapes
        arguments = arguments_of(nn.Sequential(*(nn.Linear(3, 3) for _ in range(depth))))
        torch.testing.assert_close(acceleration.compiled(gradient_of(loss))(*arguments), gradient_of(loss)(*arguments))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_copy_runs_through_the_same_code_with_its_own_parameters() -> None:
    compiled = acceleration.compiled(gradient_of(loss))
    for index in range(3):
        arguments = arguments_of(nn.Linear(3, 3))
        with torch.compiler.set_stance("fail_on_recompile" if index else "default"):
            torch.testing.assert_close(compiled(*arguments), gradient_of(loss)(*arguments))


def test_recordings_are_for_one_process_on_a_gpu() -> None:
    config, _ = resolve(compose(["cuda_graphs=true", "device=cpu"]), probe_machine("cpu"))
    with pytest.raises(ConfigurationError, match="does not go with device=cpu and 1 ranks"):
        acceleration.recorder(config)
    config.device = "cuda"
    assert acceleration.recorder(config) is cuda_graph
    config.cuda_graphs = False
    assert acceleration.recorder(config) is None


def by_another(change: Callable[[Tensor], Tensor]) -> Callable[..., Gradient]:
    """A stand-in for `torch.compile` that makes something else of a gradient."""

    def compile(function: Gradient, **_options: object) -> Gradient:
        def other(*arguments: object) -> tuple[list[Tensor], Metrics]:
            found, metrics = function(*arguments)
            return [change(each) for each in found], metrics

        return other

    return compile


def counted(network: nn.BatchNorm1d, x: Tensor, power: int) -> tuple[Tensor, Metrics]:
    return network(x).pow(power).sum(), {}


def powers(network: nn.BatchNorm1d) -> tuple[list[nn.Parameter], nn.BatchNorm1d, Tensor, int]:
    return *arguments_of(network), 3


@pytest.mark.parametrize(
    ("change", "difference"), [(lambda v: 2 * v, "100%"), (lambda v: v * torch.nan, "nan%"), (lambda v: -v, "200%")]
)
def test_a_compiler_that_gets_the_gradient_wrong_is_found_at_the_first_call(
    change: Callable[[Tensor], Tensor], difference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", by_another(change))
    network = nn.BatchNorm1d(3)
    sentence = f"compile=on makes another gradient of counted than plain torch .* differ by {difference}.*compile=off"
    with pytest.raises(ConfigurationError, match=sentence):
        acceleration.compiled(gradient_of(counted))(*powers(network))
    assert network.num_batches_tracked == 0, "a copy was tried"
    found, _ = acceleration.compiled(gradient_of(counted), proven=True)(*powers(network))
    assert all(torch.isfinite(each).all() for each in found) or difference == "nan%"


def test_a_compiler_that_rounds_otherwise_is_trusted_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", by_another(lambda value: 1.05 * value))
    network = nn.BatchNorm1d(3)
    gradient = acceleration.compiled(gradient_of(counted))
    for calls in (1, 2):
        gradient(*powers(network))
        assert network.num_batches_tracked == calls


DOUBLED = """
import sys
import torch
from torch._dynamo.utils import counters
from rlplastic.acceleration import compiled
from rlplastic.agents.steps import gradient_of

class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, slope):
        ctx.slope = slope
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.slope, None

def loss(network):
    return Doubled.apply(network.bias, float(sys.argv[1])).sum(), {}

network = torch.nn.Linear(1, 3)
found, _ = compiled(gradient_of(loss))([network.bias], network)
print(found[0].tolist(), counters["aot_autograd"]["autograd_cache_hit"])
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
