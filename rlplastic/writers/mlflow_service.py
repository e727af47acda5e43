"""MLflow: curves, texts and films of a run, under one run id however often it is resumed.

Where to is MLflow's own business: ``MLFLOW_TRACKING_URI``, and without it a database in the working directory. It has
no histograms, so there are none.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlplastic.writers.services import Run

MOST_AT_ONCE = 100
"""Parameters or metrics of one request, by MLflow's interface."""
LONGEST_PARAMETER = 500
"""Characters of a value that every MLflow since 1.28 stores."""


def open_run(run: Run) -> MlflowWriter:
    """Begin or continue the run; raises whatever the package raises."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a local database asks for no network
    mlflow: Any = import_module("mlflow")
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells how it makes its tables, amid the run's own lines
    known, given = run.known("mlflow"), os.environ.get("MLFLOW_TRACKING_URI")
    place = given or known.get("tracking_uri") or mlflow.get_tracking_uri()
    client = mlflow.MlflowClient(tracking_uri=place)
    if "run_id" in known:
        identity = known["run_id"]
        client.update_run(identity, status="RUNNING")
    else:
        experiment = client.get_experiment_by_name(run.project)
        number = experiment.experiment_id if experiment else client.create_experiment(run.project)
        identity = client.create_run(number, run_name=run.name).info.run_id
        # An address that was given may hold a password.
        run.remember("mlflow", {"run_id": identity} | ({} if given else {"tracking_uri": place}))
    writer = MlflowWriter(mlflow, client, identity, resumed="run_id" in known)
    writer.settings(run.settings)
    return writer


class MlflowWriter:
    """A `rlplastic.writers.Writer` into a run of MLflow, where a point stays: what is there is not written again."""

    def __init__(self, mlflow: Any, client: Any, identity: str, resumed: bool) -> None:  # noqa: ANN401 - may be missing
        self._entities, self._client, self._identity = mlflow.entities, client, identity
        self._resumed = resumed
        self._last: dict[str, int] = {}

    def settings(self, settings: Mapping[str, Any]) -> None:
        """The configuration, as parameters; MLflow keeps the first value of each, so what may change is a tag."""
        there = self._client.get_run(self._identity).data.params
        told = {key: str(value)[:LONGEST_PARAMETER] for key, value in settings.items()}
        new = [self._entities.Param(key, value) for key, value in told.items() if key not in there]
        self._send("params", new)
        for key in (key for key, value in told.items() if there.get(key, value) != value):
            self._client.set_tag(self._identity, key, told[key])

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves; those that an earlier start of the run wrote after its last checkpoint stand."""
        now = int(time.time() * 1000)
        points = [
            self._entities.Metric(name, float(value), now, step)
            for name, value in values.items()
            if step > self._last_step(name)
        ]
        self._last |= {point.key: step for point in points}
        self._send("metrics", points)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A text, as an artifact."""
        self._client.log_text(self._identity, markdown, f"{tag}/step_{step:012d}.md")

    def histograms(self, step: int, values: Mapping[str, NDArray[np.float32]]) -> None:
        """MLflow has none."""

    def video(self, tag: str, film: Path, step: int) -> None:
        """A film, as an artifact."""
        self._client.log_artifact(self._identity, str(film), tag)

    def close(self, completed: bool) -> None:
        """Say how it ended; a resume takes that back."""
        self._client.set_terminated(self._identity, "FINISHED" if completed else "KILLED")

    def _send(self, kind: str, entities: Sequence[Any]) -> None:
        for first in range(0, len(entities), MOST_AT_ONCE):
            self._client.log_batch(self._identity, **{kind: entities[first : first + MOST_AT_ONCE]})

    def _last_step(self, name: str) -> int:
        if name not in self._last:
            there = self._client.get_metric_history(self._identity, name) if self._resumed else []
            self._last[name] = max((point.step for point in there), default=-1)
        return self._last[name]
