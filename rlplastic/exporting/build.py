"""From a run directory to ``export/``: document, graph, golden numbers, verification, and the rename that publishes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch

from rlplastic.deploy.document import Document
from rlplastic.errors import ConfigurationError, ExportError
from rlplastic.evaluation import evaluate
from rlplastic.exporting.assemble import document_of
from rlplastic.exporting.fold import fold
from rlplastic.exporting.graph import metadata_of, onnx_model, torchscript
from rlplastic.exporting.proofs import real_observations
from rlplastic.exporting.task_facts import task_facts
from rlplastic.exporting.verification import DOCUMENT, GOLDEN, MODEL, ROWS, TORCHSCRIPT, Check, Original, Rows, verify
from rlplastic.policy import load_policy
from rlplastic.run_directory import remedy, sync_directory

GOLDEN_ROWS = 64
ASIDE = ".export.replaced"
"""Name of the old export between the two renames that replace it."""


@dataclass(frozen=True)
class Export:
    """A published export: its folder, its document, and every check that it passed."""

    path: Path
    document: Document
    checks: tuple[Check, ...]


def export_policy(
    run: str | Path,
    *,
    episodes: int = 10,
    with_torchscript: bool = False,
    report: Callable[[list[Check]], None] = lambda checks: None,
    warn: Callable[[str], None] = lambda sentence: None,
) -> Export:
    """Write ``<run>/export/``: policy.onnx, policy.json and golden.npz of the newest good checkpoint, verified.

    Args:
        run: the run directory.
        episodes: of the evaluation that goes into the document, and of the closed loop.
        with_torchscript: also write policy.pt.
        report: called with all checks, before a failure is raised.
        warn: called with a sentence for each damaged checkpoint that was passed over.

    Raises:
        ConfigurationError: fewer than two episodes, no such run, no checkpoint, or the folder cannot be written.
        CheckpointError: every checkpoint is damaged.
        NonFiniteError: the policy itself acts with a NaN.
        ExportError: a check failed; an older export is untouched.
    """
    if episodes < 2:
        raise ConfigurationError(f"episodes={episodes} gives no interval; expected a number of 2 or more")
    path = Path(run)
    policy = load_policy(path, warn=warn)
    if (path / ASIDE).exists() and not (path / "export").exists():  # an export was killed between its two renames
        (path / ASIDE).rename(path / "export")
    seed = policy.config.seed
    evaluation = evaluate(policy.act, policy.env, seed=seed, episodes=episodes)
    original = Original(policy, task_facts(policy.env), real_observations(policy, seed, ROWS // 2), evaluation, seed)
    document = document_of(policy, original.facts, evaluation, seed)
    staging = path / f".export.{os.getpid()}.staging"
    try:
        stage(staging, document, original, with_torchscript)
        checks = verify(staging, original)
        report(checks)
        failed = [check for check in checks if check.passed is False]
        if failed:
            raise ExportError(
                f"the export of {path} is not the trained policy: {failed[0].name} ({failed[0].measured}; expected "
                f"{failed[0].bound})"
                + (f" and {len(failed) - 1} more checks" if failed[1:] else "")
                + "; nothing was written"
            )
        _publish(staging, path / "export")
    except OSError as error:
        raise ConfigurationError(
            f"{path / 'export'} cannot be written ({error.strerror or error}); {remedy(error)} and export again"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Export(path / "export", document, tuple(checks))


def stage(folder: Path, document: Document, original: Original, with_torchscript: bool) -> None:
    """Write all files of the export into ``folder`` and flush them to the disk."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    folded = fold(original.policy.actor)
    onnx.save(onnx_model(folded, document.action.box, metadata_of(document)), folder / MODEL)
    (folder / DOCUMENT).write_text(document.to_json(), encoding="utf-8")
    obs, actions, raw_actions = _golden(original)
    np.savez(folder / GOLDEN, obs=obs, actions=actions, raw_actions=raw_actions)
    if with_torchscript:
        torchscript(folded, document.action.box).save(str(folder / TORCHSCRIPT))
    for file in folder.iterdir():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    sync_directory(folder)


def _golden(original: Original) -> tuple[Rows, Rows, Rows]:
    """Real rows and multiples of them, with the training actor's own outputs, computed in float64 and rounded."""
    real, box = original.real, original.facts.action.box
    rows = real[np.linspace(0, len(real) - 1, GOLDEN_ROWS).astype(int)].copy()
    rows[1::4] *= np.float32(2)
    rows[3::8] = 0
    actor = original.policy.actor
    parameters = {name: tensor.double() for name, tensor in actor.state_dict().items()}
    with torch.no_grad():
        mean, _ = torch.func.functional_call(actor, parameters, (torch.from_numpy(rows).double(),))
    raw = np.tanh(mean.numpy())
    actions = np.clip(raw * np.asarray(box.scale) + np.asarray(box.offset), box.low, box.high)
    return rows, actions.astype(np.float32), raw.astype(np.float32)


def _publish(staging: Path, final: Path) -> None:
    """Put the staged folder in place with renames only; until the second one the old export is beside it, whole."""
    aside = final.with_name(ASIDE)
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    staging.rename(final)
    sync_directory(final.parent)
    shutil.rmtree(aside, ignore_errors=True)
