"""Interventions against loss of plasticity, on a `rlplastic.plasticity.patient.Patient` of any library.

Those of `INTERVENTIONS` are done once, in place, and return what they did; `units.ContinualBackprop` and the functions
of `regularisers` act in every update; `injection` changes the network's structure. What each owes is in `table`.
"""

from rlplastic.plasticity.interventions.injection import Injected, plasticity_injection
from rlplastic.plasticity.interventions.regularisers import Reference, churn_reduction, l2_init, parseval
from rlplastic.plasticity.interventions.resets import (
    batch_norm_reestimation,
    full_reset,
    hare_and_tortoise,
    last_layer_reset,
    optimizer_reset,
    shrink_and_perturb,
)
from rlplastic.plasticity.interventions.treatment import Applied, Intervention
from rlplastic.plasticity.interventions.units import ContinualBackprop, redo, regrama

INTERVENTIONS: dict[str, Intervention] = {
    "batch_norm_reestimation": batch_norm_reestimation,
    "optimizer_reset": optimizer_reset,
    "regrama": regrama,
    "redo": redo,
    "hare_and_tortoise": hare_and_tortoise,
    "last_layer_reset": last_layer_reset,
    "shrink_and_perturb": shrink_and_perturb,
    "full_reset": full_reset,
}
"""By name, those that change least first; each raises `ConfigurationError` on a patient that it does not apply to."""

__all__ = [
    "INTERVENTIONS",
    "Applied",
    "ContinualBackprop",
    "Injected",
    "Intervention",
    "Reference",
    "batch_norm_reestimation",
    "churn_reduction",
    "full_reset",
    "hare_and_tortoise",
    "l2_init",
    "last_layer_reset",
    "optimizer_reset",
    "parseval",
    "plasticity_injection",
    "redo",
    "regrama",
    "shrink_and_perturb",
]
