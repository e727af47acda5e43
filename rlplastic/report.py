"""`python -m rlplastic.report runs=runs/*`: what runs and their seeds say together, as figures, tables and one page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from rlplastic.command_line import leave, parse, run_verb


@dataclass
class Arguments:
    """Compare runs: writes <out>/index.html, results.csv, results.json, and figures as PNG and SVG."""

    runs: str = MISSING
    """A run, a folder of runs, a glob, or several of them separated by commas."""
    out: str = "report"
    """Folder to write to."""


def main(arguments: Sequence[str]) -> None:
    """Read, compare, write, print the results.

    Raises:
        ConfigurationError: wrong arguments, no readable run, or an unwritable folder.
    """
    options = parse(arguments, Arguments, "report")

    from rich.table import Table

    from rlplastic.analysis.page import number
    from rlplastic.analysis.writing import write
    from rlplastic.terminal import View, standard_console

    out, console = Path(options.out), standard_console()
    view = View(live=False, console=console)
    with console.status("reading runs, drawing figures"):
        rows = write(options.runs, out, view.warn)
    table = Table("task", "arm", "seeds", "final return", "95 % interval", "updates", box=None, header_style="bold")
    for row in rows:
        interval = f"[{number(row.return_low)}, {number(row.return_high)}]" if row.seeds > 1 else "–"
        table.add_row(row.task, row.arm, str(row.seeds), number(row.return_mean), interval, f"{row.updates:,.0f}")
    console.print(table)
    view.note(f"page: {out / 'index.html'}")


if __name__ == "__main__":
    leave(run_verb(main, sys.argv[1:]))
