"""`python -m rlplastic.export`: a run becomes verified files in one step, or nothing at all and exit code 5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import PENDULUM, run_of, sac_actor, save
from small_runs import SMALL

import rlplastic
from rlplastic.checkpoint import CheckpointStore
from rlplastic.command_line import run_verb
from rlplastic.deploy import OnnxPolicy
from rlplastic.errors import ExportError, NonFiniteError
from rlplastic.export import main
from rlplastic.exporting import build, verification
from rlplastic.policy import load_policy

FILES = ["golden.npz", "policy.json", "policy.onnx"]


@pytest.fixture(autouse=True)
def _no_time_is_spent_on_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "TIMED_CALLS", 3)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def entries(run: Path) -> set[str]:
    return {entry.name for entry in run.iterdir()}


def test_a_run_becomes_three_files_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(tmp_path / "run", PENDULUM)
    before = entries(run)
    assert run_verb(main, [f"run={run}", "episodes=2"]) == 0
    assert entries(run) == before | {"export"}
    assert sorted(contents(run / "export")) == FILES
    printed = capsys.readouterr().out
    assert "verification" in printed and "FAILED" not in printed
    assert "absent: joints, since no model file is known" in printed
    document = json.loads((run / "export" / "policy.json").read_text())
    assert document["schema_version"] == 1 and document["provenance"]["training_steps"] == 1000
    assert document["provenance"]["evaluation"]["episodes"] == 2
    assert document["provenance"]["configuration"]["env"]["task"] == "Pendulum-v1"
    assert document["action"]["box"] == {
        "scale": [2.0], "offset": [0.0], "low": [-2.0], "high": [2.0], "already_applied": True,
    }  # fmt: skip


def test_the_library_call_exports_plain_sac_and_torchscript(tmp_path: Path) -> None:
    run = save(tmp_path / "run", sac_actor(3, 1, layer_norm=True), PENDULUM)
    export = rlplastic.export_policy(run, episodes=2, with_torchscript=True)
    assert sorted(contents(export.path)) == [*FILES, "policy.pt"]
    assert {check.name: check.passed for check in export.checks}["policy.pt"] is True
    observation = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    expected = 2 * load_policy(run).act({"policy": observation})
    np.testing.assert_allclose(OnnxPolicy.load(export.path / "policy.onnx").act(observation), expected, atol=1e-5)


def test_exporting_again_gives_the_same_bytes(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", PENDULUM)
    first = contents(rlplastic.export_policy(run, episodes=2).path)
    again = contents(rlplastic.export_policy(run, episodes=2).path)
    assert first == again
    assert entries(run) == {"checkpoints", "config.yaml", "export"}


def test_a_failed_check_leaves_the_old_export_and_ends_with_code_5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path / "run", PENDULUM)
    rlplastic.export_policy(run, episodes=2)
    old = contents(run / "export")
    whole = build.fold

    def forgetful(actor: Any) -> Any:
        folded = whole(actor)
        return type(folded)(folded.observation_dim, folded.action_dim, folded.layers[1:])  # without the mean

    monkeypatch.setattr(build, "fold", forgetful)
    assert run_verb(main, [f"run={run}", "episodes=2"]) == ExportError.exit_code == 5
    captured = capsys.readouterr()
    assert "FAILED" in captured.out
    assert "is not the trained policy: real observations" in captured.err and captured.err.count("\n") == 1
    assert contents(run / "export") == old
    assert entries(run) == {"checkpoints", "config.yaml", "export"}


def test_an_actor_with_a_nan_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", PENDULUM)
    state = CheckpointStore.load(next((run / "checkpoints").glob("step_*"))).tensors("agent")
    state["actor.head.mean_bias"] = torch.tensor([float("nan")])
    CheckpointStore(run / "checkpoints", keep=1).save(2000, {"agent": state}, {})
    with pytest.raises(NonFiniteError):
        rlplastic.export_policy(run, episodes=2)
    assert entries(run) == {"checkpoints", "config.yaml"}


def test_an_export_that_was_set_aside_when_its_replacement_was_killed_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(tmp_path / "run", PENDULUM)
    old = contents(rlplastic.export_policy(run, episodes=2).path)
    (run / "export").rename(run / build.ASIDE)
    monkeypatch.setattr(build, "verify", lambda folder, original: [verification.Check("all", "bad", "good", False)])
    with pytest.raises(
        ExportError, match=r"is not the trained policy: all \(bad; expected good\); nothing was written"
    ):
        rlplastic.export_policy(run, episodes=2)
    assert contents(run / "export") == old
    assert entries(run) == {"checkpoints", "config.yaml", "export"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("run={folder}/none", "does not exist; expected a run directory"),
        ("run={folder} episodes=1", "episodes=1 gives no interval"),
        ("run={folder} episode=3", "did you mean 'episodes'?"),
        ("", "missing run=…"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(
    arguments: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb(main, arguments.format(folder=tmp_path).split()) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["flashsac", "sac"])
def test_a_trained_run_exports_with_the_evaluation_of_its_own_policy(agent: str, tmp_path: Path) -> None:
    result = rlplastic.train_agent([*SMALL, f"agent={agent}", f"runs={tmp_path}"])
    export = rlplastic.export_policy(result.path, episodes=3)
    assert all(check.passed is not False for check in export.checks)
    assert export.document.provenance.training_steps == 600
    evaluation = export.document.provenance.evaluation
    assert evaluation is not None and evaluation.ci95[0] <= evaluation.mean <= evaluation.ci95[1]
