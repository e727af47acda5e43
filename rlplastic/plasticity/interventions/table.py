"""What every intervention owes, and why where it owes nothing: the table that its tests are generated from.

`why_not` answers for one intervention, sentence and network; the tests check either that the sentence holds, or that
nothing of what it speaks of has changed. `markdown` is the table in the documentation.
"""

from __future__ import annotations

from rlplastic.plasticity.patient import Patient

SENTENCES: dict[str, str] = {
    "in place": "parameters, buffers and moments are edited where they lie",
    "optimizer": "moments and steps of what was reset are zero, nothing else's; nothing trainable is left out",
    "target": "the target gets the same entries, or is copied; never noise of its own",
    "statistics": "running statistics are those of replay rows under the new weights",
    "bounds": "unit rows and gains are back on their bounds",
    "kept": "statistics of observations and rewards, counters and the replay stay",
    "alpha": "after a new policy the temperature's optimizer starts anew, after a fresh one alpha does too",
    "schedule": "learning rates go on as planned",
    "randomness": "the key alone decides: equal keys equal bits, other keys other draws; torch's state stays",
    "references": "what was edited is named, so that references start from there",
    "cooldown": "the caller is asked to wait",
    "rollback": "a snapshot takes everything back, bit for bit",
}

_STATISTICS_ONLY = "only running statistics change"
_MEMORY_ONLY = "only the optimizer's memory changes"
_NO_DRAW = "draws nothing"
_OUTPUT_STAYS = "the policy stays what it was"
_AVERAGE = "the target is an average itself"
_NEAR = "an average of recent policies is near the newest"
_EVERY_UPDATE = "acts in every update; the run's checkpoints are the way back"
_STEP = "part of every update, which the target follows and statistics track"
_TERM = "a term of the loss: the optimizer makes the edit, as in any update"
_NEW = "returns a new patient, whose optimizer moves the learner and whose target has the same learner"

_OF_A_TERM = dict.fromkeys(
    ("in place", "optimizer", "target", "statistics", "bounds", "alpha", "references", "cooldown", "rollback"), _TERM
) | {"randomness": _NO_DRAW}

TABLE: dict[str, dict[str, str]] = {
    "batch_norm_reestimation": {
        "optimizer": _STATISTICS_ONLY,
        "target": "its weights stay, its statistics are re-estimated as well",
        "bounds": _STATISTICS_ONLY,
        "alpha": _OUTPUT_STAYS,
        "randomness": _NO_DRAW,
        "references": _STATISTICS_ONLY,
    },
    "optimizer_reset": {
        "target": _MEMORY_ONLY,
        "statistics": _MEMORY_ONLY,
        "bounds": _MEMORY_ONLY,
        "alpha": _OUTPUT_STAYS,
        "randomness": _NO_DRAW,
        "references": _MEMORY_ONLY,
    },
    "regrama": {"alpha": _OUTPUT_STAYS},
    "redo": {"alpha": _OUTPUT_STAYS},
    "continual_backprop": {"alpha": _OUTPUT_STAYS, "rollback": _EVERY_UPDATE},
    "hare_and_tortoise": {"target": _AVERAGE, "alpha": _NEAR, "randomness": _NO_DRAW},
    "last_layer_reset": {},
    "shrink_and_perturb": {},
    "full_reset": {},
    "plasticity_injection": dict.fromkeys(set(SENTENCES) - {"kept", "schedule"}, _NEW),
    "l2_init": dict.fromkeys(("optimizer", "target", "statistics", "alpha", "references", "cooldown"), _STEP)
    | {"randomness": _NO_DRAW, "rollback": _EVERY_UPDATE},
    "parseval": _OF_A_TERM,
    "churn_reduction": _OF_A_TERM,
}
"""By intervention: the sentences that do not apply, each with the reason; all others do."""


def why_not(intervention: str, sentence: str, patient: Patient) -> str | None:
    """Why a sentence does not apply to an intervention on this network, or None where it does."""
    if reason := TABLE[intervention].get(sentence):
        return reason
    missing = {
        "target": patient.target is None and "the network has no target",
        "statistics": not patient.has_running_statistics and "the network has no running statistics",
        "bounds": not patient.unit_rows and "the network's norms are free",
        "alpha": patient.temperature is None and "the network is not the policy",
    }
    return missing.get(sentence) or None


def markdown() -> str:
    """The table for the documentation: one row for each intervention, reasons as numbered notes."""
    reasons = list(dict.fromkeys(reason for row in TABLE.values() for reason in row.values()))
    lines = ["| intervention | " + " | ".join(SENTENCES) + " |", "|---" * (len(SENTENCES) + 1) + "|"]
    for name, row in TABLE.items():
        cells = [f"[{reasons.index(row[sentence]) + 1}]" if sentence in row else "yes" for sentence in SENTENCES]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {sentence}: {meaning}." for sentence, meaning in SENTENCES.items())]
    lines += ["", *(f"{number}. {reason[0].upper()}{reason[1:]}." for number, reason in enumerate(reasons, 1))]
    return "\n".join(lines) + "\n"
