"""What a run leaves behind for people: TensorBoard events, ``eval.csv``, ``plasticity.jsonl`` and ``timing.csv``.

All but the last describe the run and are cut back to the checkpoint on resume (`rlplastic.run_directory`):
an interrupted run and an uninterrupted one leave the same evaluation rows, bit for bit. ``timing.csv`` describes the
attempts and keeps all of them. Nothing here reads the clock but for the time of day that TensorBoard's events carry.

All of it is appended in whole records by the caller's thread (`rlplastic.record_files`). Weights & Biases and MLflow
get the same curves, texts and films where they are asked for (`rlplastic.writers.services`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rlplastic.errors import ConfigurationError, LogWriteError
from rlplastic.record_files import RecordFiles, writing
from rlplastic.writers import Writer
from rlplastic.writers.tensorboard import TensorBoard

if TYPE_CHECKING:
    from torch import Tensor

    from rlplastic.evaluation import Evaluation

SECTIONS = {
    "env": "waiting for the simulator",
    "act": "choosing and sending actions",
    "learn": "sampling batches, updating on them, and measuring what decides the replay ratio",
    "store": "checking what came back and putting it into replay",
    "log": "writing logs",
    "evaluate": "evaluating the policy",
    "checkpoint": "saving checkpoints",
}
"""What a run spends its time on; the fractions of these sections add up to 1."""

SCALARS: dict[str, str] = {
    "train/return": "Mean undiscounted return of all ranks' training episodes that ended lately, exploration included.",
    "train/length": "Mean length of those episodes, in environment steps.",
    "train/budget_used": "Used fraction of the budget that is nearer to its end.",
    "train/replay_ratio": "Gradient updates per environment transition that the run is paced at.",
    "train/updates_per_transition": "Gradient updates over environment transitions since the last point.",
    "train/samples_per_transition": "The same times the batch size: how often a transition is trained on.",
    "eval/return_mean": "Mean undiscounted return of the deterministic policy over one evaluation's episodes.",
    "eval/return_ci95": "Half the width of the 95 % confidence interval of that mean.",
    "loss/critic": "Loss of the critics, mean over the ensemble and the batch (categorical: cross-entropy in nats).",
    "loss/distilled": "Mean squared distance of the distilled critics from the flow that they are regressed onto.",
    "loss/actor": "alpha * log pi - Q, mean over the batch, in units of the scaled return.",
    "loss/temperature": "Loss of the entropy temperature; its sign says which way alpha moves.",
    "policy/entropy": "Estimated entropy of the squashed policy, in nats, all action dimensions together.",
    "policy/alpha": "Entropy temperature.",
    "policy/std": "Mean standard deviation of the Gaussian before squashing.",
    "policy/action_mean": "Mean action in [-1, 1]; near -1 or 1 the policy is saturated.",
    "value/q_mean": "Mean value of the policy's actions, the smaller of the critics, in units of the scaled return.",
    "value/target_mean": "Mean of the critics' targets, in the same units.",
    "value/target_clipped": "Fraction of targets whose mean lies outside the critics' support.",
    "value/max_entropy_term": "Largest alpha log pi that was subtracted from a target, in the same units.",
    "replay/reward_scale": "What rewards are multiplied by before they enter a target.",
    "replay/transitions": "Rows of replay that can be sampled.",
    "norm/actor_linear_rows": "Largest relative distance of a weight row of the actor from norm 1; 0 up to rounding.",
    "norm/actor_batch_norm": "The same for the BatchNorm gains and shifts of the actor and their bound.",
    "norm/actor_rms_norm": "The same for the RMSNorm gains of the actor and their bound.",
    "norm/critic_linear_rows": "Largest relative distance of a weight row of the critics from norm 1.",
    "norm/critic_batch_norm": "The same for the BatchNorm gains and shifts of the critics and their bound.",
    "norm/critic_rms_norm": "The same for the RMSNorm gains of the critics and their bound.",
    "pace/move": "What replay_ratio=adaptive did at the end of a window: 1 up, 0 nothing, -1 down.",
    "pace/worse": "By how much the worst signal is worse than its reference (plateau: how far the signal moved).",
    "speed/env_steps_per_s": "Environment transitions per second of training since the last point.",
    "speed/updates_per_s": "Gradient updates per second of training since the last point.",
    **{
        f"speed/fraction_{name}": f"Fraction of the time since the last point spent {what}."
        for name, what in SECTIONS.items()
    },
}
"""Every stable scalar and what it means; names are ``section/quantity``."""

LAYOUT: dict[str, dict[str, list[str]]] = {
    "return": {
        "evaluation return": ["eval/return_mean"],
        "half of its 95 % interval": ["eval/return_ci95"],
        "return while exploring": ["train/return"],
        "episode length while exploring": ["train/length"],
    },
    "loss": {name: [f"loss/{name}"] for name in ("critic", "actor", "temperature")},
    "policy": {"entropy": ["policy/entropy"], "entropy temperature": ["policy/alpha"]},
    "value": {"values and targets": ["value/q_mean", "value/target_mean"]},
    "plasticity": {
        "probe: slower to learn than a fresh network above 1": ["plasticity/decisions/ratio$"],
        "effective rank": ["plasticity/(actor|critic)/[^/]+/effective_rank$"],
        "dormant units": ["plasticity/(actor|critic)/all/dormant$"],
        "angular speed of layers": ["plasticity/(actor|critic)/[^/]+/angular_speed$"],
        "weight norm": ["plasticity/(actor|critic)/all/weight_norm$"],
        "TD error held out, and its gap": ["plasticity/critic/all/held_out_td_(error|gap)$"],
    },
    "replay": {
        "replay ratio: asked for, and what happened": ["train/(replay_ratio|updates_per_transition)"],
        "how often a transition is trained on": ["train/samples_per_transition"],
    },
    "norm": {f"{network}: distance from the bounds": [f"norm/{network}_.*"] for network in ("actor", "critic")},
    "time": {
        "where the time goes": [f"speed/fraction_{name}" for name in SECTIONS],
        "budget used": ["train/budget_used"],
    },
}
"""Sections of TensorBoard's custom-scalars page, in their order: charts by heading, tags as regular expressions, which
TensorBoard holds against the beginnings of tags."""
SECTION_OF = {"train": "return", "eval": "return", "pace": "replay", "speed": "time"}
"""Where a scalar goes that `LAYOUT` does not name, if not into the section of its own name."""


class EvaluationRow(NamedTuple):
    """One row of ``eval.csv``; returns are undiscounted and unscaled, the interval is that of the mean return."""

    step: int
    updates: int
    episodes: int
    return_mean: float
    return_std: float
    return_ci95_low: float
    return_ci95_high: float
    length_mean: float

    @classmethod
    def of(cls, step: int, updates: int, result: Evaluation) -> EvaluationRow:
        """The row of an evaluation after ``step`` transitions and ``updates``."""
        low, high = result.ci95
        episodes, length = len(result.returns), float(np.mean(result.lengths))
        return cls(step, updates, episodes, result.mean, result.std, low, high, length)


class TimingRow(NamedTuple):
    """One row of ``timing.csv`` but for its first column, ``attempt``, which `Tracker` counts from 1.

    ``wall_seconds`` starts from zero in every attempt. ``train_seconds`` leaves evaluations out and goes on from the
    checkpoint that an attempt resumed from: it covers all attempts that led here. The fractions are of the time since
    the previous row, one for each of `SECTIONS`, and add up to 1.
    """

    step: int
    updates: int
    wall_seconds: float
    train_seconds: float
    fraction_env: float
    fraction_act: float
    fraction_learn: float
    fraction_store: float
    fraction_log: float
    fraction_evaluate: float
    fraction_checkpoint: float


class Tracker:
    """Writes to TensorBoard, the tables in a run's directory and services; usable as a context manager.

    Make it after the logs were cut back. Every writing method raises LogWriteError, in one sentence, when the disk is
    full or a permission is lost. The files then still end with a whole record, and what is missing is kept: it comes
    first, in its order, whenever something is written again.

    Args:
        directory: of the run.
        services: further writers, which are told what TensorBoard is.
        tensorboard: False: no events are written.

    Raises:
        ConfigurationError: a table in the directory has other columns.
        LogWriteError: the directory cannot be written.
    """

    def __init__(self, directory: Path, services: Sequence[Writer] = (), tensorboard: bool = True) -> None:
        self.directory = directory
        self._files = RecordFiles()
        self._evaluations = directory / "eval.csv"
        self._timings = directory / "timing.csv"
        self._findings = directory / "plasticity.jsonl"
        for path, columns in (
            (self._evaluations, EvaluationRow._fields),
            (self._timings, ("attempt", *TimingRow._fields)),
        ):
            _open_table(path, columns)
            self._files.add(path, b"")
        self._attempt = 1 + _last_attempt(self._timings)
        self._tensorboard = TensorBoard(directory, self._files, scalar_layout()) if tensorboard else None
        self._writers: list[Writer] = [*([self._tensorboard] if self._tensorboard else []), *services]
        self._files.write()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves at ``step`` environment transitions; `SCALARS` lists the stable names."""
        self._scalars(step, values)
        self._files.write()

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.scalars(step, values)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A text, such as TensorBoard's text tab shows."""
        self._text(tag, markdown, step)
        self._files.write()

    def _text(self, tag: str, markdown: str, step: int) -> None:
        for writer in self._writers:
            writer.text(tag, markdown, step)

    def hyperparameters(self, step: int, settings: Mapping[str, Any], metric: str) -> None:
        """What TensorBoard's HParams tab compares runs by; once, at the end of a run.

        Args:
            step: environment transitions so far.
            settings: the configuration by dotted key.
            metric: a scalar of `SCALARS`, whose last value is the run's result.
        """
        if self._tensorboard is not None:
            self._tensorboard.hyperparameters(step, settings, metric)
        self._files.write()

    def video(self, tag: str, film: Path, step: int) -> None:
        """A film.

        Args:
            tag: name of the series.
            film: a video file.
            step: environment transitions so far.
        """
        for writer in self._writers:
            writer.video(tag, film, step)
        self._files.write()

    def evaluation(self, row: EvaluationRow) -> None:
        """A row of ``eval.csv``, floats by ``repr`` and so bit-exact, and the two evaluation curves."""
        self._files.add(self._evaluations, _line(row))
        half_width = (row.return_ci95_high - row.return_ci95_low) / 2
        self._scalars(row.step, {"eval/return_mean": row.return_mean, "eval/return_ci95": half_width})
        self._files.write()

    def finding(self, step: int, record: Mapping[str, Any], scalars: Mapping[str, float], sentence: str) -> None:
        """A line of ``plasticity.jsonl`` and what of it is shown.

        Args:
            step: environment transitions so far; first in the line.
            record: what JSON can hold.
            scalars: points of curves.
            sentence: shown as text; empty where nothing was decided.
        """
        self._files.add(self._findings, json.dumps({"step": step, **record}, allow_nan=False).encode() + b"\n")
        if scalars:
            self._scalars(step, scalars)
        if sentence:
            self._text("plasticity/decisions", sentence, step)
        self._files.write()

    def histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Distributions of tensors' entries by name; nothing for none."""
        # copies: training changes the tensors in place, maybe before a service has taken them
        arrays = {name: tensor.detach().float().cpu().numpy().copy() for name, tensor in tensors.items()}
        if arrays:
            for writer in self._writers:
                writer.histograms(step, arrays)
        self._files.write()

    def last_evaluation(self) -> EvaluationRow | None:
        """The last row of ``eval.csv``, be it of an earlier attempt; None without any.

        Raises:
            LogWriteError: the table cannot be read.
        """
        with writing(self._evaluations):
            *_, last = self._evaluations.read_text(encoding="utf-8").splitlines()
        if last == ",".join(EvaluationRow._fields):
            return None
        cells = last.split(",")
        return EvaluationRow(*(int(cell) for cell in cells[:3]), *(float(cell) for cell in cells[3:]))

    def timing(self, row: TimingRow) -> None:
        """A row of ``timing.csv``, after the number of this attempt: one more than the largest found there before."""
        self._files.add(self._timings, _line((self._attempt, *row)))
        self._files.write()

    def flush(self) -> None:
        """Put everything so far on the disk, so that `RunDirectory.log_lengths` counts all of it."""
        self._files.sync()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self._writers:
            writer.close(completed=error is None)
        try:
            self._files.write()
        except LogWriteError:
            if error is None:  # else there is something more important to tell
                raise


