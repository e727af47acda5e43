"""Interventions on whole tensors: optimizer, statistics, last layer, shrink-and-perturb, moving average, everything."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity.interventions.treatment import Applied, Edit, treat
from rlplastic.plasticity.patient import Patient


def trainable(patient: Patient) -> dict[str, Tensor]:
    """Parameters that training moves, by name, detached; not copies."""
    return {name: value.detach() for name, value in patient.module.named_parameters() if value.requires_grad}


def batch_norm_reestimation(patient: Patient, key: int) -> Applied:
    """Running statistics become those of replay rows; nothing else moves.

    Raises:
        ConfigurationError: no batch norm, or no states.
    """
    if not patient.has_running_statistics:
        raise ConfigurationError(f"{patient.name} has no batch norm; expected running statistics to re-estimate")
    return treat(patient, "batch_norm_reestimation", {})


def optimizer_reset(patient: Patient, key: int) -> Applied:
    """All moments and steps become those of a new optimizer (Asadi et al., arXiv 2306.17833); weights stay."""
    return treat(patient, "optimizer_reset", {}, memory=dict.fromkeys(trainable(patient)), statistics=False)


def last_layer_reset(patient: Patient, key: int) -> Applied:
    """The head becomes a fresh one (Nikishin et al., arXiv 2205.07802); so does the target's, with the same values.

    Raises:
        ConfigurationError: the patient does not tell its head.
    """
    if not patient.head:
        raise ConfigurationError(f"{patient.name} does not tell its head; expected names of parameters in head=")
    fresh = patient.fresh_parameters(key)
    return treat(patient, "last_layer_reset", {name: Edit(fresh[name]) for name in patient.head}, policy="changed")


def full_reset(patient: Patient, key: int) -> Applied:
    """Every trainable parameter becomes fresh (arXiv 2205.07802), the target a copy, a policy's alpha initial."""
    fresh = patient.fresh_parameters(key)
    edits = {name: Edit(fresh[name]) for name in trainable(patient)}
    return treat(patient, "full_reset", edits, target="copy", policy="fresh")


def shrink_and_perturb(patient: Patient, key: int, shrink: float = 0.8, perturb: float = 0.2) -> Applied:
    """theta <- shrink theta + perturb fresh (Ash and Adams, arXiv 1910.08475; factors of D'Oro et al. 2023).

    Rows that must stay unit vectors turn instead, towards the fresh row by the angle atan(perturb / shrink) that these
    factors give to rows at right angles. The target goes through the same map with the same fresh values.

    Args:
        patient: edited in place.
        key: of the fresh network.
        shrink: what stays.
        perturb: what a fresh network adds.
    """
    fresh, named = patient.fresh_parameters(key), trainable(patient)
    angle = math.atan2(perturb, shrink)

    def moved(old: Mapping[str, Tensor]) -> dict[str, Edit]:
        return {
            name: Edit(
                turned(old[name], fresh[name], angle)
                if name in patient.unit_rows
                else shrink * old[name] + perturb * fresh[name]
            )
            for name in named
        }

    followed = None if patient.target is None else moved(dict(patient.target.named_parameters()))
    return treat(patient, "shrink_and_perturb", moved(named), target_edits=followed, policy="changed")


@torch.no_grad()
def turned(rows: Tensor, towards: Tensor, angle: float) -> Tensor:
    """Each row (..., in) turned by ``angle`` within the plane that it spans with its row of ``towards``; norms stay."""
    size = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    unit = rows / size
    across = towards - (towards * unit).sum(-1, keepdim=True) * unit
    across = across / torch.linalg.vector_norm(across, dim=-1, keepdim=True)
    result: Tensor = size * (math.cos(angle) * unit + math.sin(angle) * across)
    return result


def hare_and_tortoise(patient: Patient, key: int, tortoise: Mapping[str, Tensor] | None = None) -> Applied:
    """Return to a moving average of the weights (Lee et al., arXiv 2406.02596); the optimizer starts anew.

    Args:
        patient: edited in place; its target, an average itself, is kept.
        key: nothing is drawn.
        tortoise: averages by parameter, such as a `Reference`'s; by default the target, which is one.

    Raises:
        ConfigurationError: neither averages nor a target.
    """
    if tortoise is None:
        if patient.target is None:
            raise ConfigurationError(f"{patient.name} has no target to return to; expected averages in tortoise=")
        tortoise = dict(patient.target.named_parameters())
    edits = {name: Edit(tortoise[name].detach()) for name in trainable(patient)}
    return treat(patient, "hare_and_tortoise", edits, target="kept")
