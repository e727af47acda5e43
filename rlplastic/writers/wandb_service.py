"""Weights & Biases: curves, texts, histograms and films of a run, under one run id however often it is resumed.

Online where a key is known (``WANDB_API_KEY``, ``wandb login``) and ``WANDB_MODE`` does not say otherwise; else into
``<run>/wandb/offline-run-…``, which ``wandb sync`` uploads later.
"""

from __future__ import annotations

import html
import os
import secrets
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlplastic.writers import HISTOGRAM_BINS
from rlplastic.writers.services import Run


def open_run(run: Run) -> WandbWriter:
    """Begin or continue the run; raises whatever the package raises."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # reports of its own errors would leave an offline machine
    wandb: Any = import_module("wandb")
    known = run.known("wandb")
    identity = known.get("id") or secrets.token_hex(4)  # a name among all runs of a project: no seed may repeat it
    run.remember("wandb", {"id": identity})
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
    opened = wandb.init(
        project=run.project,
        name=run.name,
        id=identity,
        resume="allow",
        mode=mode,
        dir=str(run.directory),
        # "off": it would wrap standard output, which belongs to the run's own view
        settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
    )
    opened.config.update(dict(run.settings), allow_val_change=True)
    return WandbWriter(wandb, opened)


class WandbWriter:
    """A `rlplastic.writers.Writer` into a run of Weights & Biases, which ignores steps below its last one."""

    def __init__(self, wandb: Any, run: Any) -> None:  # noqa: ANN401 - of a package that may be missing
        self._wandb, self._run = wandb, run

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves."""
        self._run.log(dict(values), step=step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A text, as a panel that shows the newest."""
        self._run.log({tag: self._wandb.Html(f"<pre>{html.escape(markdown)}</pre>")}, step=step)

    def histograms(self, step: int, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Distributions."""
        counted = {name: np.histogram(array, HISTOGRAM_BINS) for name, array in values.items()}
        self._run.log({name: self._wandb.Histogram(np_histogram=pair) for name, pair in counted.items()}, step=step)

    def video(self, tag: str, film: Path, step: int) -> None:
        """A film."""
        self._run.log({tag: self._wandb.Video(str(film), format=film.suffix.lstrip("."))}, step=step)

    def close(self, completed: bool) -> None:
        """Upload what is left, or close the offline file; an interrupted run shows as crashed until it is resumed."""
        self._run.finish(exit_code=0 if completed else 1)
