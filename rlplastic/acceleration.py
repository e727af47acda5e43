"""Speed switches of the learner, set once per process: threads, format of products, compilation, recorded updates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch._functorch.config

from rlplastic.agents.graphs import Record, cuda_graph
from rlplastic.config import Config
from rlplastic.distributed import world_size
from rlplastic.errors import ConfigurationError

Transform = Callable[[Any], Any]


def apply(config: Config) -> Transform:
    """Set threads and format of products; returns what turns a loss function into a compiled one, or leaves it.

    Raises:
        ConfigurationError: `compile=on` but nothing can be compiled here.
    """
    assert config.threads is not None, "resolve the configuration first"
    torch.set_num_threads(config.threads)
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    if config.compile != "on":
        return lambda function: function
    _probe_compiler(config.device)
    return compiled


def compiled(function: FunctionType) -> Callable[..., Any]:
    """A loss function compiled whole, for the networks that it is first called with and their copies.

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
    return torch.compile(own, dynamic=False, fullgraph=True, options={"guard_filter_fn": unguarded})


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
