"""Services beside a run's own logs: each on a thread of its own, so that none can end, alter or delay a training.

A run tells a service what it tells TensorBoard, and reads nothing back. What a service raises (no network, a full disk,
a rejected key) becomes one warning, after which it hears nothing more from this start of the run.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlplastic.command_line import first_line
from rlplastic.errors import ConfigurationError
from rlplastic.run_directory import write_atomically
from rlplastic.writers import Writer

TENSORBOARD = "tensorboard"
SERVICES = {"wandb": "rlplastic.writers.wandb_service", "mlflow": "rlplastic.writers.mlflow_service"}
"""The module of each service, whose ``open_run(run)`` makes its writer; the name is that of its package and extra."""
NAMES = (TENSORBOARD, *SERVICES)
"""What `tracking.writers` may hold."""
PATIENCE = 60.0
"""Seconds that the end of a run waits for a service that has not taken everything."""
MOST_WAITING = 10_000
"""Messages that a service may be behind, hours of a usual run; memory must not pay for one that hangs."""


@dataclass(frozen=True)
class Run:
    """What a service is told of a run when it opens it."""

    directory: Path
    name: str
    project: str
    settings: Mapping[str, Any]
    """The configuration by dotted key."""

    def known(self, service: str) -> dict[str, str]:
        """What `remember` was given by an earlier start of this run; empty without one."""
        document = self.directory / f"{service}.json"
        return dict(json.loads(document.read_text(encoding="utf-8"))) if document.exists() else {}

    def remember(self, service: str, document: Mapping[str, str]) -> None:
        """Keep under which name the service knows this run, so that the next start goes on there."""
        write_atomically(self.directory / f"{service}.json", json.dumps(document, indent=1) + "\n")


def require(names: Iterable[str]) -> None:
    """Refuse services whose package is missing.

    Raises:
        ConfigurationError: naming the extra that has it.
    """
    for name in names:
        if name in SERVICES and find_spec(name) is None:
            raise ConfigurationError(
                f"tracking.writers has {name!r}, whose package is not installed; pip install 'rlplastic[{name}]', or "
                "leave it out"
            )


def start(names: Iterable[str], run: Run, warn: Callable[[str], None]) -> list[Writer]:
    """A writer for each service among ``names``; opening it, too, is done by its own thread."""
    return [Background(name, partial(_open, name, run), warn) for name in names if name in SERVICES]


def _open(name: str, run: Run) -> Writer:
    writer: Writer = import_module(SERVICES[name]).open_run(run)
    return writer


class Background:
    """A `Writer` that hands everything to another one on a thread; no method waits but `close`, and none raises.

    Args:
        name: of the service, for the warning.
        opened: makes the other writer, on the thread.
        warn: prints the warning; called by the thread that calls the methods.
    """

    def __init__(self, name: str, opened: Callable[[], Writer], warn: Callable[[str], None]) -> None:
        self._name, self._opened, self._warn = name, opened, warn
        self._jobs: queue.SimpleQueue[Callable[[Writer], None] | None] = queue.SimpleQueue()
        self._failure: str | None = None
        self._told = False
        self._thread = threading.Thread(target=self._work, name=f"{name} writer", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves."""
        self._later(lambda writer: writer.scalars(step, values))

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A text."""
        self._later(lambda writer: writer.text(tag, markdown, step))

    def histograms(self, step: int, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Distributions of arrays, which must not change afterwards."""
        self._later(lambda writer: writer.histograms(step, values))

    def video(self, tag: str, film: Path, step: int) -> None:
        """A film."""
        self._later(lambda writer: writer.video(tag, film, step))

    def close(self, completed: bool) -> None:
        """Wait for what is on its way, `PATIENCE` seconds at most."""
        self._later(lambda writer: writer.close(completed))
        self._jobs.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive() and self._failure is None:
            self._failure = f"it has not taken everything within {PATIENCE:g} s"
        self._tell_failure()

    def _later(self, job: Callable[[Writer], None]) -> None:
        if self._jobs.qsize() >= MOST_WAITING and self._failure is None:
            self._failure = f"it is {MOST_WAITING:,} messages behind"
        self._tell_failure()
        if self._failure is None:
            self._jobs.put(job)

    def _tell_failure(self) -> None:
        if self._failure is not None and not self._told:
            self._told = True
            self._warn(f"{self._name} gets nothing more of this run ({self._failure}); training and its own logs go on")

    def _work(self) -> None:
        try:
            writer = self._opened()
            for job in iter(self._jobs.get, None):
                if self._failure is not None:
                    return
                job(writer)
        except BaseException as error:  # a thread's SystemExit, too, would only be lost
            self._failure = f"{type(error).__name__}: {first_line(error)}"
