"""The torch adapter: what leaves a simulator's device, what stays on it, and that both ways give the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from small_runs import SMALL, final_state
from torch import Tensor

from rlplastic import session, train_agent
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.config import CategoricalCriticConfig, FlashSACConfig
from rlplastic.envs.base import AutoresetMode, Step, VectorEnv, on_host, step
from rlplastic.envs.checker import check
from rlplastic.envs.episodes import EpisodeStatistics
from rlplastic.envs.torch_adapter import TorchEnv, find_factory
from rlplastic.errors import ConfigurationError, EnvironmentContractError, NonFiniteError
from rlplastic.guards import Guard
from rlplastic.progress import Progress
from rlplastic.replay import ReplayRing, Sampler

LENGTHS = (3, 1, 4, 2)
PENDULUM = "examples.torch_pendulum:make"
SEEDS = [5, 6, 7, 8, 9]


class Counting:
    """Observation (episode, step, first action), critic's (seed, episode, step); all buffers are used over and over.

    Episode k of environment n lasts LENGTHS[(n + k) % 4] steps; even ones terminate, odd ones are truncated. The reward
    is 100 * episode + step.
    """

    deterministic = True
    max_episode_steps = 4

    def __init__(self, num_envs: int, device: Any, seed: int, form: str = "box", fault: str = "") -> None:
        self.num_envs, self.device, self.form, self.fault = num_envs, torch.device(device), form, fault
        box = Box(-np.inf, np.inf, (3,))
        self.single_observation_space = Dict({"critic": box, "policy": box}) if form == "groups" else box
        bound = np.inf if fault == "infinite bounds" else 1.0
        self.single_action_space: Any = Box(np.array([-2, -bound], np.float32), np.array([4, bound], np.float32))
        self.seed = seed % 1000
        self.lengths = torch.tensor(LENGTHS, device=device)
        self.numbers = torch.arange(num_envs, device=device)
        self.episode, self.count = torch.full_like(self.numbers, -1), torch.zeros_like(self.numbers)
        self.seen, self.known = (torch.zeros(num_envs, 3, device=device) for _ in range(2))
        self.closed = 0
        if fault == "missing attribute":
            del self.single_action_space

    def _observe(self, echo: Any) -> Any:
        self.seen.copy_(torch.stack((self.episode, self.count, torch.zeros_like(self.count) + echo), 1))
        self.known.copy_(torch.stack((torch.full_like(self.count, self.seed), self.episode, self.count), 1))
        return {"policy": self.seen, "critic": self.known} if self.form == "groups" else self.seen

    def reset(self) -> Any:
        if self.fault == "raises":
            raise ValueError("out of order")
        self.episode += 1
        self.count.zero_()
        return self._observe(0.0), {}

    def step(self, actions: Tensor) -> Any:
        self.count += 1
        ended = self.count >= self.lengths[(self.numbers + self.episode) % 4]
        terminated, truncated = ended & (self.episode % 2 == 0), ended & (self.episode % 2 == 1)
        reward = 100.0 * self.episode + self.count
        last = self._observe(actions[:, 0])
        final = {name: rows.clone() for name, rows in last.items()} if isinstance(last, dict) else last.clone()
        self.episode += ended
        self.count.masked_fill_(ended, 0)
        observation = self._observe(torch.where(ended, 0.0, actions[:, 0]))
        info = {} if self.fault == "no final_obs" else {"final_obs": final}
        if self.fault == "nan":
            observation[2, 1] = torch.where(self.episode[2] == 1, torch.nan, observation[2, 1])
        if self.fault == "final nan":
            final[2] = torch.where(ended[2], torch.nan, final[2])
            final[0] = torch.where(ended[0], final[0], torch.nan)  # of an episode that goes on: nobody reads it
        if self.fault == "wrong width":
            observation = observation[:, :2]
        if self.fault == "numpy":
            observation = observation.numpy()
        if self.fault == "integer reward":
            reward = reward.long()
        if self.fault == "reward column":
            reward = reward[:, None]
        if self.fault == "float ends":
            truncated = truncated.float()
        return observation, reward, terminated, truncated, info

    def close(self) -> None:
        self.closed += 1


def envs_of(form: str = "box", fault: str = "", arrays: bool = False, seeds: list[int] = SEEDS) -> TorchEnv:
    return TorchEnv(Counting, seeds, kwargs={"form": form, "fault": fault}, name="counting", arrays=arrays)


def actions_of(time: int, num_envs: int = 5) -> np.ndarray:
    return np.random.default_rng([3, time]).uniform(-1, 1, (num_envs, 2)).astype(np.float32)


@pytest.mark.parametrize(("form", "dims"), [("box", {"policy": 3}), ("groups", {"policy": 3, "critic": 3})])
def test_a_simulator_in_torch_keeps_the_contract(form: str, dims: dict[str, int]) -> None:
    envs = envs_of(form)
    assert isinstance(envs, VectorEnv) and envs.autoreset is AutoresetMode.SAME_STEP
    assert envs.observation_dims == dims and next(iter(envs.observation_dims)) == "policy"
    assert envs.action_low.tolist() == [-2, -1] and envs.action_high.tolist() == [4, 1]
    # with a critic's group that tells the seed, so that another seed can be seen
    report = check(lambda seeds: envs_of(form, arrays=True, seeds=seeds), num_envs=5, steps=30)
    outcome = {finding.name: finding.status for finding in report.findings}
    wanted = {"seeds": "fail", "time limit": "fail"} if form == "box" else {"time limit": "fail"}
    assert outcome == dict.fromkeys(outcome, "pass") | wanted, report.findings


@pytest.mark.parametrize("form", ["box", "groups"])
def test_every_row_is_what_counting_predicts(form: str) -> None:
    envs = envs_of(form)
    episode, count = np.zeros(5, int), np.zeros(5, int)
    observation = envs.reset()
    assert all(isinstance(rows, Tensor) for rows in observation.values())
    for time in range(40):
        actions = actions_of(time)
        result = step(envs, torch.from_numpy(actions))
        count += 1
        ended = count >= np.array(LENGTHS)[(np.arange(5) + episode) % 4]
        echo = (1 + 3 * actions[:, 0].astype(np.float64)).astype(np.float32)
        np.testing.assert_array_equal(result.terminated, ended & (episode % 2 == 0))
        np.testing.assert_array_equal(result.truncated, ended & (episode % 2 == 1))
        np.testing.assert_array_equal(result.reward, (100 * episode + count).astype(np.float32))
        assert ("final_observation" in result.info) == ended.any()
        if ended.any():
            final = on_host(result.info["final_observation"])
            np.testing.assert_array_equal(final["policy"][ended], np.stack((episode, count, echo), 1)[ended])
            if form == "groups":
                np.testing.assert_array_equal(final["critic"][ended, 1:], np.stack((episode, count), 1)[ended])
        episode, count = episode + ended, np.where(ended, 0, count)
        expected = np.stack((episode, count, np.where(ended, 0, echo)), 1).astype(np.float32)
        np.testing.assert_array_equal(on_host(result.observation)["policy"], expected)
        assert result.reward.dtype == np.float32 and result.info["finite"].all()


def test_observations_outlive_the_buffers_that_a_simulator_uses_again() -> None:
    envs = envs_of()
    first = envs.reset()["policy"]
    kept = first.clone()
    second = step(envs, torch.ones(5, 2)).observation["policy"]
    assert torch.equal(first, kept) and not torch.equal(first, second)


def filled(arrays: bool, dtype: str, kernels: str) -> tuple[ReplayRing, EpisodeStatistics]:
    envs = envs_of("groups", arrays=arrays)
    ring = ReplayRing(60, 5, envs.observation_dims, 2, envs.autoreset, dtype, kernels=kernels)
    episodes = EpisodeStatistics(5, envs.autoreset)
    ring.begin(envs.reset())
    for time in range(30):
        action: Any = actions_of(time) if arrays else torch.from_numpy(actions_of(time))
        result = step(envs, action)
        ring.add(action, result, episodes.observe(result))
    return ring, episodes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_replay_holds_the_same_bits_whether_it_was_given_tensors_or_arrays(dtype: str) -> None:
    (tensors, mine), (arrays, theirs) = filled(False, dtype, "auto"), filled(True, dtype, "auto")
    for name in ("storage", "reward", "flags", "queue", "index"):
        assert torch.equal(getattr(tensors.tensors, name), getattr(arrays.tensors, name)), name
    assert (tensors.tensors.observation[:, 0] > 2).any() and tensors.transitions == arrays.transitions
    for one, other in zip(mine.pop_finished(), theirs.pop_finished(), strict=True):
        np.testing.assert_array_equal(one, other)


def turn(envs: TorchEnv, agent: FlashSAC, ring: ReplayRing, sampler: Sampler, time: int, seen: Any) -> Any:
    """One turn of the loop without its update: act, step, store, sample."""
    active = np.ones(envs.num_envs, np.bool_)
    action = agent.explore(seen, time, active, uniform=time < 2)
    envs.send(action)
    result = envs.receive()
    ring.add(action, result, active)
    batch = sampler.sample(time)
    assert action.device == batch.observation["critic"].device == envs.device
    return result.observation


def parts(device: str) -> tuple[TorchEnv, FlashSAC, ReplayRing, Sampler]:
    envs = TorchEnv(Counting, SEEDS, device, {"form": "groups"})
    config = FlashSACConfig(critic_width=16, actor_width=8, gamma=0.99)
    agent = FlashSAC(envs.observation_dims, 2, 5, config, CategoricalCriticConfig(num_atoms=11), device=device)
    ring = ReplayRing(100, 5, envs.observation_dims, 2, envs.autoreset, device=device, kernels="torch")
    return envs, agent, ring, Sampler(ring, 16, 3, 0.99, seed=0, kernels="torch")


def test_nothing_is_read_from_the_device_but_five_numbers_of_every_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device there is nothing to read: whatever tries fails. Only the adapter's own block is replaced."""
    blocks = []

    def landed(self: TorchEnv, block: Tensor) -> Tensor:
        blocks.append(block)
        ends = torch.arange(5) % 2 * float(len(blocks) % 3 == 0)
        return torch.stack((torch.ones(5), ends, torch.zeros(5), torch.ones(5), torch.ones(5)))

    monkeypatch.setattr(TorchEnv, "_to_host", landed)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    envs, agent, ring, sampler = parts("meta")
    seen = envs.reset()
    ring.begin(seen)
    for time in range(9):
        seen = turn(envs, agent, ring, sampler, time, seen)
    assert [tuple(block.shape) for block in blocks] == [(5, 5)] * 9
    assert ring.transitions == 45 and int(ring.written.sum()) == 45 + 3 * 2
    with pytest.raises((NotImplementedError, RuntimeError)):  # that such a device refuses is what this test rests on
        seen["policy"].cpu()


