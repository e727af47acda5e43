"""The loop's two contracts: equal seeds give equal bits, and a resumed run equals one that was never stopped."""

from __future__ import annotations

import os
import pty
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from small_runs import SMALL, command, final_state, heeding, run

from rlplastic import session, train_agent
from rlplastic.command_line import run_verb
from rlplastic.errors import ConfigurationError
from rlplastic.kernels._triton import interpreted
from rlplastic.loop import stop_signals
from rlplastic.replay import ReplayRing, Sampler


def trained(folder: Path, *overrides: str) -> dict[str, object]:
    train_agent([*SMALL, f"runs={folder}", "name=run", *overrides], quiet=True)
    return final_state(folder / "run")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The state that an uninterrupted run of `SMALL` ends in."""
    return trained(tmp_path_factory.mktemp("reference"))


def test_the_same_command_gives_the_same_bits(tmp_path: Path, reference: dict[str, object]) -> None:
    assert trained(tmp_path) == reference


def test_another_seed_gives_other_bits(tmp_path: Path, reference: dict[str, object]) -> None:
    state = trained(tmp_path, "seed=1")
    assert state["agent.actor.head.mean.weight"] != reference["agent.actor.head.mean.weight"]
    assert state["replay"] != reference["replay"]


def test_saving_logging_and_evaluating_leave_the_run_unchanged(tmp_path: Path, reference: dict[str, object]) -> None:
    often = trained(tmp_path / "often", "checkpoint.every=4", "tracking.every=4", "evaluation.every=100")
    never = trained(tmp_path / "never", "checkpoint.every=100000", "tracking.every=100000", "evaluation.every=0")

    def learned(state: dict[str, object]) -> dict[str, object]:
        """Without what depends on cadences by design: the rows of eval.csv and the means since the last log."""
        return {name: value for name, value in state.items() if name != "eval.csv" and "metrics" not in name}

    assert learned(often).items() >= {k: v for k, v in learned(reference).items() if "finished" not in k}.items()
    assert {k: v for k, v in learned(never).items() if "finished" not in k}.items() <= learned(often).items()


def test_stopping_at_half_the_budget_and_going_on_equals_never_stopping(
    tmp_path: Path, reference: dict[str, object]
) -> None:
    first = trained(tmp_path, "env_steps=300", "schedule=horizon", "schedule.horizon=1000")
    assert first["progress"]["transitions"] == 300  # type: ignore[index]
    resumed = trained(tmp_path, "env_steps=600", "schedule=horizon", "schedule.horizon=1000")
    whole = trained(tmp_path / "whole", "schedule=horizon", "schedule.horizon=1000")
    # The first half ended with an evaluation of its own.
    rows = str(resumed.pop("eval.csv")).splitlines()
    assert [row for row in rows if not row.startswith("300,")] == str(whole.pop("eval.csv")).splitlines()
    assert resumed == whole


@pytest.mark.parametrize(
    "options",
    [
        ["replay.holdout=0.4", "agent.n_step=3", "replay.observation_dtype=bfloat16"],
        ["replay.prioritised=true", "replay.holdout=0.4"],
        ["replay.half_life=100", "replay.observation_dtype=int8"],
        ["overlap=false"],
        ["agent=sac", "agent.layer_norm=true", "agent.weight_decay=0.01", "replay.prioritised=true"],
        ["critic=flow", "critic.steps=2", "critic.noises=2", "agent.n_step=3", "replay.prioritised=true"],
        [
            "agent=sac",
            "critic=flow",
            "critic.steps=2",
            "critic.noises=2",
            "critic.noise=bank",
            "critic.target_noise=0.5",
        ],
    ],
    ids=["held-out episodes", "priorities", "recency", "one after the other", "plain SAC", "flow", "flow of plain SAC"],
)
def test_other_ways_to_draw_and_to_step_resume_bit_for_bit_too(tmp_path: Path, options: list[str]) -> None:
    options = [*options, "schedule=horizon", "schedule.horizon=1000", "evaluation.every=0"]
    trained(tmp_path / "halves", "env_steps=300", *options)
    halves, whole = trained(tmp_path / "halves", *options), trained(tmp_path / "whole", *options)
    halves.pop("eval.csv"), whole.pop("eval.csv")
    assert halves == whole


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_training_is_bit_identical_whatever_kernels_write_and_sample_the_replay(
    tmp_path: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU a run takes the numpy path; here it takes the reference, and Triton's interpreter."""
    if kernels == "triton" and not interpreted():
        pytest.skip("needs TRITON_INTERPRET=1")
    short = ["env_steps=260", "evaluation.every=0", "agent.n_step=3", "replay.holdout=0.3"]
    usual = trained(tmp_path / "usual", *short)
    monkeypatch.setattr(session, "ReplayRing", lambda *a, **o: ReplayRing(*a, **(o | {"kernels": kernels})))
    monkeypatch.setattr(session, "Sampler", lambda *a, **o: Sampler(*a, **(o | {"kernels": kernels})))
    assert trained(tmp_path / "other", *short) == usual


