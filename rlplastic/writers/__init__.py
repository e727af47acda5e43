"""Where curves, texts and films of a run go: TensorBoard's files, Weights & Biases, MLflow.

TensorBoard's events are a log of the run like its tables: whole records, cut back to the checkpoint on resume. The
others are services (`rlplastic.writers.services`), to which a run tells the same, and for which it does not wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

HISTOGRAM_BINS = 64


class Writer(Protocol):
    """What all of them do; steps are environment transitions and never fall within one start of a run."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves, by name."""

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A text."""

    def histograms(self, step: int, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Distributions of the entries of arrays, by name."""

    def video(self, tag: str, film: Path, step: int) -> None:
        """A film, given as a video file."""

    def close(self, completed: bool) -> None:
        """The end of this start of the run; not completed: it was interrupted or failed."""