def scalar_layout() -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's custom-scalars page: `LAYOUT`, and a chart of its own for every other scalar of `SCALARS`."""
    layout = {section: dict(charts) for section, charts in LAYOUT.items()}
    shown = [tag for charts in LAYOUT.values() for tags in charts.values() for tag in tags]
    for name in SCALARS:
        if not any(re.fullmatch(tag, name) for tag in shown):
            section, quantity = name.split("/", 1)
            layout.setdefault(SECTION_OF.get(section, section), {})[quantity.replace("_", " ")] = [name]
    return {
        section: {title: ["Multiline", list(tags)] for title, tags in charts.items()}
        for section, charts in layout.items()
    }


def _open_table(path: Path, columns: tuple[str, ...]) -> None:
    """Make the table, or check its header and drop a last row that a killed process left incomplete."""
    header = ",".join(columns)
    with writing(path):
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if not whole:
            path.write_text(header + "\n", encoding="utf-8")
        elif len(whole) < len(content):
            os.truncate(path, len(whole))
    found = whole.decode("utf-8", "replace").split("\n")[0]
    if whole and found != header:
        raise ConfigurationError(
            f"{path} has the columns '{found}'; expected '{header}': another version of rlplastic wrote it, so choose "
            "another run with name=… or fresh=true"
        )


def _last_attempt(timings: Path) -> int:
    """The largest number in the first column of ``timing.csv``; 0 without rows."""
    with writing(timings):
        _, *rows = timings.read_text(encoding="utf-8").splitlines()
    return max((int(row.partition(",")[0]) for row in rows), default=0)


def _line(row: tuple[float, ...]) -> bytes:
    cells = (str(int(value)) if isinstance(value, int | np.integer) else repr(float(value)) for value in row)
    return ",".join(cells).encode() + b"\n"
