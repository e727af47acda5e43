"""Interventions against loss of plasticity, on a `rlplastic.plasticity.patient.Patient` of any library."""

from rlplastic.plasticity.interventions.resets import (
    MovingAverage,
    batch_norm_reestimation,
    full_reset,
    hare_and_tortoise,
    last_layer_reset,
    optimizer_reset,
    shrink_and_perturb,
)
from rlplastic.plasticity.interventions.treatment import Applied, Intervention

INTERVENTIONS: dict[str, Intervention] = {
    "batch_norm_reestimation": batch_norm_reestimation,
    "optimizer_reset": optimizer_reset,
    "hare_and_tortoise": hare_and_tortoise,
    "last_layer_reset": last_layer_reset,
    "shrink_and_perturb": shrink_and_perturb,
    "full_reset": full_reset,
}
"""By name, those that change least first; each raises `ConfigurationError` on a patient that it does not apply to."""

__all__ = [
    "INTERVENTIONS",
    "Applied",
    "Intervention",
    "MovingAverage",
    "batch_norm_reestimation",
    "full_reset",
    "hare_and_tortoise",
    "last_layer_reset",
    "optimizer_reset",
    "shrink_and_perturb",
]
