"""A network under treatment: everything that a probe or an intervention may need to know of it, and nothing else.

A `Patient` is a cheap view. It holds the live module, its optimizer and its target, and callables that take the module
as an argument, so that the same description serves the module, its target, a discarded copy and a fresh network.
Parameters are named, as in ``module.named_parameters()``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity.activations import ModuleReader, running_means, untouched
from rlplastic.plasticity.optimizers import Memory, Optimizer, check_complete, restore_memory, saved_memory

States = tuple[Tensor, ...]
"""A network's inputs, rows first."""


def call(module: nn.Module, states: States, training: bool) -> Tensor:
    """``module(*states)`` in training or evaluation mode: what an ordinary network's outputs are."""
    module.train(training)
    outputs: Tensor = module(*states)
    return outputs


def unbounded(_module: nn.Module) -> Callable[[], None]:
    """The projection of a network whose norms are free: none."""
    return lambda: None


@dataclass(frozen=True)
class Hidden:
    """A hidden layer whose units can be replaced one by one, because their outgoing weights are theirs alone.

    Args:
        name: under which the patient's reader gives the layer's activations.
        incoming: parameters with the units on their first dimension after members: weights, bias, gain of a norm.
        outgoing: weights with the units on the dimension after that one: (out, units), or (members, out, units).
    """

    name: str
    incoming: tuple[str, ...]
    outgoing: tuple[str, ...]


class Temperature(NamedTuple):
    """What weighs a policy's entropy.

    Args:
        log_alpha: (1,).
        optimizer: that moves it.
        initial: alpha, not its logarithm, at the start of a run: where that of a fresh policy starts.
    """

    log_alpha: Tensor
    optimizer: Optimizer
    initial: float


@dataclass(frozen=True)
class Patient:
    """A network, its optimizer and its target.

    Args:
        name: such as ``critic``.
        module: the live network; edits happen in place.
        optimizer: that moves all of its trainable parameters.
        fresh: from a key to a new network of the same sizes, initialised by that key alone, on the module's device.
        states: replay rows as the network sees them in training, for statistics and for scoring units.
        target: a slowly following copy of the module, if there is one.
        members: of a batched ensemble, whose parameters have this first dimension.
        hidden: layers whose units can be replaced.
        head: parameters of the last layer.
        unit_rows: weights whose rows are unit vectors.
        output: outputs on states, (rows,) or (rows, outputs), after members; the flag asks for batch statistics.
        bound: from a module to what re-projects its norms.
        reader: from a module to what reads its activations on ``states``.
        loss: the training loss of a module on replay rows, for gradients of units.
        temperature: where the network is the policy that it goes with.

    Raises:
        ConfigurationError: the optimizer leaves a parameter out, or a name or shape does not fit.
    """

    name: str
    module: nn.Module
    optimizer: Optimizer
    fresh: Callable[[int], nn.Module]
    states: States = ()
    target: nn.Module | None = None
    members: int | None = None
    hidden: tuple[Hidden, ...] = ()
    head: tuple[str, ...] = ()
    unit_rows: tuple[str, ...] = ()
    output: Callable[[nn.Module, States, bool], Tensor] = call
    bound: Callable[[nn.Module], Callable[[], None]] = unbounded
    reader: Callable[[nn.Module], ModuleReader] = lambda module: ModuleReader(module, lambda states: module(*states))
    loss: Callable[[nn.Module], Tensor] | None = None
    temperature: Temperature | None = None

    def __post_init__(self) -> None:
        named = dict(self.module.named_parameters())
        check_complete(self.optimizer, named.items())
        layers = [name for layer in self.hidden for name in (*layer.incoming, *layer.outgoing)]
        if unknown := sorted({*layers, *self.head, *self.unit_rows} - named.keys()):
            raise ConfigurationError(
                f"{self.name} has no parameter {unknown[0]!r}; expected names of module.named_parameters()"
            )
        for layer in self.hidden:
            sizes = {named[name].shape[self.lead] for name in layer.incoming}
            sizes |= {named[name].shape[self.lead + 1] for name in layer.outgoing}
            if len(sizes) != 1:
                raise ConfigurationError(
                    f"layer {layer.name} of {self.name} has {sorted(sizes)} units by its parameters; expected units on "
                    "the first dimension of what enters and on the second of what leaves, after that of the members"
                )

    @property
    def lead(self) -> int:
        """Dimensions before a parameter's own: 1 for members, otherwise 0."""
        return 0 if self.members is None else 1

    @property
    def has_running_statistics(self) -> bool:
        """Whether there is a batch norm, whoever wrote it."""
        return bool(running_means(self.module))

    def outputs(self, module: nn.Module, states: States, training: bool) -> Tensor:
        """``output`` as (members, rows, outputs), with 1 for what there is none of; modes are put back."""
        modes = [(part, part.training) for part in module.modules()]
        try:
            found = self.output(module, states, training)
        finally:
            for part, mode in modes:
                part.training = mode
        found = found if found.dim() == self.lead + 2 else found.unsqueeze(-1)
        return found if self.lead else found.unsqueeze(0)

    def fresh_parameters(self, key: int) -> dict[str, Tensor]:
        """Parameters of a fresh network by name, detached.

        Raises:
            ConfigurationError: they are not those of the module in name and shape.
        """
        fresh = {name: value.detach() for name, value in self.fresh(key).named_parameters()}
        for name, value in self.module.named_parameters():
            if name not in fresh or fresh[name].shape != value.shape:
                raise ConfigurationError(
                    f"a fresh {self.name} has no parameter {name!r} of shape {tuple(value.shape)}; "
                    "expected fresh= to make a network of the same sizes"
                )
        return fresh

    def check_states(self) -> None:
        """Refuse a patient whose running statistics nothing could re-estimate.

        Raises:
            ConfigurationError: there are batch norms and no states.
        """
        if self.has_running_statistics and not self.states:
            raise ConfigurationError(
                f"{self.name} has batch norms, whose statistics need replay rows; expected a patient made with states"
            )

    def project(self) -> None:
        """Re-project the live module's norms, where they are bounded."""
        self.bound(self.module)()


