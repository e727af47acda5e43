"""Interventions that act in every update: a pull towards reference weights, and terms that are added to a loss.

They edit nothing that the optimizer and the target would have to know of: see the table in `table`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rlplastic.plasticity.interventions.resets import trainable
from rlplastic.plasticity.interventions.treatment import Applied
from rlplastic.plasticity.patient import Patient, States


class Reference:
    """Weights that a network is drawn to: those at initialisation (`l2_init`), or a moving average (`follow`).

    Args:
        patient: whose trainable parameters, as they are now, it starts from.
    """

    def __init__(self, patient: Patient) -> None:
        self.weights = {name: value.clone() for name, value in trainable(patient).items()}

    @torch.no_grad()
    def follow(self, patient: Patient, rate: float) -> None:
        """The tortoise of arXiv 2406.02596: go a share ``rate`` of the way to the weights as they are now."""
        torch._foreach_lerp_(list(self.weights.values()), list(trainable(patient).values()), rate)

    @torch.no_grad()
    def rebase(self, patient: Patient, applied: Applied) -> None:
        """Take over what an intervention edited, so that nothing is drawn back to before it."""
        now = trainable(patient)
        for name in applied.rebase:
            mask = applied.touched[name]
            self.weights[name].copy_(now[name] if mask is None else torch.where(mask, now[name], self.weights[name]))

    def state_dict(self) -> dict[str, Tensor]:
        """The weights by name; not copies."""
        return dict(self.weights)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`, bit for bit."""
        for name, value in self.weights.items():
            value.copy_(state[name])


@torch.no_grad()
def l2_init(patient: Patient, reference: Reference, share: float) -> None:
    """theta <- theta + share (theta_0 - theta): regenerative regularisation (arXiv 2308.11958), decoupled.

    As with weight decay (arXiv 1711.05101) the pull stays out of Adam's moments: it is not rescaled by them.

    Args:
        patient: after an optimizer step; bounded norms are re-projected.
        reference: theta_0.
        share: learning rate x strength.
    """
    torch._foreach_lerp_(list(trainable(patient).values()), list(reference.weights.values()), share)
    patient.project()


def parseval(patient: Patient, scale: float = 1.0) -> Tensor:
    """sum over hidden weights of ||W W^T - scale I||_F^2, mean over members (Chung et al., arXiv 2412.07224).

    Where rows outnumber columns they cannot all be orthogonal; there the columns shall be, W^T W.

    Args:
        patient: whose weights but those of the head are meant.
        scale: squared size of the singular values that are wanted.

    Returns:
        (), to be added to a loss with a strength such as 1e-3.
    """
    terms = []
    for name, weight in patient.module.named_parameters():
        if weight.dim() == 2 + patient.lead and name not in patient.head:
            matrix = weight if weight.shape[-2] <= weight.shape[-1] else weight.mT
            gram = matrix @ matrix.mT
            wanted = scale * torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
            terms.append((gram - wanted).square().sum((-1, -2)).mean())
    return torch.stack(terms).sum()


def churn_reduction(patient: Patient, previous: nn.Module, states: States) -> Tensor:
    """E (f(x) - f_previous(x))^2 on states outside of the batch (CHAIN, Tang and Berseth, arXiv 2409.04792).

    Args:
        patient: whose outputs shall not drift where it is not being trained.
        previous: a copy of its module from before the last update.
        states: other states than those of the update, rows first.

    Returns:
        (), mean over members, rows and outputs, to be added to a loss.
    """
    with torch.no_grad():
        before = patient.outputs(previous, states, False)
    return (patient.outputs(patient.module, states, False) - before).square().mean()
