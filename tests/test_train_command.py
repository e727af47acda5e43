"""`python -m rlplastic.train` as a user types it: exit codes, one-sentence errors, and what is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from small_runs import SLOW_TASK, SMALL, command, run, with_module

from rlplastic import train_agent
from rlplastic.command_line import parse, run_verb
from rlplastic.errors import (
    CheckpointError,
    CheckpointWriteError,
    ConfigurationError,
    NonFiniteError,
    OutOfMemoryError,
)
from rlplastic.evaluate import main as evaluate_main
from rlplastic.train import main


def refused(*overrides: str) -> str:
    """The error of a training that must be refused, without the cost of a new process."""
    with pytest.raises(ConfigurationError) as caught:
        main(overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_error_is_one_sentence_on_stderr_and_exit_code_2(tmp_path: Path) -> None:
    result = run("env=humanod", f"runs={tmp_path}")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: env=humanod is not a choice of env; did you mean 'humanoid'")
    assert len(result.stderr.splitlines()) == 1


def test_every_error_class_has_its_documented_exit_code(capsys: pytest.CaptureFixture) -> None:
    for error, code in {
        ConfigurationError("x"): 2,
        NonFiniteError("x"): 3,
        CheckpointError("x"): 4,
        CheckpointWriteError("x"): 1,
    }.items():

        def verb(arguments: object, error: Exception = error) -> None:
            raise error

        assert run_verb(verb, []) == code
        assert capsys.readouterr().err == "error: x\n"


def test_unknown_environments_are_refused_with_the_nearest_names(tmp_path: Path) -> None:
    where = f"runs={tmp_path}"
    assert "Hopper-v5" in refused("env=mujoco", "env.task=Hoper-v5", "preset=debug", where)
    assert "humanoid-run" in refused("env=dmc", "env.task=humanoid-rum", "preset=debug", where)
    assert "CartPole" in refused("env=gymnasium", "env.task=CartPol-v1", "preset=debug", where)


def test_an_environment_without_continuous_actions_is_refused(tmp_path: Path) -> None:
    message = refused("env=gymnasium", "env.task=CartPole-v1", "preset=debug", f"runs={tmp_path}")
    assert "Discrete" in message


def test_an_unwritable_run_directory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    assert "cannot be written" in refused(*SMALL, f"runs={file}")


def test_a_replay_that_does_not_fit_is_refused_with_the_largest_that_does(tmp_path: Path) -> None:
    overrides = ["env=humanoid", "preset=debug", "replay.capacity=1000000000", f"runs={tmp_path}"]
    assert "set replay.capacity to at most" in refused(*overrides)


def test_a_run_directory_in_use_is_refused_and_names_the_other_process(tmp_path: Path) -> None:
    arguments = [*SMALL, "env_steps=100000", f"runs={tmp_path}", "name=run"]
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the banner comes after the lock
        assert f"is in use by process {process.pid}" in refused(*arguments)
        process.terminate()
        process.stdout.read()
    assert process.returncode in (130, -15)


def test_a_checkpoint_of_another_version_ends_with_exit_code_4(tmp_path: Path) -> None:
    from rlplastic import checkpoint_format

    train_agent([*SMALL, "env_steps=300", f"runs={tmp_path}", "name=run"], quiet=True)
    for manifest in (tmp_path / "run" / "checkpoints").glob("step_*/manifest.json"):
        document = checkpoint_format.read_manifest(manifest.parent)
        manifest.write_bytes(checkpoint_format.render_manifest({**document, "format": 999}))
    result = run(*SMALL, f"runs={tmp_path}", "name=run")
    assert result.returncode == 4
    assert "999" in result.stderr


def test_state_that_an_older_version_did_not_save_is_told_as_a_checkpoint_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlplastic.agents.flashsac.exploration import HeldNoise

    train_agent([*SMALL, "env_steps=300", f"runs={tmp_path}", "name=run"], quiet=True)
    monkeypatch.setattr(HeldNoise, "load_state_dict", lambda noise, state: state["what came later"])
    with pytest.raises(CheckpointError, match=r"does not fit this version .*what came later.*fresh=true"):
        train_agent([*SMALL, "env_steps=400", f"runs={tmp_path}", "name=run"], quiet=True)


def test_a_full_disk_while_saving_costs_nothing_that_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from rlplastic import checkpoint

    real, calls = checkpoint.write_hashed, []

    def full(path: Path, pieces: object) -> tuple[int, str]:
        calls.append(path)
        if 8 < len(calls) < 11:
            raise OSError(28, "No space left on device")
        return real(path, pieces)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "write_hashed", full)
    result = train_agent([*SMALL, f"runs={tmp_path}", "name=run"])
    warnings = capsys.readouterr().err.splitlines()
    assert warnings and all(warning.startswith("warning: checkpoint") for warning in warnings)
    advice = "free space on the disk before the next save, or before rerunning the command"
    assert all(warning.endswith(advice) for warning in warnings), "the run goes on: nothing need be rerun"
    assert result.transitions == 600


class Poisoned(gymnasium.Env):
    """Ordinary until its 50th step, which returns a NaN."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, where: str = "observation") -> None:
        self.where, self.steps = where, 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        return np.zeros(2, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        bad = float("nan") if self.steps == 50 else 0.0
        observation = np.full(2, bad if self.where == "observation" else 0.0, np.float32)
        return observation, bad if self.where == "reward" else 0.0, False, self.steps % 20 == 0, {}


@pytest.mark.parametrize("where", ["observation", "reward"])
def test_a_nan_from_the_environment_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path, where: str) -> None:
    if "Poisoned-v0" not in gymnasium.registry:
        gymnasium.register("Poisoned-v0", entry_point=Poisoned)
    overrides = [o for o in SMALL if not o.startswith(("env=", "evaluation.every"))]
    overrides += ["env=gymnasium", "env.task=Poisoned-v0", f"env.kwargs.where={where}", "evaluation.every=0"]
    with pytest.raises(NonFiniteError, match=f"{where}.*is not finite at step 1[0-9][0-9]"):
        train_agent([*overrides, f"runs={tmp_path}", "name=run"], quiet=True)
    assert (tmp_path / "run" / "checkpoints" / "step_000000000100").is_dir()
    assert list((tmp_path / "run").glob("non_finite_*/transitions.safetensors"))


