"""Non-finite numbers stop a run: which tensor, at which step, with the evidence on disk.

On a CPU every update is looked at; on other devices that would wait for the device, so losses are looked at when they
are logged (a NaN survives every sum). Parameters are looked at before every checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlplastic.envs.base import Array, Observation, Step, on_host
from rlplastic.errors import NonFiniteError
from rlplastic.progress import Progress
from rlplastic.replay.ring import ReplayRing
from rlplastic.replay.sample import Batch

DUMPED_ROWS = 64
"""Newest rows of each environment that a dump holds."""


class Guard:
    """Checks what enters and leaves the learner, and dumps what led to a NaN or infinity.

    Args:
        directory: the run directory; dumps go to ``non_finite_<transitions>`` in it.
        replay: whose newest rows a dump holds.
        progress: for the step that a message names.
    """

    def __init__(self, directory: Path, replay: ReplayRing, progress: Progress) -> None:
        self._directory, self.replay, self._progress = directory, replay, progress
        self._batch: Batch | None = None

    def check_observation(self, observation: Observation[Any]) -> None:
        """Refuse a non-finite observation (of a reset).

        Raises:
            NonFiniteError: naming the group, the environments and the step.
        """
        observation = on_host(observation)
        for group, array in observation.items():
            self._check_array(f"observation '{group}'", array, observation)

    def check_step(self, step: Step[Any], action: NDArray[np.float32] | Tensor) -> None:
        """Refuse a vector step with a non-finite observation, final observation or reward.

        Raises:
            NonFiniteError: naming the tensor, the environments and the step.
        """
        if "finite" in step.info and step.info["finite"].all():
            return  # tensors, which the simulator's device has looked at
        observation = on_host(step.observation)
        evidence = {**on_host({"action": action}), "reward": step.reward, **observation}
        for group, array in observation.items():
            self._check_array(f"observation '{group}'", array, evidence)
        self._check_array("reward", step.reward, evidence)
        for group, array in on_host(step.info.get("final_observation", {})).items():
            ended = np.where((step.terminated | step.truncated)[:, None], array, 0)
            self._check_array(f"final observation '{group}'", ended, {**evidence, "final": ended})

    def _check_array(self, name: str, array: Array, evidence: Mapping[str, Array]) -> None:
        # One cheap pass in the usual case: a sum with a NaN or an infinity in it is not finite.
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.add.reduce(array, None)
        if math.isfinite(total):
            return
        rows = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))
        if not len(rows):  # only the sum was too large
            return
        what = f"{name} of environments {rows[:8].tolist()}"
        tensors = {key: torch.from_numpy(value) for key, value in evidence.items()}
        self.stop(what, "the environment returned it", tensors)

    def check_update(self, metrics: Mapping[str, Tensor], batch: Batch, update: int) -> None:
        """Refuse a non-finite loss of the update just done.

        Raises:
            NonFiniteError: naming the loss and the update.
        """
        self._batch = batch
        if batch.reward.device.type == "cpu":
            for name, value in metrics.items():
                if not math.isfinite(float(value)):
                    self.stop(name, f"update {update} produced it")

    def check_means(self, means: Mapping[str, float]) -> None:
        """Refuse non-finite means of metrics (devices that are not asked at every update).

        Raises:
            NonFiniteError: naming the metric.
        """
        for name, value in means.items():
            if not math.isfinite(value):
                self.stop(name, "an update since the last log produced it")

    def stop(self, what: str, origin: str, evidence: Mapping[str, Tensor] | None = None) -> NoReturn:
        """Dump the newest transitions, the last batch and ``evidence``, and raise.

        Raises:
            NonFiniteError: always.
        """
        where = self._directory / f"non_finite_{self._progress.transitions:012d}"
        try:
            self._dump(where, {"what": what, "origin": origin}, evidence or {})
            found = f"the evidence is in {where}"
        except OSError as error:
            found = f"the evidence could not be written ({error.strerror or error})"
        if any((self._directory / "checkpoints").glob("step_*")):
            hope = "the last checkpoint is in place, but an exact resume from it repeats this: mend the cause first"
        else:
            hope = "there is no checkpoint yet: mend the cause, then rerun the command to start anew"
        raise NonFiniteError(
            f"{what} is not finite at step {self._progress.transitions} ({origin}); {found}, and {hope}"
        )

    def _dump(self, where: Path, report: dict[str, str], evidence: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save_file

        where.mkdir(exist_ok=True)
        stop = self.replay.written
        rows = self.replay.export_rows(np.maximum(stop - DUMPED_ROWS, 0), stop)
        files: dict[str, dict[str, Tensor]] = {"transitions": rows, "evidence": dict(evidence)}
        if self._batch is not None:
            batch = self._batch
            files["batch"] = {"action": batch.action, "reward": batch.reward, "discount": batch.discount}
            files["batch"] |= {f"observation.{group}": value for group, value in batch.observation.items()}
            files["batch"] |= {f"next_observation.{group}": value for group, value in batch.next_observation.items()}
        for name, tensors in files.items():
            if tensors:
                plain = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
                save_file(plain, where / f"{name}.safetensors")
        counters = {"transitions": self._progress.transitions, "vector_steps": self._progress.vector_steps}
        (where / "report.json").write_text(json.dumps(report | counters, indent=1), encoding="utf-8")
