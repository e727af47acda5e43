"""Plasticity injection (Nikishin et al., arXiv 2305.15555): new plasticity without a change of what is computed.

    f(x) = frozen(x) + learner(x) - offset(x),  learner = offset = a fresh network at the moment of injection

Only the learner trains. The structure changes, so this returns a new patient; the old one stays as it was, and is the
way back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity.optimizers import Optimizer
from rlplastic.plasticity.patient import Hidden, Patient, call

LEARNER = "learner."


class Injected(nn.Module):
    """A frozen network, and the difference of two equal ones of which one trains; called as the network was."""

    def __init__(self, frozen: nn.Module, fresh: nn.Module) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.learner = fresh.requires_grad_(True)
        self.offset = copy.deepcopy(fresh).requires_grad_(False)

    def forward(self, *inputs: Any) -> Tensor:  # noqa: ANN401 - whatever the network takes
        """The network's outputs; they must be a tensor."""
        result: Tensor = self.frozen(*inputs) + (self.learner(*inputs) - self.offset(*inputs))
        return result


def plasticity_injection(
    patient: Patient, key: int, optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
) -> Patient:
    """The patient with an injected network, whose outputs are the same bits as before.

    The target is injected with the same fresh network: it is still as far behind as it was, and follows as before. The
    alarm that led here is answered by what the *learner* can do, so units and head of the new patient are its own.

    Args:
        patient: a network whose output is one tensor, without batch norms; it keeps its tensors.
        key: of the fresh network.
        optimizer: makes a new one for the learner's parameters.

    Raises:
        ConfigurationError: the network has batch norms, whose statistics would differ between the three.
    """
    if patient.has_running_statistics:
        raise ConfigurationError(f"{patient.name} has batch norms; plasticity injection expects a network without them")

    def injected(network: nn.Module, fresh_key: int) -> Injected:
        return Injected(copy.deepcopy(network), patient.fresh(fresh_key))

    module = injected(patient.module, key)
    target = None if patient.target is None else injected(patient.target, key).requires_grad_(False)
    return replace(
        patient,
        module=module,
        optimizer=optimizer(module.learner.parameters()),
        target=target,
        fresh=lambda fresh_key: injected(patient.fresh(fresh_key), fresh_key),
        hidden=tuple(
            Hidden(
                LEARNER + layer.name,
                tuple(LEARNER + name for name in layer.incoming),
                tuple(LEARNER + name for name in layer.outgoing),
            )
            for layer in patient.hidden
        ),
        head=tuple(LEARNER + name for name in patient.head),
        unit_rows=tuple(LEARNER + name for name in patient.unit_rows),
        output=call,
        loss=None,
    )