def test_rerunning_a_finished_run_says_so_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = train_agent([*SMALL, f"runs={tmp_path}", "name=run"], quiet=True)
    before = final_state(tmp_path / "run")
    result = train_agent([*SMALL, f"runs={tmp_path}", "name=run"])
    assert "is finished at step 600, evaluated at" in capsys.readouterr().out
    assert result.transitions == 600 and first.evaluation is not None and result.evaluation is not None
    assert result.evaluation.returns.tolist() == first.evaluation.returns.tolist()
    assert result.evaluation.ci95 == first.evaluation.ci95
    assert final_state(tmp_path / "run") == before


def test_a_damaged_checkpoint_is_named_and_the_previous_one_is_used(
    tmp_path: Path, reference: dict[str, object], capsys: pytest.CaptureFixture
) -> None:
    trained(tmp_path)
    newest = max((tmp_path / "run" / "checkpoints").glob("step_*"))
    content = bytearray((newest / "agent.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "agent.safetensors").write_bytes(content)
    train_agent([*SMALL, f"runs={tmp_path}", "name=run"])
    assert "skipped a damaged checkpoint" in capsys.readouterr().err
    assert final_state(tmp_path / "run") == reference


def test_fresh_episodes_are_started_on_request_and_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train_agent([*SMALL, f"runs={tmp_path}", "name=run", "env_steps=300"], quiet=True)
    train_agent([*SMALL, f"runs={tmp_path}", "name=run", "resume=fresh"])
    assert "this resume is not exact: resume=fresh was asked for" in capsys.readouterr().err
    assert final_state(tmp_path / "run")["progress"]["transitions"] >= 600  # type: ignore[index,operator]


def test_another_configuration_under_the_same_name_is_refused_with_the_difference(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"replay\.batch_size.*16.*32"):
        train_agent([*SMALL, f"runs={tmp_path}", "name=run", "replay.batch_size=32"], quiet=True)
    train_agent([*SMALL, f"runs={tmp_path}", "name=run", "replay.batch_size=32", "fresh=true"], quiet=True)
    assert (tmp_path / "run.old-1" / "checkpoints").is_dir()


def test_another_machine_is_refused_unless_accepted(tmp_path: Path) -> None:
    train_agent([*SMALL, f"runs={tmp_path}", "name=run", "env_steps=300"], quiet=True)
    file = tmp_path / "run" / "machine.json"
    file.write_text(file.read_text().replace('"torch": "', '"torch": "0.'))
    with pytest.raises(ConfigurationError, match="accept_machine=true"):
        train_agent([*SMALL, f"runs={tmp_path}", "name=run"], quiet=True)
    train_agent([*SMALL, f"runs={tmp_path}", "name=run", "accept_machine=true"], quiet=True)


def killed_until_done(folder: Path, signals: list[signal.Signals], seed: int) -> list[int]:
    """Start the run again and again, stopping it at random moments; then let it end. Returns the exit codes."""
    rng, codes = random.Random(seed), []
    arguments = [*SMALL, f"runs={folder}", "name=run", "checkpoint.every=40"]
    for number in signals:
        process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout is not None
        for line in process.stdout:  # the banner shows that training starts
            if line.startswith("replay_ratio"):
                break
        time.sleep(rng.uniform(0.0, 1.5))
        process.send_signal(number)
        printed = process.stdout.read()
        code = process.wait(timeout=120)
        process.stdout.close()
        # The interpreter's own teardown, after all is saved and said, is the one moment that SIGTERM may cut short.
        codes.append(0 if code == -signal.SIGTERM and "checkpoint: " in printed else code)
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return codes


def test_a_run_that_was_killed_and_resumed_equals_one_that_was_not(
    tmp_path: Path, reference: dict[str, object]
) -> None:
    codes = killed_until_done(tmp_path, [signal.SIGKILL, signal.SIGTERM], seed=0)
    assert set(codes) <= {-signal.SIGKILL, 130, 0}
    assert final_state(tmp_path / "run") == reference


def test_a_run_that_is_terminated_while_it_sets_up_says_so_and_exits_130(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(*SMALL, f"runs={tmp_path}", "name=run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (tmp_path / "run" / "config.yaml").exists():
        time.sleep(0.005)
    process.terminate()
    _, complaint = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted" in complaint and "rerun" in complaint


def test_a_run_whose_terminal_closes_saves_and_exits_130(tmp_path: Path) -> None:
    """All the way: a session on a pseudo-terminal, whose other end is closed."""
    arguments = [*SMALL, "env_steps=1000000", "checkpoint.every=1000000", f"runs={tmp_path}", "name=run"]
    outer, inner = pty.openpty()
    heed = heeding(signal.SIGHUP)
    process = subprocess.Popen(
        command(*arguments), stdin=inner, stdout=inner, stderr=inner, start_new_session=True, preexec_fn=heed
    )
    os.close(inner)
    # A row below the header, which only training writes: the banner speaks of learning before there is a thing to save.
    timing = tmp_path / "run" / "timing.csv"
    while not timing.exists() or timing.read_text().count("\n") < 2:
        os.read(outer, 4096)
    os.close(outer)
    process.send_signal(signal.SIGHUP)
    try:
        assert process.wait(timeout=120) == 130
    finally:
        process.kill()
    assert len(list((tmp_path / "run" / "checkpoints").glob("step_*"))) == 1


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_asks_the_loop_to_stop_and_only_a_lost_terminal_may_say_so_twice(name: str) -> None:
    number = signal.Signals[name]
    received: list[int] = []
    before = signal.signal(number, lambda *_: received.append(number))
    try:
        with stop_signals() as stop:
            assert not stop.is_set()
            signal.raise_signal(number)
            assert stop.is_set() and received == []
            signal.raise_signal(number)
            assert len(received) == (0 if name == "SIGHUP" else 1)
        received.clear()
        signal.raise_signal(number)
        assert len(received) == 1
    finally:
        signal.signal(number, before)


def test_a_run_under_nohup_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run_verb(lambda arguments: signal.raise_signal(signal.SIGHUP), []) == 0
        with stop_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_set()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.mark.slow
def test_ten_kills_and_five_terminations_at_random_moments_change_nothing(
    tmp_path: Path, reference: dict[str, object]
) -> None:
    for attempt in range(3):
        signals = [signal.SIGKILL] * 10 + [signal.SIGTERM] * 5
        random.Random(attempt).shuffle(signals)
        killed_until_done(tmp_path / str(attempt), signals, seed=attempt)
        assert final_state(tmp_path / str(attempt) / "run") == reference


@pytest.mark.slow
def test_a_compiled_run_in_bfloat16_resumes_bit_for_bit_too(tmp_path: Path) -> None:
    fast = ["compile=on", "precision=bf16", "schedule=horizon", "schedule.horizon=1000", "evaluation.every=0"]
    trained(tmp_path / "halves", *fast, "env_steps=300")
    halves, whole = trained(tmp_path / "halves", *fast), trained(tmp_path / "whole", *fast)
    halves.pop("eval.csv"), whole.pop("eval.csv")
    assert halves == whole
