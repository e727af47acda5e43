"""Speed switches of the learner, set once per process: threads, format of products, compilation, recorded updates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn

from rlplastic.agents.graphs import Record, cuda_graph
from rlplastic.config import Config
from rlplastic.distributed import world_size
from rlplastic.errors import ConfigurationError

Transform = Callable[[Any], Any]
TOLERATED = 0.4
"""Relative difference of a compiled loss's gradient. Rounding made 3e-7 in float32 and 0.04 in bfloat16, 0.08 after the
policy had fitted its batch; torch 2.11's wrong gradients differ by 0.5 to 1."""


def apply(config: Config, proven: bool = False) -> Transform:
    """Set threads and format of products; returns what turns a loss function into a compiled one, or leaves it.

    Args:
        config: resolved.
        proven: an earlier start of this run has compared compiled losses with plain ones: see `compiled`.

    Raises:
        ConfigurationError: `compile=on` but nothing can be compiled here.
    """
    assert config.threads is not None, "resolve the configuration first"
    torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    if config.compile != "on":
        return lambda function: function
    _probe_compiler(config.device)
    return partial(compiled, proven=proven)


def compiled(function: FunctionType, proven: bool = False) -> Callable[..., Any]:
    """A loss function compiled whole, for the networks that it is first called with and their copies.

    Its first call compares its gradient with that of the plain function, unless that is ``proven``, and raises a
    `ConfigurationError` where they differ: compilers do get gradients wrong without a word, as torch 2.11 did with that
    of FlashSAC's actor. Later starts of a run do not compare again: of trained networks a gradient is small beside what
    bfloat16 rounds.

    Before each call torch compares all that it relied on when it compiled. Of modules, whose types, attributes and
    hooks stay what they were, that is not done: it took a fifteenth of an update at width 64. Therefore the compiled
    code belongs to this function alone, and not to all that were made of the same source: another agent's networks may
    have other depths.

    What was compiled is found again by the next process on this machine (torch's caches, which are keyed by what was
    traced). By default they leave out whatever holds a custom autograd function, as our losses do: a second start took
    19 seconds for the first two updates on two cores, and takes 11 with them.
    """
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    unguarded = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    fast = torch.compile(own, dynamic=False, fullgraph=True, options={"guard_filter_fn": unguarded})

    def loss(*arguments: Any) -> Any:  # noqa: ANN401 - those of the function
        nonlocal proven
        if not proven:
            _require_same_gradient(function, fast, arguments)
            proven = True
        return fast(*arguments)

    return loss


def _require_same_gradient(function: FunctionType, fast: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Compare the gradients of a loss and of its compiled form, on copies of the networks among its arguments.

    Raises:
        ConfigurationError: they differ by more than rounding can explain.
    """
    expected, found = (_gradient(each, arguments) for each in (function, fast))
    error = float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected).clamp(min=1e-12))
    if not error <= TOLERATED:
        raise ConfigurationError(
            f"compile=on makes another gradient of {function.__name__} than plain torch {torch.__version__} does (they "
            f"differ by {error:.0%}); use compile=off, or the torch that constraints.txt names"
        )


def _gradient(loss: Callable[..., Any], arguments: Sequence[Any]) -> Tensor:
    """Of all tensors and parameters of networks among the arguments, which stay as they are; (numbers,) float32."""
    memo: dict[int, Any] = {}
    given = [copy.deepcopy(each, memo) if isinstance(each, nn.Module) else each for each in arguments]
    result = loss(*given)
    inputs = [each for each in given if isinstance(each, Tensor) and each.requires_grad]
    for network in (each for each in given if isinstance(each, nn.Module)):
        inputs += [parameter for parameter in network.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(result[0] if isinstance(result, tuple) else result, inputs, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
    return torch.cat([gradient.float().flatten() for gradient in filled])


def recorder(config: Config) -> Record | None:
    """What records updates as CUDA graphs; None unless asked for.

    Raises:
        ConfigurationError: this is not one process on a GPU.
    """
    if not config.cuda_graphs:
        return None
    if world_size() > 1 or not config.device.startswith("cuda"):
        raise ConfigurationError(
            f"cuda_graphs=true does not go with device={config.device} and {world_size()} ranks; expected one process "
            "on a GPU, so leave it out"
        )
    return cuda_graph


def barrier(device: str) -> Callable[[], None] | None:
    """What waits until ``device`` has done all that it was asked for; None for a CPU, which answers when it is done."""
    return partial(torch.cuda.synchronize, device) if device.startswith("cuda") else None


def _probe_compiler(device: str) -> None:
    """Compile and run a tiny function: a broken compiler must show now, not after the random phase."""
    try:
        compiled = torch.compile(lambda x: torch.sin(x) + 1, dynamic=False)
        compiled(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigurationError(
            f"compile=on failed on a one-line function ({type(error).__name__}: {reason}); install a C++ compiler "
            "or use compile=off"
        ) from error
