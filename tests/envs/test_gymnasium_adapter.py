"""The gymnasium adapter, checked by counting: the environment's observation is (episode, step, action)."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest
from gymnasium import spaces
from small_runs import with_module

from rlplastic.envs.base import AutoresetMode, VectorEnv, step
from rlplastic.envs.gymnasium_adapter import GymnasiumEnv, _without_deprecations
from rlplastic.errors import ConfigurationError, EnvironmentContractError, NonFiniteError

Factory = Callable[..., Callable[[], Any]]
SEEDS = [0, 1, 2]
ACTION = np.array([[-1, 0], [0, 0], [1, 0]], np.float32)
ECHO = [-2.0, 1.0, 4.0]  # the same, mapped to [-2, 4]


def _expected(seed: int, echo: float, lengths: tuple[int, ...], next_step: bool, rows: int) -> list[dict[str, Any]]:
    """What one environment must return, row by row, by counting."""
    table: list[dict[str, Any]] = []
    episode, count, ended = 0, 0, False
    while len(table) < rows:
        if next_step and ended:
            episode, count, ended = episode + 1, 0, False
            table.append(
                {"place": (episode, 0, 0.0), "reward": 0.0, "terminated": False, "truncated": False, "final": None}
            )
            continue
        count += 1
        ended = count == lengths[(seed + episode) % 4]
        row: dict[str, Any] = {"place": (episode, count, echo), "reward": 100.0 * episode + count, "final": None}
        row |= {"terminated": ended and episode % 2 == 0, "truncated": ended and episode % 2 == 1}
        if ended and not next_step:
            row["final"] = row["place"]
            episode, count = episode + 1, 0
            row["place"] = (episode, 0, 0.0)
        table.append(row)
    return table


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("autoreset", ["next_step", "same_step", "disabled"])
def test_every_row_of_every_autoreset_mode_is_the_one_counting_predicts(
    autoreset: str, vectorization: str, counting_env: Factory, lengths: tuple[int, ...]
) -> None:
    envs = GymnasiumEnv.from_factory(counting_env(), 3, SEEDS, vectorization, autoreset)
    assert isinstance(envs, VectorEnv)
    assert envs.autoreset is (AutoresetMode.NEXT_STEP if autoreset == "next_step" else AutoresetMode.SAME_STEP)
    tables = [
        _expected(seed, echo, lengths, autoreset == "next_step", 25) for seed, echo in zip(SEEDS, ECHO, strict=True)
    ]
    np.testing.assert_array_equal(envs.reset()["policy"], np.zeros((3, 3), np.float32))
    finals = 0
    for time in range(25):
        result = step(envs, ACTION)
        for row in range(3):
            want = tables[row][time]
            assert tuple(result.observation["policy"][row]) == want["place"], (time, row)
            assert result.reward[row] == want["reward"]
            assert result.terminated[row] == want["terminated"]
            assert result.truncated[row] == want["truncated"]
            if want["final"] is not None:
                finals += 1
                final = result.info["final_observation"]["policy"]
                assert final.dtype == np.float32 and final.shape == (3, 3)
                assert tuple(final[row]) == want["final"]
        if autoreset == "next_step":
            assert "final_observation" not in result.info
        assert result.reward.dtype == np.float32 and result.terminated.dtype == np.bool_
    assert finals > 20 or autoreset == "next_step"
    envs.close()
    envs.close()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("autoreset", ["next_step", "same_step", "disabled"])
@pytest.mark.parametrize("form", ["dict", "privileged"])
def test_dictionary_observations_carry_the_same_numbers_as_flat_ones(
    form: str, autoreset: str, vectorization: str, counting_env: Factory
) -> None:
    flat = GymnasiumEnv.from_factory(counting_env(), 3, SEEDS, "sync", autoreset)
    other = GymnasiumEnv.from_factory(counting_env(form), 3, SEEDS, vectorization, autoreset)
    # gymnasium sorts the keys of a Dict space: echo before place
    columns = [2, 0, 1] if form == "dict" else [0, 1, 2]
    if form == "dict":
        assert other.terms == {"policy": [("echo", slice(0, 1)), ("place", slice(1, 3))]}
    else:
        assert other.observation_dims == {"policy": 3, "critic": 4}
    pairs = [(flat.reset(), other.reset())]
    for _ in range(15):
        one, two = step(flat, ACTION), step(other, ACTION)
        pairs.append((one.observation, two.observation))
        done = one.terminated | one.truncated
        if done.any() and autoreset != "next_step":
            final, other_final = one.info["final_observation"], two.info["final_observation"]
            pairs.append(({"policy": final["policy"][done]}, {name: rows[done] for name, rows in other_final.items()}))
            if form == "privileged":
                np.testing.assert_array_equal(other_final["critic"][done, 3], np.array(SEEDS)[done])
    for one_group, two_group in pairs:
        np.testing.assert_array_equal(one_group["policy"][:, columns], two_group["policy"])
        if form == "privileged":
            np.testing.assert_array_equal(two_group["critic"][:, :3], two_group["policy"])
    flat.close()
    other.close()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_bad_actions_and_calls_out_of_order_are_refused_and_the_environment_goes_on(
    vectorization: str, counting_env: Factory
) -> None:
    envs = GymnasiumEnv.from_factory(counting_env(), 3, SEEDS, vectorization)
    envs.reset()
    with pytest.raises(EnvironmentContractError, match="send"):
        envs.receive()
    with pytest.raises(EnvironmentContractError):
        envs.send(ACTION[:2])
    with pytest.raises(NonFiniteError):
        envs.send(ACTION * np.float32(np.nan))
    envs.send(ACTION)
    with pytest.raises(EnvironmentContractError, match="receive"):
        envs.send(ACTION)
    assert envs.receive().observation["policy"][:, 1].tolist() == [1, 1, 1]
    envs.send(ACTION)
    envs.reset()  # finishes the step in flight
    envs.send(ACTION)
    envs.close()
    with pytest.raises(EnvironmentContractError, match="closed"):
        envs.reset()


@pytest.mark.parametrize("in_thread", [False, True])
def test_workers_survive_the_signals_that_stop_a_run_and_end_with_close(in_thread: bool, counting_env: Factory) -> None:
    made: list[GymnasiumEnv] = []

    def build() -> None:
        made.append(GymnasiumEnv.from_factory(counting_env(), 3, SEEDS, "async"))

    if in_thread:
        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
    else:
        build()
    [envs] = made
    workers = envs._workers
    assert len(workers) == 3
    envs.reset()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        for worker in workers:
            assert worker.pid is not None
            os.kill(worker.pid, number)
        assert step(envs, ACTION).observation["policy"].shape == (3, 3)
    assert all(worker.is_alive() for worker in workers)
    envs.close()
    assert not any(worker.is_alive() for worker in workers)


def test_signal_that_arrives_while_workers_start_is_answered_afterwards(counting_env: Factory) -> None:
    make = counting_env()
    builds: list[int] = []
    heard: list[int] = []
    heard_while_building: list[int] = []

    def build() -> Any:
        builds.append(os.getpid())
        if len(builds) == 2:  # the copy that gymnasium makes in this process, after the adapter's own
            signal.raise_signal(signal.SIGTERM)
            heard_while_building.extend(heard)
        return make()

    previous = signal.signal(signal.SIGTERM, lambda *_: heard.append(signal.SIGTERM))
    try:
        envs = GymnasiumEnv.from_factory(build, 1, [0], "async")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert builds == [os.getpid()] * 2 and heard_while_building == [] and heard == [signal.SIGTERM]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    envs.close()


def test_process_that_never_closes_its_environments_ends_all_the_same() -> None:
    program = (
        "from rlplastic.envs.gymnasium_adapter import GymnasiumEnv; "
        "envs = GymnasiumEnv('Pendulum-v1', 2, [0, 1], 'async'); envs.reset(); raise SystemExit(5)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 5


def test_equal_seeds_give_equal_bits_and_other_seeds_do_not() -> None:
    def trace(seeds: list[int]) -> np.ndarray:
        envs = GymnasiumEnv("Pendulum-v1", 2, seeds)
        rows = [
            envs.reset()["policy"],
            *(step(envs, np.zeros((2, 1), np.float32)).observation["policy"] for _ in range(210)),
        ]
        rows.append(envs.reset()["policy"])
        envs.close()
        return np.stack(rows)

    first = trace([5, 6])
    np.testing.assert_array_equal(first, trace([5, 6]))
    assert (first[0] != first[-1]).any(axis=1).all()  # a second reset goes on in the stream of the seed
    other = trace([5, 7])
    np.testing.assert_array_equal(first[:, 0], other[:, 0])
    assert (first[:, 1] != other[:, 1]).any(axis=1).all()


def test_the_time_limit_is_found_in_the_registration_and_in_a_wrapper(counting_env: Factory) -> None:
    envs = GymnasiumEnv("Pendulum-v1", 1, [0], kwargs={"g": 9.0})
    assert envs.max_episode_steps == 200 and envs.action_high.tolist() == [2.0]
    envs.close()
    make = counting_env()
    wrapped = GymnasiumEnv.from_factory(lambda: gymnasium.wrappers.TimeLimit(make(), 17), 1, [0])
    assert wrapped.max_episode_steps == 17
    wrapped.close()
    bare = GymnasiumEnv.from_factory(make, 1, [0])
    assert bare.max_episode_steps is None
    bare.close()


def test_environments_outside_the_contract_are_refused_with_their_space(counting_env: Factory) -> None:
    with pytest.raises(EnvironmentContractError, match="Discrete"):
        GymnasiumEnv("CartPole-v1", 1, [0])

    def unbounded() -> Any:
        env = counting_env()()
        env.action_space = spaces.Box(-np.inf, np.inf, (2,))
        return env

    def pixels() -> Any:
        env = counting_env()()
        env.observation_space = spaces.Box(0, 1, (4, 4))
        return env

    def without_a_space() -> Any:
        env = counting_env()()
        del env.observation_space
        return env

    with pytest.raises(EnvironmentContractError, match="is None; expected a floating-point Box"):
        GymnasiumEnv.from_factory(without_a_space, 1, [0])
    with pytest.raises(EnvironmentContractError, match="bounded Box"):
        GymnasiumEnv.from_factory(unbounded, 1, [0])
    with pytest.raises(EnvironmentContractError, match="at most 1 axis"):
        GymnasiumEnv.from_factory(pixels, 1, [0])


def test_wrong_names_and_options_say_what_was_meant() -> None:
    with pytest.raises(ConfigurationError, match="'Pendulum-v1'"):
        GymnasiumEnv("Pendulumm-v1", 1, [0])
    with pytest.raises(ConfigurationError, match="No module named 'no_such_module_here'"):
        GymnasiumEnv("no_such_module_here:Thing-v0", 1, [0])
    with pytest.raises(ConfigurationError, match="wheels"):
        GymnasiumEnv("Pendulum-v1", 1, [0], kwargs={"wheels": 4})
    with pytest.raises(ConfigurationError, match="'same_step'"):
        GymnasiumEnv("Pendulum-v1", 1, [0], autoreset="samestep")
    with pytest.raises(ConfigurationError, match="'async'"):
        GymnasiumEnv("Pendulum-v1", 1, [0], vectorization="asynch")
    with pytest.raises(ConfigurationError, match="seeds"):
        GymnasiumEnv("Pendulum-v1", 2, [0])


FAULTY = """
import gymnasium, numpy as np, os, time

