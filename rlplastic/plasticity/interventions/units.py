"""Interventions on single hidden units: ReDo, ReGraMa, continual backpropagation.

A replaced unit gets fresh incoming weights (with its bias and the gain of its norm), and outgoing weights that are zero
or small: what the network computes hardly changes, and the unit can learn anew. Its moments go with it; the target gets
the same entries under the same mask. Members of an ensemble are scored and treated apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rlplastic.errors import ConfigurationError
from rlplastic.plasticity.activations import Layer
from rlplastic.plasticity.interventions.treatment import Applied, Edit, derived, treat
from rlplastic.plasticity.patient import Hidden, Patient
from rlplastic.plasticity.units import DORMANT, GRADIENT_DORMANT, unit_scores

SMALL = 0.1
"""Of fresh outgoing weights, for units found by their gradient: with none they would be found again for ever."""


def redo(patient: Patient, key: int, tau: float = DORMANT) -> Applied:
    """Replace dormant units, E|h_i| <= tau mean_j E|h_j|, with outgoing weights zero (ReDo, arXiv 2302.12902).

    Raises:
        ConfigurationError: the patient tells no hidden layers or has no states.
    """
    layers = read(patient)
    masks = {layer.name: unit_scores(layers[layer.name].values) <= tau for layer in patient.hidden}
    return replace_units(patient, "redo", masks, key, outgoing=0.0)


def regrama(patient: Patient, key: int, tau: float = GRADIENT_DORMANT) -> Applied:
    """Replace units that get hardly any gradient, E|dL/dh_i| <= tau of the layer's mean (ReGraMa, arXiv 2505.24061).

    A unit's gradient comes through its outgoing weights, so they become a tenth of fresh ones and not zero.

    Raises:
        ConfigurationError: the patient tells no hidden layers or has no loss.
    """
    loss = patient.loss
    if not patient.hidden or loss is None:
        raise ConfigurationError(
            f"{patient.name} tells no hidden layers or no loss; expected both, for units' gradients"
        )
    gradients = patient.reader(patient.module).gradients(lambda: loss(patient.module))
    masks = {layer.name: unit_scores(gradients[layer.name].values) <= tau for layer in patient.hidden}
    return replace_units(patient, "regrama", masks, key, outgoing=SMALL)


def read(patient: Patient) -> Mapping[str, Layer]:
    """Activations of the hidden layers on the patient's states.

    Raises:
        ConfigurationError: it tells no hidden layers or has no states.
    """
    if not patient.hidden or not patient.states:
        raise ConfigurationError(f"{patient.name} tells no hidden layers or no states; expected both, to score units")
    return patient.reader(patient.module)(patient.states)


@torch.no_grad()
def replace_units(
    patient: Patient, name: str, masks: Mapping[str, Tensor], key: int, *, outgoing: float, rollback: bool = True
) -> Applied:
    """Give units fresh incoming weights, and ``outgoing`` times fresh outgoing weights.

    Args:
        patient: edited in place.
        name: of the intervention.
        masks: by hidden layer, bool (units,) or (members, units).
        key: of the fresh network.
        outgoing: factor, 0 to cut the unit off.
        rollback: whether to keep a snapshot.
    """
    chosen = [layer for layer in patient.hidden if bool(masks[layer.name].any())]
    if not chosen:
        return treat(patient, name, {}, units=masks, statistics=False, rollback=rollback)
    fresh = patient.fresh_parameters(key)
    named = dict(patient.module.named_parameters())
    edits: dict[str, Edit] = {}

    def add(parameter: str, mask: Tensor, value: Tensor) -> None:
        mask = mask.expand_as(value)
        past = edits.get(parameter, Edit(named[parameter].detach(), torch.zeros_like(mask)))
        assert past.mask is not None
        edits[parameter] = Edit(torch.where(mask, value, past.value), past.mask | mask)

    # Outgoing weights come last: between two replaced units it is the connection that is cut.
    for layer in chosen:
        for parameter in layer.incoming:
            add(parameter, _incoming(masks[layer.name], named[parameter]), fresh[parameter])
    for layer in chosen:
        for parameter in layer.outgoing:
            add(parameter, _outgoing(masks[layer.name], named[parameter]), outgoing * fresh[parameter])
    return treat(patient, name, edits, units=masks, rollback=rollback)


def _incoming(mask: Tensor, parameter: Tensor) -> Tensor:
    """The mask (..., units), broadcastable over a parameter (..., units, ...)."""
    return mask.reshape(*mask.shape, *[1] * (parameter.dim() - mask.dim()))


def _outgoing(mask: Tensor, weight: Tensor) -> Tensor:
    """The mask (..., units), broadcastable over a weight (..., out, units, ...)."""
    return mask.unsqueeze(-2).reshape(*mask.shape[:-1], 1, mask.shape[-1], *[1] * (weight.dim() - mask.dim() - 1))


class ContinualBackprop:
    """Replace the least useful mature units, a few all the time (Dohare et al., Nature 632, 2024; arXiv 2306.13812).

    In every step utility u <- decay u + (1 - decay) E|h_i| sum_k |w_ki|, and rate x (mature units) is put on account;
    each whole number on it replaces the least useful mature unit, with outgoing weights zero.

    Args:
        patient: whose hidden layers it keeps account of.
        decay: of utilities.
        rate: share of mature units replaced in a step.
        maturity: steps for which a unit is left alone after its replacement.

    Raises:
        ConfigurationError: the patient tells no hidden layers.
    """

    def __init__(self, patient: Patient, *, decay: float = 0.99, rate: float = 1e-4, maturity: int = 10_000) -> None:
        if not patient.hidden:
            raise ConfigurationError(f"{patient.name} tells no hidden layers; expected some, to keep account of units")
        self._decay, self._rate, self._maturity = decay, rate, maturity
        self._replacements = 0
        self._utility: dict[str, Tensor] = {}
        self._age: dict[str, Tensor] = {}
        self._account: dict[str, Tensor] = {}
        named = dict(patient.module.named_parameters())
        for layer in patient.hidden:
            weight = named[layer.incoming[0]].detach()
            lead = weight.shape[: patient.lead]
            units = (*lead, weight.shape[patient.lead])
            self._utility[layer.name] = torch.zeros(units, device=weight.device)
            self._age[layer.name] = torch.zeros(units, dtype=torch.int64, device=weight.device)
            self._account[layer.name] = torch.zeros(lead, dtype=torch.float64, device=weight.device)

    @torch.no_grad()
    def step(self, patient: Patient, key: int) -> Applied | None:
        """After every update, on the batch in ``patient.states``; what was done, or None where no unit was due.

        Args:
            patient: a view of the same networks.
            key: of all draws; each replacement draws anew.
        """
        layers = read(patient)
        masks = {layer.name: self._due(patient, layer, layers[layer.name].values) for layer in patient.hidden}
        if not any(bool(mask.any()) for mask in masks.values()):
            return None
        self._replacements += 1
        fresh_key = derived(key, self._replacements)
        return replace_units(patient, "continual_backprop", masks, fresh_key, outgoing=0.0, rollback=False)

    def _due(self, patient: Patient, layer: Hidden, activations: Tensor) -> Tensor:
        """Bring a layer's account up to date; the mask of units that are replaced now."""
        utility, age, account = self._utility[layer.name], self._age[layer.name], self._account[layer.name]
        named = dict(patient.module.named_parameters())
        # Units first and everything else behind them: the sum over all that a unit feeds.
        leaving = [named[name].abs().movedim(patient.lead + 1, patient.lead) for name in layer.outgoing]
        weight = torch.stack([part.flatten(patient.lead + 1).sum(-1) for part in leaving]).sum(0)
        utility.lerp_(activations.abs().mean(-2) * weight, 1 - self._decay)
        age.add_(1)
        mature = age > self._maturity
        account.add_(self._rate * mature.sum(-1))
        wanted = account.floor().minimum(mature.sum(-1).double())
        ranks = utility.masked_fill(~mature, math.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
        mask: Tensor = mature & (ranks < wanted.unsqueeze(-1))
        account.sub_(wanted)
        utility.masked_fill_(mask, 0)
        age.masked_fill_(mask, 0)
        return mask

    def state_dict(self) -> dict[str, Tensor]:
        """Utilities, ages, accounts and the number of replacements, as flat tensors; not copies."""
        groups = {"utility": self._utility, "age": self._age, "account": self._account}
        state = {f"{group}.{name}": value for group, values in groups.items() for name, value in values.items()}
        return state | {"replacements": torch.tensor(self._replacements)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`, bit for bit."""
        for name, value in self.state_dict().items():
            value.copy_(state[name])
        self._replacements = int(state["replacements"])
