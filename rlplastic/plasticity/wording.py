"""The monitor's findings in words that a person understands, for a terminal and a log."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rlplastic.plasticity.monitor import AGENT_RESET, Alarm, Attempt, Verdict
from rlplastic.plasticity.probe import in_words

NAMES = {
    "batch_norm_reestimation": "re-estimation of batch-norm statistics",
    "optimizer_reset": "reset of the optimizer",
    "hare_and_tortoise": "return to the moving average",
    "continual_backprop": "round of continual backprop",
    "redo": "reset of dormant units",
    "regrama": "reset of units without gradient",
    "last_layer_reset": "reset of the last layer",
    "shrink_and_perturb": "shrink and perturb",
    "full_reset": "full reset",
    AGENT_RESET: "full reset",
}
"""Interventions by their names in the code."""


def intervention(name: str) -> str:
    """An intervention as it is called in a sentence."""
    return NAMES.get(name, name.replace("_", " "))


def treatment(rung: str, patient: str) -> str:
    """What is done to which networks, where one of them is ill."""
    return f"{intervention(rung)} of {'all networks' if rung == AGENT_RESET else f'the {patient}'}"


def percent(share: float) -> str:
    """``+12 %``."""
    return f"{share:+.0%}".replace("%", " %") if math.isfinite(share) else "unknown"


def alarm(found: Alarm, probed: bool) -> str:
    """What a metric says, and that it alone decides nothing: a probe does, where it is followed by one."""
    _, module, layer, quantity = found.metric.split("/")
    words = quantity.removesuffix("_worst").replace("_", " ") + ("" if layer == "all" else f" of {layer}")
    teller = "a probe" if probed else "`python -m rlplastic.diagnose`"
    return (
        f"alarm: {words} of the {module} is {found.value:.3g}, beyond {found.limit:.3g} (by {found.reference}); "
        f"{teller} tells whether it still learns"
    )


def probed(name: str, ratio: float, ill: bool, alarmed: bool) -> str:
    """What a probe found."""
    verdict = "it is ill" if ill else "no illness, a false alarm" if alarmed else "no illness"
    return f"the {name} learns {in_words(ratio)}: {verdict}"


def no_cure(name: str, attempts: Sequence[Attempt]) -> str:
    """That nothing on the ladder suffices."""
    tried = ", ".join(
        f"{treatment(a.intervention, name)} {a.remark or ('' if a.ratio is None else f'{a.ratio:.2f}')}"
        for a in attempts
    )
    return f"the {name} is left as it is: nothing on the ladder makes a copy learn again ({tried})"


def judged(outcome: str, name: str, what: str, ill: float, verdict: Verdict) -> str:
    """The outcome of a verification."""
    subject = f"the {name} learned {in_words(ill)}: {treatment(what, name)}"
    if outcome == "committed":
        return (
            f"{subject}, verified beside its untouched twin (error against returns {percent(-verdict.gain)}, rank "
            f"correlation {verdict.twin.rank_correlation:.2f} -> {verdict.branch.rank_correlation:.2f}), committed"
        )
    why = " and ".join(verdict.objections)
    return f"{subject}, not yet good enough: {why}; " + (
        "the branch learns on" if outcome == "extended" else "the branch is dropped, nothing changed"
    )


def settled(kept: bool, report: Mapping[str, float | int | None]) -> str:
    """How a recovery window ended."""
    before, after = report["return_before"], report["return_after"]
    seen = "no return was seen" if before is None or after is None else f"return {before:.4g} -> {after:.4g}"
    back = report["updates_to_recover"]
    took = "" if back is None else f", back after {back:,} updates"
    return f"the intervention is kept ({seen}{took})" if kept else f"the return was lost ({seen}): taken back"
