"""The example on MuJoCo Warp, where it is installed: the same trajectories as gymnasium's task on plain MuJoCo."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

pytest.importorskip("mujoco_warp")
pytestmark = pytest.mark.slow  # the first step compiles Warp's kernels

from examples.warp_pendulum import make  # noqa: E402
from rlplastic.envs.checker import check  # noqa: E402
from rlplastic.envs.torch_adapter import TorchEnv  # noqa: E402

N = 4


def test_trajectories_are_those_of_plain_mujoco_up_to_single_precision() -> None:
    batch = make(N, "cpu", seed=0)
    batch.reset()
    singles = [gymnasium.make("InvertedPendulum-v5").unwrapped for _ in range(N)]
    for row, single in enumerate(singles):
        single.reset()
        single.set_state(batch.qpos[row].double().numpy(), batch.qvel[row].double().numpy())  # type: ignore[attr-defined]
    rng, farthest, steps, running = np.random.default_rng(0), 0.0, 0, np.ones(N, np.bool_)
    while running.any():
        force = rng.uniform(-0.5, 0.5, (N, 1)).astype(np.float32)
        _, reward, terminated, truncated, info = batch.step(torch.from_numpy(force))
        assert not truncated.any()
        for row in np.flatnonzero(running):
            expected, gain, ended, *_ = singles[row].step(force[row])
            farthest = max(farthest, np.abs(info["final_obs"][row].numpy() - expected).max())
            assert (reward[row].item(), terminated[row].item()) == (gain, ended)
            running[row] = not ended
            steps += 1
    assert steps > 20 and farthest < 1e-5


def test_the_example_keeps_the_contract_on_the_cpu() -> None:
    report = check(lambda seeds: TorchEnv(make, seeds, kwargs={"max_episode_steps": 3}, arrays=True), num_envs=3)
    assert {finding.status for finding in report.findings} == {"pass"}, report.findings


def test_actions_and_states_are_warps_own_memory() -> None:
    batch = make(N, "cpu", seed=0)
    assert batch.qpos.data_ptr() == batch._data.qpos.ptr and batch._ctrl.data_ptr() == batch._data.ctrl.ptr
