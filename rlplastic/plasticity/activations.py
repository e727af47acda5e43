"""Reading hidden activations of any network, leaving no trace.

What the metrics need is a *reader*: any callable from a batch to `Layer`s by name. An agent may hand in its own;
`ModuleReader` is one for ordinary networks and for ensembles whose activations lie features first.

`untouched` is what makes reading invisible: buffers (batch norms' running statistics), training modes and random states
are put back, and hooks are gone, also after an exception.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rlplastic.errors import ConfigurationError

Kind = Literal["rectifier", "tanh", "linear"]
"""What bounds a layer's outputs: positive exactly where its input is; saturating; or nothing (a norm, a projection)."""

KINDS: dict[type[nn.Module], Kind] = {
    **dict.fromkeys(
        (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish), "rectifier"
    ),
    **dict.fromkeys((nn.Tanh, nn.Hardtanh, nn.Softsign), "tanh"),
}
FUNCTIONS: dict[Callable[..., Any], Kind] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_), "rectifier"),
    **dict.fromkeys((F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish), "rectifier"),
    **dict.fromkeys((F.tanh, torch.tanh, Tensor.tanh, Tensor.tanh_, F.hardtanh, F.softsign), "tanh"),
}


def kind_of(module: nn.Module) -> Kind | None:
    """That of an activation module, or of one derived from it; None for others."""
    return next((KINDS[base] for base in type(module).__mro__ if base in KINDS), None)


@dataclass(frozen=True)
class Layer:
    """Outputs of one hidden layer, after its nonlinearity: (rows, units), or (members, rows, units) of an ensemble."""

    values: Tensor
    kind: Kind = "rectifier"


Reader = Callable[[Any], Mapping[str, Layer]]
"""From a batch to hidden layers by name, in order of depth; gradients are disabled around the call."""


