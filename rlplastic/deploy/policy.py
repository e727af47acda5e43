"""A policy from its ONNX file alone: numpy and onnxruntime, no torch, no simulator, no run directory.

The graph is the whole policy: ``obs`` (N, D) float32 in the task's units to ``actions`` (N, A) in those of the action
Box and ``raw_actions`` (N, A) in [-1, 1]. A row with a number that is not finite gives NaN in all its outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlplastic.deploy.document import METADATA_KEY, Document
from rlplastic.errors import ConfigurationError, NonFiniteError

INPUT, OUTPUTS = "obs", ("actions", "raw_actions")
Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Outputs:
    """actions: (N, A) in the units of the task's action Box; raw_actions: (N, A) in [-1, 1]."""

    actions: Rows
    raw_actions: Rows


class OnnxPolicy:
    """A policy to act with; made by `load`.

    Attributes:
        document: what its inputs and outputs mean.
        metadata: everything in the file's metadata, the document's text and the flat keys for other runners.
    """

    def __init__(self, session: Any, document: Document, metadata: Mapping[str, str]) -> None:  # noqa: ANN401 - untyped
        self._session = session
        self.document = document
        self.metadata = dict(metadata)

    @classmethod
    def load(cls, path: str | Path, threads: int = 1) -> OnnxPolicy:
        """Read ``policy.onnx``.

        Args:
            path: the file.
            threads: of onnxruntime; one is the fastest for a batch of one, and keeps a control loop's core to itself.

        Raises:
            ConfigurationError: no such file, not a policy of `rlplastic.export`, or a damaged document.
        """
        file = Path(path)
        if not file.is_file():
            raise ConfigurationError(f"{file} does not exist; expected a policy.onnx as written by rlplastic.export")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = threads
        try:
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common base of their own
            reason = " ".join(str(error).split())[:200]
            raise ConfigurationError(f"{file} is not an ONNX model ({reason}); export the run again") from error
        metadata = session.get_modelmeta().custom_metadata_map
        names = [one.name for one in session.get_inputs()], [one.name for one in session.get_outputs()]
        if METADATA_KEY not in metadata or names != ([INPUT], list(OUTPUTS)):
            raise ConfigurationError(f"{file} is an ONNX model but no policy of rlplastic.export; give one of those")
        return cls(session, Document.from_json(metadata[METADATA_KEY]), metadata)

    @property
    def observation_dim(self) -> int:
        """Width of the observations it reads."""
        return self.document.observation.width

    @property
    def action_dim(self) -> int:
        """Number of outputs."""
        return self.document.action.width

    def run(self, observation: Rows) -> Outputs:
        """Both outputs for ``observation`` (N, D), unchecked: rows that are not finite give NaN.

        Raises:
            ConfigurationError: another shape than (N, D).
        """
        rows = np.ascontiguousarray(observation, np.float32)
        if rows.ndim != 2 or rows.shape[1] != self.observation_dim:
            raise ConfigurationError(
                f"the policy was given observations of shape {rows.shape}; expected (N, {self.observation_dim}), "
                "made of the terms that its document lists"
            )
        return Outputs(*self._session.run(OUTPUTS, {INPUT: rows}))

    def act(self, observation: Rows) -> Rows:
        """Actions (N, A) in the units of the action Box.

        Raises:
            ConfigurationError: another shape than (N, D).
            NonFiniteError: a number of the observation is not finite.
        """
        actions = self.run(observation).actions
        if not np.isfinite(actions).all():
            rows = np.flatnonzero(~np.isfinite(actions).all(axis=1))[:8].tolist()
            raise NonFiniteError(f"the observation of rows {rows} is not finite; expected numbers: look at the sensors")
        return actions


def check_golden(policy: OnnxPolicy, golden: str | Path) -> tuple[float, int]:
    """Largest difference of both outputs from a ``golden.npz``, and its number of rows.

    The file's outputs were computed by the training actor in float64: any runtime on any machine has to come within
    1e-5 of half the action Box.

    Raises:
        ConfigurationError: the file is missing or holds something else.
    """
    try:
        with np.load(golden, allow_pickle=False) as file:
            rows, expected = file[INPUT], [file[name] for name in OUTPUTS]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(f"{golden} cannot be read ({error}); expected the golden.npz of an export") from error
    found = policy.run(rows)
    half = np.asarray(policy.document.action.box.scale)
    errors = (np.abs(found.actions - expected[0]) / half).max(), np.abs(found.raw_actions - expected[1]).max()
    return float(max(errors)), len(rows)
