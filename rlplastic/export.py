"""`python -m rlplastic.export run=runs/humanoid`: the trained policy as one verified ONNX file, ready for a robot."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import MISSING

from rlplastic.command_line import leave, parse, run_verb
from rlplastic.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.table import Table

    from rlplastic.exporting.verification import Check


@dataclass
class Arguments:
    """Write <run>/export/: policy.onnx, policy.json and golden.npz of a run's newest policy, verified.

    A check that fails ends with exit code 5, and leaves an older export as it was.
    """

    run: str = MISSING
    """Run directory."""
    episodes: int = 10
    """Of the evaluation in the document and of the closed loop."""
    torchscript: bool = False
    """Also write policy.pt."""


def main(arguments: Sequence[str]) -> None:
    """Export, verify, print.

    Raises:
        ConfigurationError: wrong arguments, no such run, no checkpoint, a missing package, or an unwritable folder.
        CheckpointError: every checkpoint is damaged.
        ExportError: a check failed.
    """
    options = parse(arguments, Arguments, "export")
    missing = [name for name in ("onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ConfigurationError(f"{' and '.join(missing)} cannot be imported; pip install 'rlplastic[export]'")

    from rlplastic.exporting.build import export_policy
    from rlplastic.terminal import View, standard_console

    console = standard_console()
    view = View(live=False, console=console)
    with console.status(f"exporting and verifying {options.run}"):
        export = export_policy(
            Path(options.run),
            episodes=options.episodes,
            with_torchscript=options.torchscript,
            report=lambda checks: console.print(_table(checks)),
            warn=view.warn,
        )
    for name, reason in export.document.absent.items():
        view.note(f"  absent: {name}, since {reason}")
    files = ", ".join(sorted(file.name for file in export.path.iterdir()))
    view.note(f"  {files} in {export.path}")


def _table(checks: list[Check]) -> Table:
    from rich.table import Column, Table

    columns = ("check", "measured", "bound", "verdict")
    table = Table(*(Column(name, overflow="fold") for name in columns), title="verification")
    for check in checks:
        verdict = {True: "passed", False: "FAILED", None: "–"}[check.passed]
        table.add_row(
            check.name, check.measured, check.bound, verdict, style="bold red" if verdict == "FAILED" else None
        )
    return table


if __name__ == "__main__":
    leave(run_verb(main, sys.argv[1:]))
