"""The example in torch is gymnasium's Pendulum-v1, whoever steps it and however it is compiled."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from examples.torch_pendulum import make
from rlplastic.envs.checker import check
from rlplastic.envs.torch_adapter import TorchEnv

N = 8


def test_every_step_is_that_of_gymnasiums_pendulum() -> None:
    batch = make(N, "cpu", seed=3)
    observation, _ = batch.reset()
    singles = [gymnasium.make("Pendulum-v1").unwrapped for _ in range(N)]
    for row, single in enumerate(singles):
        single.reset()
        single.state = batch.state[row].numpy().copy()  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    for _ in range(199):
        torque = rng.uniform(-2, 2, (N, 1)).astype(np.float32)
        observation, reward, terminated, truncated, _ = batch.step(torch.from_numpy(torque))
        for row, single in enumerate(singles):
            expected, gain, *_ = single.step(torque[row])
            np.testing.assert_allclose(observation[row].numpy(), expected, rtol=0, atol=1e-6)
            np.testing.assert_allclose(reward[row].item(), gain, rtol=0, atol=1e-8)
        assert not terminated.any() and not truncated.any()
    _, _, _, truncated, info = batch.step(torch.zeros(N, 1))
    expected = np.stack([single.step(np.zeros(1, np.float32))[0] for single in singles])
    assert truncated.all()
    np.testing.assert_allclose(info["final_obs"].numpy(), expected, rtol=0, atol=1e-6)


def test_episodes_start_where_gymnasiums_do_and_differ() -> None:
    batch = make(4000, "cpu", seed=1)
    batch.reset()
    limits = torch.tensor([torch.pi, 1.0])
    assert (batch.state.abs() <= limits).all()
    # a uniform variable on [-a, a] has variance a^2 / 3
    torch.testing.assert_close(batch.state.var(0), (limits**2 / 3).double(), rtol=0.06, atol=0)
    assert len(batch.state.unique(dim=0)) == 4000


def test_the_example_keeps_the_contract_and_resets_in_the_same_step() -> None:
    report = check(lambda seeds: TorchEnv(make, seeds, arrays=True), num_envs=3)
    assert {finding.status for finding in report.findings} == {"pass"}, report.findings


@pytest.mark.slow
def test_compiled_dynamics_are_the_eager_ones() -> None:
    eager, compiled = make(N, "cpu", seed=3), make(N, "cpu", seed=3, compile=True)
    eager.reset(), compiled.reset()
    for torque in torch.rand(20, N, 1) * 4 - 2:
        mine, theirs = eager.step(torque), compiled.step(torque)
        torch.testing.assert_close(mine[0], theirs[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(mine[1], theirs[1], rtol=0, atol=1e-5)