@torch.no_grad()
def reestimate(patient: Patient, module: nn.Module) -> None:
    """Set running statistics to those of ``patient.states`` in one pass, each batch norm seeing the others' new output.

    Args:
        patient: whose states and outputs.
        module: the patient's, its target, or one of the same sizes.

    Raises:
        ConfigurationError: there are batch norms and no states.
    """
    if not patient.has_running_statistics:
        return
    patient.check_states()
    norms: list[Any] = [part for part in module.modules() if isinstance(getattr(part, "running_mean", None), Tensor)]
    kept = [(norm, norm.momentum) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 1.0
        patient.outputs(module, patient.states, True)
    finally:
        for norm, momentum in kept:
            norm.momentum = momentum


def copy_of(patient: Patient) -> Patient:
    """The patient with copies of module, target, optimizer and temperature: what happens to it is without effect."""
    live = (patient.module, patient.target, patient.optimizer, patient.temperature)
    module, target, optimizer, temperature = copy.deepcopy(live)
    return replace(patient, module=module, target=target, optimizer=optimizer, temperature=temperature)


@dataclass(frozen=True)
class Snapshot:
    """All that an intervention may change of a patient, copied."""

    tensors: dict[str, Tensor]
    memories: list[Memory]


def snapshot(patient: Patient) -> Snapshot:
    """Copies of parameters and buffers of module and target, of the temperature, and of what optimizers remember."""
    tensors = {name: tensor.detach().clone() for name, tensor in _tensors(patient)}
    return Snapshot(tensors, [saved_memory(optimizer) for optimizer in _optimizers(patient)])


@torch.no_grad()
def restore(patient: Patient, saved: Snapshot) -> None:
    """Take back `snapshot`, bit for bit and in place."""
    for name, tensor in _tensors(patient):
        tensor.copy_(saved.tensors[name])
    for optimizer, memory in zip(_optimizers(patient), saved.memories, strict=True):
        restore_memory(optimizer, memory)


def _tensors(patient: Patient) -> Iterator[tuple[str, Tensor]]:
    for owner, module in (("module", patient.module), ("target", patient.target)):
        if module is not None:
            yield from ((f"{owner}.{name}", parameter) for name, parameter in module.named_parameters())
            yield from ((f"{owner}.{name}", buffer) for name, buffer in module.named_buffers())
    if patient.temperature is not None:
        yield "temperature", patient.temperature.log_alpha


def _optimizers(patient: Patient) -> list[Optimizer]:
    return [patient.optimizer] if patient.temperature is None else [patient.optimizer, patient.temperature.optimizer]


def hidden_layers(
    trunk: nn.Sequential, prefix: str, readers: tuple[str, ...], members: int | None = None
) -> tuple[Hidden, ...]:
    """Hidden layers of a plain sequence: each linear map with what follows it up to its activation.

    Args:
        trunk: linear maps, perhaps norms, and activations.
        prefix: the sequence's name within the module with a dot, or ``""``.
        readers: weights outside of the sequence that read its last layer; none where the sequence has its own head.
        members: of a batched ensemble.
    """
    dimensions = 2 + (members is not None)
    weights = [getattr(part, "weight", None) for part in trunk]
    starts = [i for i, weight in enumerate(weights) if isinstance(weight, Tensor) and weight.dim() == dimensions]
    ends = [*starts[1:], len(trunk)]
    layers = []
    for start, end in zip(starts, ends, strict=True):
        outgoing = (f"{prefix}{end}.weight",) if end < len(trunk) else readers
        incoming = [f"{prefix}{i}.{name}" for i in range(start, end) for name, _ in trunk[i].named_parameters()]
        if outgoing:
            layers.append(Hidden(f"{prefix}{end - 1}", tuple(incoming), outgoing))
    return tuple(layers)


@contextmanager
def keyed(module: nn.Module, key: int) -> Iterator[None]:
    """Buffers, modes and random states of ``module`` are put back at the end; inside, torch's draws are ``key``'s."""
    with untouched(module):
        torch.default_generator.manual_seed(key)
        for device in {p.device for p in module.parameters() if p.device.type == "cuda"}:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(key)
        yield
