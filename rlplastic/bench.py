"""`python -m rlplastic.bench what=replay`: how fast the parts are here, beside installed peers; a table, and JSON."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from rlplastic.command_line import leave, parse, run_verb
from rlplastic.errors import ConfigurationError, nearest

SUBJECTS = ("replay", "kernels", "loop", "scaling", "update", "monitor", "export", "time_to_return")
"""Modules of `rlplastic.benchmarking`; each has ``measure(options) -> rows`` and a ``CAPTION``."""
CRITICS = ("categorical", "flow")
"""Whose updates are measured."""
LIBRARIES = (
    *("rlplastic", "torch", "numpy", "envpool", "mujoco", "triton", "gymnasium", "onnxruntime"),
    *("stable-baselines3", "sb3-contrib", "sbx-rl", "jax", "torchrl", "skrl"),
)


@dataclass
class Arguments:
    """Measure a part of rlplastic on this machine; leave it idle meanwhile."""

    what: str = MISSING
    """replay (sampling beside Stable-Baselines3 and TorchRL, if installed), kernels (of a GPU, beside torch's
    operations), loop (without learning, beside raw envpool), scaling (of both with environments and capacity), update
    (beside its own matrix products), monitor (what watching plasticity costs), export (one action of an exported policy
    beside torch) or time_to_return (a training beside one of every peer, in a checkout)."""
    out: str | None = None
    """JSON file for the numbers."""
    threads: int | None = None
    """Of torch; all cores if left out."""
    repeats: int = 30
    """Of every figure, of which the median counts."""
    task: str = "halfcheetah"
    """Of time_to_return."""
    minutes: float = 2.0
    """Of time_to_return, for every contender."""
    critic: str = "categorical"
    """Of update: categorical, or flow, by its steps and noises."""
    quick: bool = False
    """Small sizes, to try it."""


def main(arguments: Sequence[str]) -> None:
    """Measure, print, write.

    The file holds what the table shows and what made it: ``what``, ``command``, ``processor``, ``cores``, ``device``,
    ``threads`` (of torch), ``versions`` by library, ``caption``, and ``rows``, a dictionary by column for each row.

    Raises:
        ConfigurationError: wrong arguments, or a file that cannot be written.
    """
    options = parse(arguments, Arguments, "bench")
    if options.what not in SUBJECTS:
        raise ConfigurationError(f"what={options.what!r} cannot be measured; {nearest(options.what, SUBJECTS)}")
    for name, number in (("repeats", options.repeats), ("threads", options.threads)):
        if number is not None and number < 1:
            raise ConfigurationError(f"{name}={number} is out of range; expected a number of 1 or more")
    if options.critic not in CRITICS:
        raise ConfigurationError(f"critic={options.critic!r} cannot be measured; {nearest(options.critic, CRITICS)}")
    if options.minutes <= 0:
        raise ConfigurationError(f"minutes={options.minutes:g} is no time to train; expected more than 0")

    import torch
    from rich.table import Column, Table

    from rlplastic.machine import probe_machine
    from rlplastic.run_directory import require_writable, write_report
    from rlplastic.terminal import standard_console

    if options.out is not None:  # asked now: a measurement takes minutes, and would be lost
        require_writable(Path(options.out))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    subject = import_module(f"rlplastic.benchmarking.{options.what}")
    measure: Callable[[Any], list[dict[str, Any]]] = subject.measure
    rows = measure(options)
    machine = probe_machine("auto")
    columns = (Column(name, overflow="fold") for name in rows[0])
    table = Table(*columns, title=options.what, caption=subject.CAPTION)
    for row in rows:
        table.add_row(*(f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    standard_console().print(table)
    document = {
        "what": options.what,
        "command": " ".join(["python -m rlplastic.bench", *arguments]),
        "processor": machine.processor,
        "cores": machine.cores,
        "device": machine.device_name,
        "threads": torch.get_num_threads(),
        "versions": _versions(),
        "caption": subject.CAPTION,
        "rows": rows,
    }
    if options.out is not None:
        write_report(Path(options.out), document, "measure again")
        print(f"written to {options.out}")


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    leave(run_verb(main, sys.argv[1:]))
