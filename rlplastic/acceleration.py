"""Speed switches of the learner, set once per process: threads, format of products, compilation, recorded updates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, cast

import torch
import torch._functorch.config
from torch import Tensor, nn

from rlplastic.agents.graphs import Record, cuda_graph
from rlplastic.agents.steps import Gradient
from rlplastic.config import Config
from rlplastic.distributed import world_size
from rlplastic.errors import ConfigurationError

Transform = Callable[[Any], Any]
TOLERATED = 0.4
"""Relative difference of a compiled gradient. Rounding made 3e-7 in float32 and 0.04 in bfloat16, 0.08 after the
policy had fitted its batch; torch 2.11's wrong gradients differ by 0.5 to 1."""


def apply(config: Config, proven: bool = False) -> Transform:
    """Set threads and format of products; returns what turns a loss's gradient into a compiled one, or leaves it.

    Args:
        config: resolved.
        proven: an earlier start of this run has compared compiled gradients with plain ones: see `compiled`.

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


def compiled(gradient: Gradient, proven: bool = False) -> Gradient:
    """A loss's gradient (`rlplastic.agents.steps.gradient_of`) compiled whole, for its first networks and their copies.

    The way there and the way back are one graph, which keeps nothing for autograd: the bits of a compiled loss that
    autograd leads back, in half of the time for plain SAC's critic 128 wide and batch 128; large ones gain less.

    Its first call compares its result with that of the plain function, unless that is ``proven``, and raises a
    `ConfigurationError` where they differ: compilers do get gradients wrong without a word, as torch 2.11 did with that
    of FlashSAC's actor. Later starts of a run do not compare again: of trained networks a gradient is small beside what
    bfloat16 rounds.

    Before each call torch compares all that it relied on when it compiled. Of modules, whose types, attributes and
    hooks stay what they were, that is not done: it took a fifteenth of an update at width 64. Therefore the compiled
    code belongs to this function alone, and not to all that were made of the same source: another agent's networks may
    have other depths.

    What was compiled is found again by the next process on this machine (torch's caches, which are keyed by what was
    traced). By default they leave out whatever holds a custom autograd function, as FlashSAC's losses do: a second
    start took 19 seconds for the first two updates on two cores, and takes 11 with them.
    """
    import torch._dynamo.config  # here, since this loads the compiler: two seconds and 90 MB

    torch._dynamo.config.trace_autograd_ops = True
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    function = cast("FunctionType", gradient)
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    unguarded = torch.compiler.skip_guard_on_all_nn_modules_unsafe
    fast = torch.compile(own, dynamic=False, fullgraph=True, options={"guard_filter_fn": unguarded})

    def checked(*arguments: Any) -> Any:  # noqa: ANN401 - those of the function
        nonlocal proven
        if not proven:
            _require_same_gradient(gradient, fast, arguments)
            proven = True
        return fast(*arguments)

    return checked


def _require_same_gradient(gradient: Gradient, fast: Gradient, arguments: Sequence[Any]) -> None:
    """Compare what a gradient and its compiled form make of copies of the parameters and networks among the arguments.

    Raises:
        ConfigurationError: they differ by more than rounding can explain.
    """
    expected, found = (_on_copies(each, arguments) for each in (gradient, fast))
    error = float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected).clamp(min=1e-12))
    if not error <= TOLERATED:
        raise ConfigurationError(
            f"compile=on makes another gradient of {cast('FunctionType', gradient).__name__} than plain torch "
            f"{torch.__version__} does (they differ by {error:.0%}); use compile=off, or the torch that "
            "constraints.txt names"
        )


def _on_copies(gradient: Gradient, arguments: Sequence[Any]) -> Tensor:
    """What ``gradient`` makes of the arguments, (numbers,) float32; parameters and networks stay as they are."""
    memo: dict[int, Any] = {}
    given = [copy.deepcopy(each, memo) if isinstance(each, nn.Module | list) else each for each in arguments]
    return torch.cat([each.float().flatten() for each in gradient(*given)[0]])


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