@pytest.mark.gpu
def test_on_a_gpu_a_turn_waits_for_nothing_but_those_numbers() -> None:
    envs, agent, ring, sampler = parts("cuda")
    seen = envs.reset()
    ring.begin(seen)
    for time in range(6):  # loading kernels may wait
        seen = turn(envs, agent, ring, sampler, time, seen)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for time in range(6, 12):
            seen = turn(envs, agent, ring, sampler, time, seen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ring.transitions == 60


def trained(folder: Path, *overrides: str) -> dict[str, object]:
    task = ["env=torch", f"env.task={PENDULUM}", "env.kwargs.max_episode_steps=17"]
    train_agent([*SMALL, *task, f"runs={folder}", "name=run", *overrides], quiet=True)
    return final_state(folder / "run")


def test_training_on_tensors_gives_the_bits_of_training_on_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = trained(tmp_path / "tensors")
    make = session.make_envs
    monkeypatch.setattr(session, "make_envs", lambda *a, **o: make(*a, **(o | {"tensors": False})))
    assert trained(tmp_path / "arrays") == tensors


def test_stopping_at_half_the_budget_and_going_on_equals_never_stopping(tmp_path: Path) -> None:
    options = ["schedule=horizon", "schedule.horizon=1000", "evaluation.every=0", "agent.n_step=3"]
    trained(tmp_path / "halves", "env_steps=300", *options)
    halves, whole = trained(tmp_path / "halves", *options), trained(tmp_path / "whole", *options)
    halves.pop("eval.csv"), whole.pop("eval.csv")
    assert halves == whole


def test_what_cannot_be_repeated_logs_no_actions_is_not_rebuilt_and_resumes_with_fresh_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from examples.torch_pendulum import TorchPendulum

    monkeypatch.setattr(TorchPendulum, "deterministic", False)
    once = ["env.rebuild_every=null", "env.kwargs.max_episode_steps=2"]  # 20 time limits would be 40 vector steps
    first = trained(tmp_path, "env_steps=300", *once, "evaluation.every=0", "evaluation.final_episodes=0")
    assert len(str(first["eval.csv"]).splitlines()) == 1, "only the header: no evaluation was asked for"
    assert first["progress"]["builds"] == 0 and first["progress"]["vector_steps"] == 75  # type: ignore[index]
    train_agent([*SMALL, "env=torch", f"env.task={PENDULUM}", *once, f"runs={tmp_path}", "name=run"])
    assert "not exact: the environments are not deterministic; fresh episodes" in capsys.readouterr().err
    assert final_state(tmp_path / "run")["progress"]["builds"] == 1  # type: ignore[index]


def test_a_policy_of_a_run_is_evaluated_on_its_simulator(tmp_path: Path) -> None:
    from rlplastic.evaluation import evaluate
    from rlplastic.policy import load_policy

    trained(tmp_path, "env_steps=300")
    policy = load_policy(tmp_path / "run")
    assert policy.env.device == policy.config.env.device == "cpu"
    assert evaluate(policy.act, policy.env, seed=0, episodes=3).lengths.tolist() == [17, 17, 17]


@pytest.mark.parametrize(
    ("fault", "named"), [("nan", r"observation 'policy' of environments \[2\]"), ("final nan", r"final .*\[2\]")]
)
def test_a_non_finite_number_is_seen_on_the_device_and_named_with_its_environment(
    tmp_path: Path, fault: str, named: str
) -> None:
    envs = envs_of(fault=fault)
    ring = ReplayRing(60, 5, envs.observation_dims, 2, envs.autoreset)
    guard = Guard(tmp_path, ring, Progress())
    ring.begin(envs.reset())
    action = torch.zeros(5, 2)
    answers: list[Step[Any]] = []
    with pytest.raises(NonFiniteError, match=named):
        for _ in range(9):
            answers.append(step(envs, action))
            guard.check_step(answers[-1], action)
    assert not answers[-1].info["finite"][2] and all(answer.info["finite"].all() for answer in answers[:-1])
    assert list(tmp_path.glob("non_finite_*/evidence.safetensors"))


def test_a_non_finite_action_is_told_when_its_step_is_received() -> None:
    envs = envs_of()
    envs.reset()
    actions = torch.zeros(5, 2)
    actions[3, 1] = torch.nan
    envs.send(actions)
    with pytest.raises(NonFiniteError, match=r"environments \[3\]"):
        envs.receive()
    envs.send(torch.full((5, 2), 1.5))
    with pytest.raises(EnvironmentContractError, match=r"magnitude 1\.5"):
        envs.receive()
    with pytest.raises(NonFiniteError):  # the values of an array can be looked at right away
        envs.send(np.full((5, 2), np.nan, np.float32))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no final_obs", "no 'final_obs'"),
        ("wrong width", r"observation is torch.float32 \(5, 2\) on cpu; expected a floating-point tensor \(5, 3\)"),
        ("numpy", "observation is a ndarray"),
        ("integer reward", r"reward is torch.int64 .*expected a floating-point"),
        ("reward column", r"reward is .*\(5, 1\).*expected .*\(5,\)"),
        ("float ends", r"truncated is torch.float32 .*expected a bool"),
        ("raises", r"raised ValueError: out of order in reset\(\) at .*test_torch_adapter.py"),
        ("infinite bounds", "bounded Box"),
        ("missing attribute", "Counting, has no single_action_space"),
    ],
)
def test_a_simulator_that_breaks_the_contract_is_told_how(fault: str, message: str) -> None:
    with pytest.raises(EnvironmentContractError, match=message):
        envs = envs_of(fault=fault)
        envs.reset()
        for _ in range(4):
            step(envs, torch.zeros(5, 2))


