"""The checker catches every breach of the contract, one deliberately broken environment each."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import SLOW_TASK, heeding, with_module

from rlplastic.command_line import run_verb
from rlplastic.envs import checker
from rlplastic.envs.base import AutoresetMode, Observation, Step, check_actions
from rlplastic.envs.checker import check
from rlplastic.terminal import standard_console

LIMIT = 9


class ToyEnv:
    """A random walk pushed by the action; ends by leaving [-6, 6] or after LIMIT steps. ``fault`` breaks one thing."""

    def __init__(self, seeds: list[int], mode: str = "next_step", fault: str = "") -> None:
        self.num_envs, self.fault = len(seeds), fault
        self.observation_dims = {"policy": 2}
        self.action_dim = 2
        self.action_low, self.action_high = np.array([-1.0, -2.0]), np.array([1.0, 5.0])
        self.autoreset = AutoresetMode(mode)
        self.max_episode_steps: int | None = LIMIT
        self.deterministic = fault != "honest"
        self.description = f"toy {mode} {fault}"
        used = [index for index, _ in enumerate(seeds)] if fault == "ignores seeds" else seeds
        used = [0] * len(seeds) if fault == "not random" else used
        self._rngs = [np.random.default_rng(seed) for seed in used]
        if fault in ("global noise", "honest"):
            self._rngs = [np.random.default_rng() for _ in seeds]
        self._place = np.zeros((self.num_envs, 2))
        self._age = np.zeros(self.num_envs, np.int64)
        self._done = np.zeros(self.num_envs, np.bool_)
        self._actions: Any = None
        self._closed = False
        if fault == "missing attribute":
            del self.max_episode_steps
        if fault == "text as limit":
            self.max_episode_steps = "9"  # type: ignore[assignment]
        if fault == "list of groups":
            self.observation_dims = [2]  # type: ignore[assignment]
        if fault == "infinite bounds":
            self.action_high = np.array([1.0, np.inf])
        if fault == "bounds shape":
            self.action_low = np.zeros(1)
        if fault == "unknown group":
            self.observation_dims = {"policy": 2, "pixels": 3}

    def _observe(self) -> Observation:
        place = self._place.astype(np.float64 if self.fault == "float64" else np.float32)
        if self.fault == "nan" and (self._age == 3).any():
            place[0, 1] = np.nan
        return {"policy": place[:, :1] if self.fault == "narrow" and (self._age == 2).any() else place}

    def _start(self, row: int) -> None:
        self._place[row] = 0.5 if self.fault == "not random" else self._rngs[row].uniform(-1, 1, 2)
        self._age[row] = 0

    def reset(self) -> Observation:
        for row in range(self.num_envs):
            self._start(row)
        self._done[:] = False
        return self._observe()

    def send(self, actions: Any) -> None:
        if self.fault == "takes NaN":
            check_actions(np.nan_to_num(actions), self.num_envs, self.action_dim)
        elif self.fault == "takes any shape" and actions.dtype == np.float32 and np.isfinite(actions).all():
            actions = np.zeros((self.num_envs, 2), np.float32)
        elif self.fault == "wrong error" and not np.isfinite(actions).all():
            raise ValueError("NaN")
        elif self.fault == "takes 1.5":
            check_actions(np.clip(actions, -1, 1), self.num_envs, self.action_dim)
        elif self.fault == "takes float64":
            check_actions(np.asarray(actions, np.float32), self.num_envs, self.action_dim)
        else:
            check_actions(actions, self.num_envs, self.action_dim)
        self._actions = np.nan_to_num(actions)

    def receive(self) -> Step:
        reward = np.zeros(self.num_envs, np.float32)
        terminated, truncated = np.zeros(self.num_envs, np.bool_), np.zeros(self.num_envs, np.bool_)
        declared_next = self.autoreset is AutoresetMode.NEXT_STEP
        for row in range(self.num_envs):
            if declared_next and self._done[row] and self.fault != "resets at once":
                self._start(row)
                self._done[row] = False
                if self.fault == "acts after the end":
                    self._place[row] += self._actions[row]
                if self.fault == "stale reward":
                    reward[row] = 3.0
                continue
            self._place[row] += self._actions[row] + 0.1
            self._age[row] += 1
            reward[row] = np.inf if self.fault == "infinite reward" and self._age[row] == 4 else self._place[row, 0]
            limit = LIMIT + (self.fault == "too long") - (self.fault == "too short")
            terminated[row] = np.abs(self._place[row]).max() > 6 and self.fault not in ("never ends", "too short")
            if self._age[row] >= limit and self.fault != "never ends":
                (terminated if self.fault == "limit as terminated" else truncated)[row] = True
        done = terminated | truncated
        info: dict[str, Any] = {}
        final = self._observe()
        self._done = done.copy()
        if not declared_next or self.fault == "resets at once":
            for row in np.flatnonzero(done):
                if self.fault != "returns the final one":
                    self._start(int(row))
            if done.any() and self.fault not in ("no final observation", "resets at once"):
                info["final_observation"] = {"policy": final["policy"][:1]} if self.fault == "short final" else final
        elif self.fault == "final observation in next_step" and done.any():
            info["final_observation"] = final
        observation = self._observe()
        if self.fault == "integer ends":
            return Step(observation, reward, terminated.astype(np.int64), truncated, info)  # type: ignore[arg-type]
        return Step(
            observation, reward[:, None] if self.fault == "column reward" else reward, terminated, truncated, info
        )

    def close(self) -> None:
        if self._closed and self.fault == "closes once":
            raise RuntimeError("already closed")
        self._closed = True


@pytest.mark.parametrize("mode", ["next_step", "same_step"])
def test_a_correct_environment_passes_every_check(mode: str) -> None:
    report = check(lambda seeds: ToyEnv(seeds, mode), steps=60)
    assert report.passed and {finding.status for finding in report.findings} == {"pass"}, report.findings


BROKEN = [
    ("missing attribute", "next_step", "attributes"),
    ("bounds shape", "next_step", "attributes"),
    ("unknown group", "next_step", "attributes"),
    ("text as limit", "next_step", "attributes"),
    ("list of groups", "next_step", "attributes"),
    ("float64", "next_step", "shapes"),
    ("narrow", "same_step", "shapes"),
    ("column reward", "next_step", "shapes"),
    ("integer ends", "next_step", "shapes"),
    ("nan", "next_step", "finite"),
    ("infinite reward", "same_step", "finite"),
    ("stale reward", "next_step", "autoreset"),
    ("acts after the end", "next_step", "autoreset"),
    ("resets at once", "next_step", "autoreset"),
    ("final observation in next_step", "next_step", "autoreset"),
    ("no final observation", "same_step", "autoreset"),
    ("returns the final one", "same_step", "autoreset"),
    ("short final", "same_step", "autoreset"),
    ("limit as terminated", "next_step", "time limit"),
    ("too long", "same_step", "time limit"),
    ("too short", "next_step", "time limit"),
    ("never ends", "next_step", "time limit"),
    ("global noise", "same_step", "determinism"),
    ("ignores seeds", "next_step", "seeds"),
    ("infinite bounds", "next_step", "actions"),
    ("takes NaN", "next_step", "actions"),
    ("takes 1.5", "next_step", "actions"),
    ("takes float64", "next_step", "actions"),
    ("takes any shape", "next_step", "actions"),
    ("wrong error", "next_step", "actions"),
    ("closes once", "next_step", "close"),
]


@pytest.mark.parametrize(("fault", "mode", "name"), BROKEN)
def test_every_breach_is_caught_by_the_check_named_for_it(fault: str, mode: str, name: str) -> None:
    report = check(lambda seeds: ToyEnv(seeds, mode, fault), steps=60)
    assert not report.passed
    assert report.status(name) == "fail", report.findings


def test_noise_that_ignores_the_seed_is_no_fault_of_the_autoreset() -> None:
    report = check(lambda seeds: ToyEnv(seeds, fault="global noise"), steps=60)
    assert [finding.name for finding in report.findings if finding.status == "fail"] == ["determinism"]


def test_what_cannot_be_judged_is_skipped_not_failed() -> None:
    report = check(lambda seeds: ToyEnv(seeds, fault="honest"), steps=60)
    assert report.passed and report.status("determinism") == "skip"
    report = check(lambda seeds: ToyEnv(seeds, fault="not random"), steps=60)
    assert report.passed and report.status("seeds") == "skip"
    report = check(lambda seeds: ToyEnv(seeds), steps=1)
    assert report.passed and report.status("autoreset") == report.status("time limit") == "skip"


def test_an_exception_while_stepping_is_reported_not_raised() -> None:
    class Failing(ToyEnv):
        def receive(self) -> Step:
            raise RuntimeError("the simulator died")

    made: list[Failing] = []
    report = check(lambda seeds: made.append(Failing(seeds)) or made[-1])
    assert report.status("shapes") == "fail" and "the simulator died" in report.findings[1].sentence
    assert all(envs._closed for envs in made), "its processes must not outlive the check"


def test_the_evidence_is_shown_as_it_is_brackets_and_all(capsys: pytest.CaptureFixture[str]) -> None:
    class Failing(ToyEnv):
        def receive(self) -> Step:
            raise RuntimeError("entry [1] of [/red] is wrong")

    report = check(lambda seeds: Failing(seeds, fault="[bold] move"))
    standard_console().print(report.table())
    shown = capsys.readouterr().out
    assert "toy next_step [bold] move" in shown and "[1]" in shown and "[/red]" in shown


def test_the_command_prints_a_table_and_leaves_with_0_or_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_verb(checker.main, ["env=pendulum", "num_envs=2", "threads=1"]) == 0
    shown = capsys.readouterr().out
    assert "Pendulum-v1" in shown and "pass" in shown and "fail" not in shown
    assert run_verb(checker.main, ["task=Pendulum-v1", "backend=gymnasium", "autoreset=disabled", "num_envs=2"]) == 0
    assert "same_step" in capsys.readouterr().out
    monkeypatch.setattr("rlplastic.envs.build_envs", lambda config, seeds: ToyEnv(seeds, fault="stale reward"))
    assert run_verb(checker.main, ["env=pendulum", "steps=60"]) == 2
    captured = capsys.readouterr()
    assert "fail" in captured.out
    assert captured.err == "error: Pendulum-v1 breaks the contract (autoreset); the table says what to mend\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_with_one_sentence_and_exit_code_130(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlplastic.envs.checker", "env=gymnasium", "task=slow_tasks:Slow-v0"]
    environment = with_module(tmp_path, "slow_tasks", SLOW_TASK)

    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeding(number)
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "started\n"
        process.send_signal(number)
        told = process.stderr.read()
    assert process.returncode == 130
    assert told == "error: interrupted before the end; rerun the command\n"  # there are no checkpoints to speak of


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["env=humanid"], "'humanoid'"),
        (["task=Ant-v6"], "'Ant-v5'"),
        (["tsk=Ant-v5"], "'task'"),
        (["Ant-v5"], "key=value"),
        (["env=ant", "steps=many"], "steps=many"),
        (["env=ant", "threads=many"], "many"),
        (["num_envs=2"], "task="),
        (["env=ant", "num_envs=0"], "num_envs=0 is out of range; expected an integer of at least 1"),
        (["env=ant", "seed=²"], "seed=² is out of range"),
        (["env=dmc"], "env.task=humanoid-run"),
        (["env=ant", "kwargs.frame_skp=2"], "'frame_skip'"),
    ],
)
def test_a_wrong_argument_gives_one_sentence_and_exit_code_2(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb(checker.main, arguments) == 2
    captured = capsys.readouterr()
    assert hint in captured.err and len(captured.err.splitlines()) == 1 and not captured.out
