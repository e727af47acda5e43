"""How every intervention is carried out: the obligations that are the same for all of them, in one place.

An intervention says which entries of which parameters get which values; `treat` does the rest, in this order: a
snapshot to roll back to, the edit in place, the optimizer, the norms, the target, the running statistics, the
temperature. Observation and reward statistics and the replay are not within its reach, and so they stay. The
learning-rate schedule goes on: rates follow the budget, not the age of a weight.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from rlplastic.plasticity.optimizers import forget, parameters_of
from rlplastic.plasticity.patient import Patient, Snapshot, Temperature, reestimate, snapshot

Follow = Literal["entries", "copy", "kept"]
"""What a target does: take over the edited entries, become a copy of the module, or nothing."""
Policy = Literal["same", "changed", "fresh"]
"""Whose outputs a network's are now, which is what its temperature depends on: the same policy's; those of another one;
those of one that never learned."""
SCHEDULE = "kept: rates follow the budget, not the age of a weight"
RE_ESTIMATED = "running statistics re-estimated on replay rows; those of observations and rewards kept"
KEPT = "those of observations and rewards kept; none of the network's own are concerned"
WORDS = ("name", "patient", "optimizer", "target", "statistics", "temperature", "schedule", "cooldown", "updates")
"""What a log tells of an intervention as it is."""


@dataclass(frozen=True)
class Edit:
    """New values of a parameter, of its shape; only where the bool ``mask`` is True, everywhere without one."""

    value: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Applied:
    """What an intervention did: evidence, and what its caller must act on.

    Attributes:
        name: of the intervention.
        patient: its name.
        touched: by parameter, the mask of edited entries, or None where all were.
        units: by hidden layer, the mask (members, units) or (units,) of replaced units.
        optimizer: what became of moments and steps.
        target: what became of the target network.
        statistics: what became of running statistics, and of those of observations and rewards.
        temperature: what became of alpha.
        schedule: what became of the learning rate's schedule.
        rebase: parameters whose references (distance from init, anchors, averages) start from now.
        cooldown: whether nothing else may be done until the network has settled.
        updates: cost in updates, rounded up: a pass over the states to score units, one to re-estimate statistics.
        before: to roll back with `rlplastic.plasticity.patient.restore`; None of what acts in every update.
    """

    name: str
    patient: str
    touched: Mapping[str, Tensor | None]
    units: Mapping[str, Tensor]
    optimizer: str
    target: str
    statistics: str
    temperature: str
    schedule: str
    rebase: tuple[str, ...]
    cooldown: bool
    updates: int
    before: Snapshot | None = field(repr=False)

    def evidence(self) -> dict[str, object]:
        """The same as plain numbers and words, for a log."""
        found: dict[str, object] = {word: getattr(self, word) for word in WORDS}
        found["parameters"] = {name: "all" if mask is None else int(mask.sum()) for name, mask in self.touched.items()}
        found["units"] = {name: int(mask.sum()) for name, mask in self.units.items()}
        found["rebase"] = list(self.rebase)
        return found


@torch.no_grad()
def treat(
    patient: Patient,
    name: str,
    edits: Mapping[str, Edit],
    *,
    units: Mapping[str, Tensor] | None = None,
    target: Follow = "entries",
    target_edits: Mapping[str, Edit] | None = None,
    policy: Policy = "same",
    memory: Mapping[str, Tensor | None] | None = None,
    statistics: bool = True,
    rollback: bool = True,
) -> Applied:
    """Carry out an intervention with all that belongs to it.

    Args:
        patient: edited in place.
        name: of the intervention.
        edits: by parameter.
        units: replaced units, for the record.
        target: what the target does.
        target_edits: the target's own values for the edited entries, where they are not the module's.
        policy: after a change the temperature's optimizer, whose moments are gradients of the old policy's entropy,
            starts anew, and alpha stays; beside a fresh policy alpha starts where it starts in a run: it may have run
            away with the old one, and then ruins a fresh critic and a fresh policy too.
        memory: what the optimizer forgets, where that is not what was edited.
        statistics: whether running statistics are re-estimated.
        rollback: whether to keep a snapshot.

    Raises:
        ConfigurationError: running statistics need states that the patient does not have.
    """
    if statistics:
        patient.check_states()
    before = snapshot(patient) if rollback else None
    forgotten = {key: edit.mask for key, edit in edits.items()} if memory is None else memory
    _write(patient.module, edits)
    named = dict(patient.module.named_parameters())
    moved = {id(parameter) for parameter in parameters_of(patient.optimizer)}
    for key, mask in forgotten.items():
        if id(named[key]) in moved:  # frozen parameters may be left out of an optimizer
            forget(patient.optimizer, named[key], mask)
    if edits:
        patient.project()
    _follow(patient, edits, target, target_edits)
    networks = [patient.module] if patient.target is None else [patient.module, patient.target]
    for network in networks if statistics else []:
        reestimate(patient, network)
    temperature = None if policy == "same" else patient.temperature
    if temperature is not None:
        forget(temperature.optimizer, temperature.log_alpha)
        if policy == "fresh":
            temperature.log_alpha.fill_(math.log(temperature.initial))
    has_statistics = statistics and patient.has_running_statistics
    return Applied(
        name=name,
        patient=patient.name,
        touched={key: edit.mask for key, edit in edits.items()},
        units=dict(units or {}),
        optimizer=_memory_in_words(forgotten),
        target=_target_in_words(patient, edits, target),
        statistics=RE_ESTIMATED if has_statistics else KEPT,
        temperature=_temperature_in_words(temperature, policy),
        schedule=SCHEDULE,
        rebase=tuple(edits),
        cooldown=bool(edits or forgotten or statistics),
        updates=(units is not None) + has_statistics,
        before=before,
    )


def derived(key: int, count: int) -> int:
    """A key for the ``count``-th draw under ``key``."""
    digest = hashlib.blake2b(f"{key}/{count}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _write(module: nn.Module, edits: Mapping[str, Edit]) -> None:
    named = dict(module.named_parameters())
    for key, edit in edits.items():
        value = edit.value.to(named[key])
        named[key].copy_(value if edit.mask is None else torch.where(edit.mask, value, named[key]))


def _follow(patient: Patient, edits: Mapping[str, Edit], follow: Follow, own: Mapping[str, Edit] | None) -> None:
    """The target gets what the module got, as projected: never a draw of its own."""
    if patient.target is None or follow == "kept":
        return
    if follow == "copy":
        patient.target.load_state_dict(patient.module.state_dict())
        return
    named = dict(patient.module.named_parameters())
    _write(patient.target, own or {key: Edit(named[key], edit.mask) for key, edit in edits.items()})


def _memory_in_words(forgotten: Mapping[str, Tensor | None]) -> str:
    if not forgotten:
        return "kept"
    wholly = sum(mask is None for mask in forgotten.values())
    entries = sum(int(mask.sum()) for mask in forgotten.values() if mask is not None)
    parts = [f"moments and steps of {wholly} tensors zeroed"] if wholly else []
    parts += [f"moments of {entries} entries zeroed, their tensors' steps kept"] if wholly < len(forgotten) else []
    return "; ".join(parts)


def _target_in_words(patient: Patient, edits: Mapping[str, Edit], follow: Follow) -> str:
    if patient.target is None:
        return "none"
    if follow == "copy":
        return "copied from the network"
    return "the same entries" if follow == "entries" and edits else "weights kept"


def _temperature_in_words(temperature: Temperature | None, policy: Policy) -> str:
    if temperature is None:
        return "kept"
    alpha = f"alpha put back to {temperature.initial:g}" if policy == "fresh" else "alpha kept"
    return f"{alpha}, its optimizer started anew"


Intervention = Callable[[Patient, int], Applied]
"""From a patient and a key to what was done. The key names all randomness: the same key draws the same again."""