class Faulty(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, fault):
        self.fault, self.count = fault, 0
        if fault == "made":
            raise KeyError("asset")

    def reset(self, *, seed=None, options=None):
        if self.fault == "reset":
            raise RuntimeError("100% wrong")
        return np.zeros(2, np.float32), {}

    def step(self, action):
        if self.fault == "hangs":
            time.sleep(1000)
        self.count += 1
        if self.count == 3:
            if self.fault == "step":
                raise ValueError("torque %d" % 7)
            if self.fault == "numpy":
                np.stack([np.zeros(2), np.zeros(3)])
            if self.fault == "shape":
                return np.zeros(3, np.float32), 0.0, False, False, {}
            if self.fault == "tuple":
                return np.zeros(2, np.float32), 0.0, False, {}
            if self.fault == "death":
                os._exit(3)
        return np.zeros(2, np.float32), 0.0, False, False, {}

    def close(self):
        if self.fault == "never ends":
            time.sleep(1000)
        if self.fault == "close":
            raise OSError("robot unplugged")

gymnasium.register("Faulty-v0", "faulty_tasks:Faulty")
gymnasium.register("Mended-v0", Faulty)
"""


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., GymnasiumEnv]]:
    """Makes the module `faulty_tasks`; `faulty(fault, vectorization)` builds two of its environments."""
    (tmp_path / "faulty_tasks.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda fault, vectorization="sync": GymnasiumEnv(
        "faulty_tasks:Faulty-v0", 2, [0, 1], vectorization, kwargs={"fault": fault}
    )
    sys.modules.pop("faulty_tasks", None)
    for name in ("Faulty-v0", "Mended-v0"):
        gymnasium.registry.pop(name, None)


def line_of(text: str) -> int:
    return next(number for number, line in enumerate(FAULTY.split("\n"), 1) if text in line)


def play(envs: GymnasiumEnv) -> None:
    envs.reset()
    for _ in range(5):
        step(envs, np.zeros((2, 1), np.float32))


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("step", rf"raised ValueError: torque 7 in step\(\) at .*faulty_tasks\.py:{line_of('torque')};"),
        ("reset", rf"raised RuntimeError: 100% wrong in reset\(\) at .*faulty_tasks\.py:{line_of('100%')};"),
        ("numpy", rf"raised ValueError: all input .* in step\(\) at .*faulty_tasks\.py:{line_of('np.stack')};"),
        ("shape", r"what .*Faulty-v0 returned from step\(\) was refused with ValueError: .* in Box\(.*\(2,\)"),
        ("tuple", r"what .*Faulty-v0 returned from step\(\) was refused with ValueError: not enough values"),
    ],
)
def test_what_an_environment_does_wrong_is_one_sentence_with_the_place_and_what_to_do(
    fault: str, told: str, vectorization: str, faulty: Callable[..., GymnasiumEnv]
) -> None:
    envs = faulty(fault, vectorization)
    with warnings.catch_warnings(), pytest.raises(EnvironmentContractError, match=told) as caught:
        warnings.simplefilter("error")  # gymnasium prints the workers' tracebacks as warnings
        play(envs)
    assert "\n" not in str(caught.value)
    assert "python -m rlplastic.envs.checker env=gymnasium task=faulty_tasks:Faulty-v0" in str(caught.value)
    envs.close()
    assert not any(worker.is_alive() for worker in envs._workers)


def test_a_process_that_dies_is_told_and_the_others_are_ended(faulty: Callable[..., GymnasiumEnv]) -> None:
    envs = faulty("death", "async")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(EnvironmentContractError, match=r"a process of .*Faulty-v0 died in step\(\)"):
            play(envs)
        envs.close()
    for worker in envs._workers:
        worker.join(10)
        assert not worker.is_alive()


def test_a_process_that_dies_while_it_is_made_is_told_and_nobody_waits_for_the_others(tmp_path: Path) -> None:
    """The copies of this process are made, and so is the first of the others."""
    source = (
        "import os, pathlib, gymnasium\n"
        f"home, others = os.getpid(), pathlib.Path({str(tmp_path)!r}) / 'others'\n"
        "class Shy(gymnasium.Env):\n"
        "    observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,))\n"
        "    def __init__(self):\n"
        "        if os.getpid() != home:\n"
        "            with others.open('a') as file:\n"
        "                file.write('x')\n"
        "            if others.stat().st_size > 1:\n"
        "                os._exit(3)\n"
        "gymnasium.register('Shy-v0', Shy, max_episode_steps=9)\n"
    )
    command = [sys.executable, "-m", "rlplastic.envs.checker", "env=gymnasium", "task=shy_tasks:Shy-v0"]
    environment = with_module(tmp_path, "shy_tasks", source)
    done = subprocess.run(
        [*command, "vectorization=async"], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("error: a process of shy_tasks:Shy-v0 died while it was made")


def test_where_one_process_cannot_be_started_the_others_end_and_the_reason_is_kept(
    monkeypatch: pytest.MonkeyPatch, counting_env: Factory
) -> None:
    started: list[BaseProcess] = []
    really = BaseProcess.start

    def start(self: BaseProcess) -> None:
        if len(started) == 2:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        started.append(self)
        really(self)

    monkeypatch.setattr(BaseProcess, "start", start)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        GymnasiumEnv.from_factory(counting_env(), 3, SEEDS, "async")
    for worker in started:
        worker.join(10)
        assert not worker.is_alive()


def test_a_missing_package_that_says_nothing_is_named_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: object, **__: object) -> None:
        raise ImportError

    monkeypatch.setattr(gymnasium, "make", make)
    with pytest.raises(ConfigurationError, match=r"Pendulum-v1 cannot be made \(ImportError\)"):
        GymnasiumEnv("Pendulum-v1", 1, [0])


def test_an_environment_that_cannot_be_closed_says_so_once(faulty: Callable[..., GymnasiumEnv]) -> None:
    told = r"raised OSError: robot unplugged in close\(\)"
    with pytest.raises(EnvironmentContractError, match=told):
        faulty("close")  # the copy that is tried first
    envs = faulty("")
    envs._env.envs[0].unwrapped.fault = "close"
    with pytest.raises(EnvironmentContractError, match=told):
        envs.close()
    envs.close()


@pytest.mark.parametrize("where", ["step", "close"])
def test_a_process_that_never_ends_is_ended(
    where: str, faulty: Callable[..., GymnasiumEnv], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlplastic.envs.gymnasium_adapter.CLOSING", 0.5)
    envs = faulty("hangs" if where == "step" else "", "async")
    envs.reset()
    if where == "step":
        envs.send(np.zeros((2, envs.action_dim), np.float32))
    else:
        envs._env.set_attr("fault", "never ends")
    with pytest.raises(EnvironmentContractError, match=r"still busy 0\.5 s after it was to end"):
        envs.close()
    envs.close()
    for worker in envs._workers:
        worker.join(10)
        assert worker.exitcode == -signal.SIGKILL


def test_a_constructor_that_raises_is_named_with_its_line(faulty: Callable[..., GymnasiumEnv]) -> None:
    with pytest.raises(EnvironmentContractError, match=rf"KeyError: 'asset' while .*_tasks\.py:{line_of('asset')};"):
        faulty("made")


def test_an_unknown_id_of_a_module_is_answered_with_that_modules_ids(faulty: Callable[..., GymnasiumEnv]) -> None:
    faulty("").close()
    with pytest.raises(ConfigurationError, match="valid names: faulty_tasks:Faulty-v0, faulty_tasks:Mended-v0"):
        GymnasiumEnv("faulty_tasks:Nope-v0", 1, [0])
    with pytest.raises(ConfigurationError, match="mean 'faulty_tasks:Mended-v0'"):
        GymnasiumEnv("faulty_tasks:Mendd-v0", 1, [0])


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_older_task_is_made_without_a_word_and_without_a_log_file(tmp_path: Path, vectorization: str) -> None:
    program = (
        "from rlplastic.envs.gymnasium_adapter import GymnasiumEnv; "
        f"envs = GymnasiumEnv('HalfCheetah-v4', 2, [0, 1], '{vectorization}'); envs.reset(); envs.close()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr, list(tmp_path.iterdir())) == ("", "", [])


def test_only_what_is_deprecated_is_kept_from_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    before = mujoco.get_mju_user_warning()
    with _without_deprecations(gymnasium.spec("HalfCheetah-v5")):
        warn = mujoco.get_mju_user_warning()
        warn("compiler attribute 'settotalmass' is deprecated")
        warn("the mass matrix is singular")
    assert capsys.readouterr().err == "WARNING: the mass matrix is singular\n"
    assert mujoco.get_mju_user_warning() is before
