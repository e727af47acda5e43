"""The monitor's findings in words that a person understands, for a terminal and a log."""

from __future__ import annotations

import math

NAMES = {
    "batch_norm_reestimation": "new batch-norm statistics",
    "optimizer_reset": "reset of the optimizer",
    "hare_and_tortoise": "return to the moving average",
    "continual_backprop": "continual backprop",
    "redo": "reset of dormant units (ReDo)",
    "regrama": "reset of units without gradient (ReGraMa)",
    "last_layer_reset": "reset of the last layer",
    "shrink_and_perturb": "shrink and perturb",
    "full_reset": "full reset",
}
"""Interventions, by their names in the code."""


def intervention(name: str) -> str:
    """An intervention as it is called in a sentence."""
    return NAMES.get(name, name.replace("_", " "))


def pace(ratio: float) -> str:
    """A probe's ratio: ``38 % more slowly than a fresh network``, ``as fast as a fresh network``."""
    if not math.isfinite(ratio):
        return "nothing finite"
    if abs(ratio - 1) < 0.05:
        return "as fast as a fresh network"
    if ratio < 1:
        return f"{1 - ratio:.0%} faster than a fresh network".replace("%", " %")
    # The area under the loss curve is larger by this factor.
    return f"{ratio:.1f} times more slowly than a fresh network"


def percent(share: float) -> str:
    """``+12 %``."""
    return f"{share:+.0%}".replace("%", " %") if math.isfinite(share) else "unknown"


def metric(name: str) -> str:
    """``effective rank of trunk.3`` of ``plasticity/critic/trunk.3/effective_rank``."""
    _, _, layer, quantity = name.split("/")
    words = quantity.removesuffix("_worst").replace("_", " ")
    return words if layer == "all" else f"{words} of {layer}"
