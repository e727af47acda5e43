"""Where all of a process's wall time went (`profile=true`): the stopwatch's sections, as a table and a document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEARNING = ("sample", "compile", "update", "check", "monitor")
"""Sections that TensorBoard and timing.csv show as one, ``learn``."""
WHAT = {
    "start": "interpreter, imports, configuration, environments, replay, networks",
    "resume": "loading a checkpoint, replaying logged actions",
    "act": "choosing and sending actions",
    "env": "waiting for the simulator",
    "store": "checking what came back, counting, putting it into replay",
    "sample": "drawing batches",
    "compile": "the first updates, which compile",
    "update": "updating networks",
    "check": "looking at losses",
    "monitor": "measuring plasticity, probing, training branches",
    "log": "writing logs",
    "evaluate": "evaluating the policy",
    "checkpoint": "saving checkpoints",
    "finish": "whatever came after the last save",
}
"""Sections in the order in which they are told."""


def document(totals: Mapping[str, float]) -> dict[str, Any]:
    """Seconds and fractions of every section that took time, and their sum ``wall_seconds``."""
    wall = sum(totals.values())
    names = [*(name for name in WHAT if name in totals), *(name for name in totals if name not in WHAT)]
    sections = {name: {"seconds": totals[name], "fraction": totals[name] / wall} for name in names}
    return {"wall_seconds": wall, "sections": sections}


def table(totals: Mapping[str, float]) -> list[str]:
    """The same as lines to read."""
    told = document(totals)
    lines = [f"{told['wall_seconds']:.1f} s from the beginning of the process to here:"]
    for name, part in told["sections"].items():
        lines.append(f"  {name:<11}{part['seconds']:>9.2f} s {part['fraction']:>6.1%}  {WHAT.get(name, '')}".rstrip())
    return lines