def test_evaluating_what_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere"):
        evaluate_main([f"run={tmp_path / 'nowhere'}"])
    with pytest.raises(ConfigurationError, match="missing run="):
        evaluate_main([])
    with pytest.raises(ConfigurationError, match="did you mean 'episodes'"):
        evaluate_main(["run=x", "episode=3"])


def test_verbs_without_hydra_check_types() -> None:
    from dataclasses import dataclass

    @dataclass
    class Arguments:
        count: int = 3

    assert parse(["count=5"], Arguments, "verb").count == 5
    with pytest.raises(ConfigurationError, match="count=many was refused"):
        parse(["count=many"], Arguments, "verb")


def test_the_default_name_tells_runs_apart() -> None:
    from rlplastic.training import name_of

    assert name_of([], 0) == "humanoid_flashsac_seed0"
    assert name_of(["env=hopper", "seed=3", "env_steps=500", "tracking.every=5"], 3) == "hopper_flashsac_seed3"
    assert "dog-run" in name_of(["env=dmc", "env.task=dog-run"], 0)


def test_a_sweep_trains_every_combination_in_directories_of_their_own(tmp_path: Path) -> None:
    sweep = [o for o in SMALL if not o.startswith("env_steps")] + ["env_steps=240", "evaluation.every=0"]
    result = run("-m", *sweep, "seed=0,1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    runs = sorted(path.name for path in (tmp_path / "runs").glob("pendulum*"))
    assert len(runs) == 2 and "seed0" in runs[0] and "seed1" in runs[1]
    assert all((tmp_path / "runs" / name / "eval.csv").is_file() for name in runs)
    assert not os.path.exists(tmp_path / "multirun")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("-m ~agent", "'~agent' would leave out a part that every run needs; expected key=value, which sets it"),
        ("preset=debug -m ~agent env=ant", "'~agent' would leave out a part"),
        ("-m env", "'env' is not of the form key=value; for example env=hopper"),
        ("-m env=", "env= is not a choice of env; valid names: acrobot_swingup"),
        ("-m env=hopper,nope", "env=nope is not a choice of env; did you mean 'hopper'?"),
        ("-m hydra/launcher=nope", "is not a choice of hydra/launcher; valid names: basic"),
        ("-m seed=range(", "'seed=range(' cannot be read as an override"),
        ("--nonsense", "unrecognized arguments: --nonsense; expected key=value, -m (a sweep)"),
        ("--cfg nope", "invalid choice: 'nope' (choose from"),
        ("env=ant --multirun=3", "ignored explicit argument '3'; expected key=value, -m (a sweep)"),
        (
            "-m --config-dir=elsewhere",
            "config_dir=elsewhere is no folder; expected one with files such as agent/*.yaml",
        ),
        ("-m --experimental-rerun job.pickle", "--experimental-rerun does not go with"),
        ("--resolve", "--resolve only changes what --cfg prints"),
    ],
)
def test_a_misused_sweep_is_refused_in_one_sentence_of_our_own(
    arguments: str,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)  # Hydra writes multirun.yaml before it looks at the choices
    monkeypatch.setattr("sys.argv", ["train"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    assert sentence in refused(*arguments.split())
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("poisoned", "culprit"), [("parameter", "action"), ("reward scale", "loss/critic"), ("buffer", "learner's state")]
)
def test_a_nan_inside_the_learner_is_named_and_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, poisoned: str, culprit: str
) -> None:
    import torch

    from rlplastic.agents.flashsac import FlashSAC

    real = FlashSAC.update

    def update(self: FlashSAC, batch: object, budget_used: float) -> dict[str, torch.Tensor]:
        metrics = real(self, batch, budget_used)  # type: ignore[arg-type]
        if self.updates == 20:
            with torch.no_grad():
                if poisoned == "parameter":
                    self.learner.actor.head.mean_bias.fill_(torch.nan)
                elif poisoned == "reward scale":
                    self._scaler._squares = float("nan")
                    self.observe = lambda step, valid: None  # type: ignore[method-assign]
                else:
                    self.learner.target_critic.trunk.input_norm.running_mean.fill_(torch.inf)
        return metrics

    monkeypatch.setattr(FlashSAC, "update", update)
    with pytest.raises(NonFiniteError, match=culprit):
        train_agent([*SMALL, f"runs={tmp_path}", "name=run"], quiet=True)
    newest = max((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert int(newest.name.removeprefix("step_")) <= 300
    monkeypatch.setattr(FlashSAC, "update", real)
    assert train_agent([*SMALL, f"runs={tmp_path}", "name=run"], quiet=True).transitions == 600


OUT_OF_MEMORY = [
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes. Error code 12",
    "CUDA out of memory. Tried to allocate 20.00 MiB.",
    "",
]


@pytest.mark.parametrize("said", OUT_OF_MEMORY)
def test_memory_that_runs_out_while_learning_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    import torch

    from rlplastic.agents.flashsac import FlashSAC

    real = FlashSAC.update

    def update(self: FlashSAC, batch: object, budget_used: float) -> dict[str, torch.Tensor]:
        if self.updates == 20:
            raise RuntimeError(said) if said else MemoryError
        return real(self, batch, budget_used)  # type: ignore[arg-type]

    arguments = [*SMALL, "evaluation.every=0", f"runs={tmp_path}", "name=run"]
    monkeypatch.setattr(FlashSAC, "update", update)
    with pytest.raises(OutOfMemoryError, match="rerun the command, which goes on from the last checkpoint") as caught:
        train_agent(arguments, quiet=True)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))
    monkeypatch.setattr(FlashSAC, "update", real)
    assert train_agent(arguments, quiet=True).transitions == 600