@contextlib.contextmanager
def untouched(*modules: nn.Module, training: bool | None = None) -> Iterator[None]:
    """Put buffers, training modes and torch's random states back at the end.

    Parameters and ``.grad`` are not copied: nothing in this package writes to them, nor may a callable handed to it.

    Args:
        modules: whose buffers and modes are kept.
        training: the mode inside; None leaves it.
    """
    buffers = [(buffer, buffer.detach().clone()) for module in modules for buffer in module.buffers()]
    modes = [(child, child.training) for module in modules for child in module.modules()]
    cuda = sorted({b.device.index for module in modules for b in module.parameters() if b.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        try:
            if training is not None:
                for module in modules:
                    module.train(training)
            yield
        finally:
            for child, mode in modes:
                child.training = mode
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


class _Calls(TorchFunctionMode):
    """Records what activation functions return while ``running``, in the order of their calls."""

    def __init__(
        self, found: dict[str, Layer], as_layer: Callable[[str, Tensor, Kind], Layer], raw: list[Tensor]
    ) -> None:
        super().__init__()
        self._found, self._as_layer, self._raw = found, as_layer, raw
        self.running = False

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401 - torch's signature
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        if self.running and func in FUNCTIONS:
            name = f"{func.__name__.strip('_')}_{len(self._found)}"
            self._found[name] = self._as_layer(name, result, FUNCTIONS[func])
            self._raw.append(result)
        return result


@dataclass(frozen=True)
class ModuleReader:
    """Reads a module by watching it run.

    Three ways to say what a hidden layer is:

    - by default, the outputs of activation modules (`KINDS`), named by their path, such as ``q_net.1``;
    - ``layers={"trunk.blocks.0.expand_norm": "rectifier"}``: the outputs of these modules, for activations that are
      fused into another module;
    - ``functional=True``: what calls such as ``F.relu(x)`` or ``x.tanh()`` return, named by function and order,
      ``relu_0``. Activation modules are such calls too; calls outside of ``module(…)`` itself do not count.

    A module that runs several times, as in a loss on s and s', is read at its first run. One activation module that
    serves several layers within a run gives ``act``, ``act@1`` and so on.

    Args:
        module: the network; it runs in evaluation mode.
        forward: a batch to the module's outputs; by default ``module(batch)``.
        layers: names and kinds of modules to read.
        functional: record calls of functions.
        units: dimension of the units in what is recorded: -1 for (rows, units), -2 for features first.
    """

    module: nn.Module
    forward: Callable[[Any], Any] | None = None
    layers: Mapping[str, Kind] | None = None
    functional: bool = False
    units: int = -1
    _names: dict[str, nn.Module] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_names", dict(self.module.named_modules()))
        if missing := [name for name in self.layers or () if name not in self._names]:
            raise ConfigurationError(
                f"the module has no part named {missing[0]!r}; expected names of module.named_modules()"
            )

    def __call__(self, batch: Any) -> dict[str, Layer]:  # noqa: ANN401 - whatever `forward` takes
        """The hidden layers' outputs on a batch, detached.

        Raises:
            ConfigurationError: no layer was found, or its outputs are no (rows, units).
        """
        with untouched(self.module, training=False), torch.no_grad(), self._watching() as (found, _):
            self._run(batch)
        return {name: Layer(layer.values.detach().clone(), layer.kind) for name, layer in self._some(found).items()}

    def gradients(self, loss: Callable[[], Tensor]) -> dict[str, Layer]:
        """dL/dh of every hidden layer, zeros where the loss does not reach; for `gradient_dormant_ratio`.

        Args:
            loss: runs the module once with gradients and returns a scalar.
        """
        with untouched(self.module, training=False), torch.enable_grad(), self._watching() as (found, raw):
            value = loss()
            attached = [tensor for tensor in raw if tensor.requires_grad]
            results = torch.autograd.grad(value, attached, allow_unused=True) if attached else ()
        by_tensor = {id(tensor): gradient for tensor, gradient in zip(attached, results, strict=True)}
        gradients = {}
        for (name, layer), tensor in zip(self._some(found).items(), raw, strict=True):
            gradient = by_tensor.get(id(tensor))
            gradients[name] = self._layer(name, torch.zeros_like(tensor) if gradient is None else gradient, layer.kind)
        return gradients

    def norm_inputs(self, batch: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """What enters every batch norm (a module with a ``running_mean``), (..., rows, units), by its name."""
        found: dict[str, Tensor] = {}

        def record(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
                found.setdefault(name, inputs[0].detach().movedim(self.units, -1).clone())

            return hook

        norms = {name: part for name, part in self._names.items() if _running_mean(part) is not None}
        handles = [part.register_forward_pre_hook(record(name)) for name, part in norms.items()]
        try:
            with untouched(self.module, training=False), torch.no_grad():
                self._run(batch)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _run(self, batch: Any) -> None:  # noqa: ANN401
        self.module(batch) if self.forward is None else self.forward(batch)

    def _some(self, found: dict[str, Layer]) -> dict[str, Layer]:
        if not found:
            raise ConfigurationError(
                "no hidden layer was seen; expected activation modules, layers= that names others, or functional=True"
            )
        return found

    def _layer(self, name: str, output: Tensor, kind: Kind) -> Layer:
        if output.dim() not in (2, 3):
            raise ConfigurationError(
                f"layer {name} has outputs {tuple(output.shape)}; expected (rows, units) or (members, rows, units)"
            )
        return Layer(output.movedim(self.units, -1), kind)

    @contextlib.contextmanager
    def _watching(self) -> Iterator[tuple[dict[str, Layer], list[Tensor]]]:
        """Layers seen while inside, and the recorded tensors themselves, which gradients are taken of."""
        found: dict[str, Layer] = {}
        raw: list[Tensor] = []
        if self.functional:
            # Only what the module's own forward calls: a loss may squash actions with a tanh of its own.
            calls = _Calls(found, self._layer, raw)
            starts = self.module.register_forward_pre_hook(lambda *_: setattr(calls, "running", not found))
            ends = self.module.register_forward_hook(lambda *_: setattr(calls, "running", False))
            try:
                with calls:
                    yield found, raw
            finally:
                starts.remove()
                ends.remove()
            return

        runs: list[int] = []

        def record(name: str, kind: Kind) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:  # noqa: ANN401
                if len(runs) > 1:
                    return
                shared = sum(other.split("@")[0] == name for other in found)
                key = f"{name}@{shared}" if shared else name
                found[key] = self._layer(key, output, kind)
                raw.append(output)

            return hook

        wanted = self.layers
        if wanted is None:
            found_kinds = {name: kind_of(part) for name, part in self._names.items()}
            wanted = {name: kind for name, kind in found_kinds.items() if kind is not None}
        handles = [self._names[name].register_forward_hook(record(name, kind)) for name, kind in wanted.items()]
        handles.append(self.module.register_forward_pre_hook(lambda *_: runs.append(1)))
        try:
            yield found, raw
        finally:
            for handle in handles:
                handle.remove()


def _running_mean(module: nn.Module) -> Tensor | None:
    """A batch norm's running mean, whoever wrote the batch norm."""
    value = getattr(module, "running_mean", None)
    return value if isinstance(value, Tensor) else None


def running_means(module: nn.Module) -> dict[str, Tensor]:
    """Running mean (..., units) of every batch norm, by the norm's name."""
    pairs = ((name, _running_mean(part)) for name, part in module.named_modules())
    return {name: mean.detach() for name, mean in pairs if mean is not None}