@pytest.mark.parametrize(
    "actions", [torch.zeros(4, 2), torch.zeros(5, 1), torch.zeros(5, 2).double(), torch.zeros(5, 2, device="meta")]
)
def test_actions_of_another_shape_dtype_or_device_are_refused(actions: Tensor) -> None:
    envs = envs_of()
    envs.reset()
    with pytest.raises(EnvironmentContractError, match=r"expected a float32 tensor \(5, 2\) on cpu"):
        envs.send(actions)


def test_calls_out_of_order_are_refused_and_closing_twice_is_harmless() -> None:
    envs = envs_of()
    envs.reset()
    with pytest.raises(EnvironmentContractError, match="send"):
        envs.receive()
    envs.send(torch.zeros(5, 2))
    with pytest.raises(EnvironmentContractError, match="receive"):
        envs.send(torch.zeros(5, 2))
    envs.reset()
    step(envs, torch.zeros(5, 2))
    simulator = envs.simulator
    envs.close(), envs.close()
    assert simulator.closed == 1
    with pytest.raises(EnvironmentContractError, match="closed"):
        envs.reset()


def test_a_factory_that_returns_other_environments_than_asked_for_is_refused() -> None:
    with pytest.raises(EnvironmentContractError, match="made 4 environments on cpu; expected the 5 on cpu"):
        TorchEnv(lambda num_envs, **others: Counting(4, **others), SEEDS)
    with pytest.raises(EnvironmentContractError, match="on meta; expected the 5 on cpu"):
        TorchEnv(lambda device, **others: Counting(device="meta", **others), SEEDS)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("examples.torch_pendulum", "names no factory; expected module:function"),
        ("examples.torch_pendulun:make", "cannot be imported .*torch_pendulun"),
        ("examples.torch_pendulum:mak", "no function 'mak'.*'make'"),
    ],
)
def test_a_factory_that_is_not_there_is_told_with_what_is(task: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        find_factory(task)


def test_options_and_devices_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"refuses the options \{'colour': 'red'\}.*colour"):
        TorchEnv(Counting, SEEDS, kwargs={"colour": "red"})
    with pytest.raises(ConfigurationError, match=r"env\.device=cuda:9 is not there"):
        TorchEnv(Counting, SEEDS, "cuda:9")