def test_memory_that_runs_out_while_setting_up_leaves_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*arguments: object, **options: object) -> None:
        np.empty(2**60, np.uint8)

    monkeypatch.setattr("rlplastic.training.make_agent", too_large)
    with pytest.raises(OutOfMemoryError, match=r"another 1.00 EiB: .* a smaller replay.capacity"):
        train_agent([*SMALL, f"runs={tmp_path / 'runs'}"], quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_names_outside_the_folder_of_runs_are_refused(tmp_path: Path) -> None:
    assert "is not a name inside the folder" in refused(*SMALL, f"runs={tmp_path}", "name=/elsewhere")


def test_a_version_that_gymnasium_dropped_is_refused_in_one_sentence(tmp_path: Path) -> None:
    assert "cannot be made" in refused("env=gymnasium", "env.task=HalfCheetah-v2", "preset=debug", f"runs={tmp_path}")


def test_an_interrupted_fresh_run_says_how_to_resume(tmp_path: Path) -> None:
    arguments = [*SMALL, "env_steps=100000", f"runs={tmp_path}", "name=run", "fresh=true"]
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        while not process.stdout.readline().startswith("step "):
            pass
        process.terminate()
        process.stdout.read()
        assert "rerun without fresh=true to resume" in process.stderr.read()
    assert process.returncode == 130


def test_a_run_interrupted_while_it_sets_up_says_what_is_left(tmp_path: Path) -> None:
    arguments = [*SMALL, "env=gymnasium", "env.task=slow_tasks:Slow-v0", f"runs={tmp_path}", "name=run"]
    environment = with_module(tmp_path, "slow_tasks", SLOW_TASK)
    with subprocess.Popen(
        command(*arguments), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "started\n"
        process.terminate()
        told = process.stderr.read()
    assert process.returncode == 130
    assert told == ("error: interrupted at once; the last checkpoint, if any, is in place: rerun without fresh=true\n")


@pytest.mark.parametrize("agent", ["flashsac", "sac"])
def test_a_policy_needs_no_replay_beside_it(tmp_path: Path, agent: str) -> None:
    import shutil

    from rlplastic import load_policy

    train_agent([*SMALL, f"agent={agent}", "env_steps=300", f"runs={tmp_path}", "name=run"], quiet=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "segments")
    evaluate_main([f"run={tmp_path / 'run'}", "episodes=1"])
    assert (tmp_path / "run" / "evaluation.json").is_file()
    policy = load_policy(tmp_path / "run")
    assert policy.act({"policy": np.zeros((2, 3))}).shape == (2, 1)  # type: ignore[dict-item]
    with pytest.raises(ConfigurationError, match="without the group 'policy'"):
        policy.act({"obs": np.zeros((2, 3), np.float32)})


def test_refused_commands_leave_no_directories(tmp_path: Path) -> None:
    where = [f"runs={tmp_path / 'runs'}", "preset=debug"]
    refused("env=gymnasium", "env.task=CartPole-v1", *where)
    refused("env=gymnasium", "env.task=HalfCheeta-v5", *where)
    refused("env=pendulum", "init_from=-nope", *where)
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path) -> None:
    arguments = [*SMALL, f"runs={tmp_path}", "name=run", "evaluation.every=0"]
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0
    assert (tmp_path / "run" / "checkpoints" / "step_000000000600").is_dir()


def test_the_sections_of_a_profile_add_up_to_all_of_the_wall_time(tmp_path: Path) -> None:
    began = time.perf_counter()
    result = run(*SMALL, f"runs={tmp_path}", "name=run", "profile=true")
    wall = time.perf_counter() - began
    assert result.returncode == 0, result.stderr
    profile = json.loads((tmp_path / "run" / "profile.json").read_text())
    parts = profile["sections"]
    assert sum(part["seconds"] for part in parts.values()) == pytest.approx(profile["wall_seconds"])
    assert sum(part["fraction"] for part in parts.values()) == pytest.approx(1)
    # What is missing is the interpreter's own end, and what it took this process to start the other.
    assert 0.8 * wall - 0.5 < profile["wall_seconds"] <= wall + 0.02
    assert {"start", "act", "env", "store", "sample", "update", "evaluate", "checkpoint", "finish"} <= set(parts)
    told = [line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")]
    assert told[-len(parts) :] == list(parts)
