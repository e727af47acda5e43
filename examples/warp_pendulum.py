"""Gymnasium's InvertedPendulum-v5 on MuJoCo Warp: N worlds stepped by its kernels, on a CPU or a GPU.

    pip install 'rlplastic[warp]'
    python -m rlplastic.train env=torch env.task=examples.warp_pendulum:make

Warp's arrays and torch's tensors are two views of the same memory (`wp.to_torch`): actions are written where the
simulation reads them and observations are read where it writes them. It computes in float32, gymnasium's MuJoCo in
float64. The first step compiles its kernels, which takes minutes on a CPU and is remembered in Warp's cache.

The model is gymnasium's own file. A step is two of MuJoCo's of 0.02 s. An episode ends, with reward 0 instead of 1,
when the pole is beyond 0.2 rad, or after 1000 steps; it starts with positions and speeds in [-0.01, 0.01].
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import mujoco_warp as mjw
import numpy as np
import torch
import warp as wp
from gymnasium.spaces import Box
from torch import Tensor

MODEL = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / "inverted_pendulum.xml"
FRAME_SKIP, LARGEST_ANGLE, NOISE = 2, 0.2, 0.01
MOST_CONSTRAINTS = 8
"""In a world; this model has two joints with limits and no contacts."""


class WarpPendulum:
    """N inverted pendulums; a `rlplastic.envs.torch_adapter.Simulator`.

    Args:
        num_envs: N.
        device: where they are.
        seed: of all starting states.
        max_episode_steps: the time limit.
    """

    def __init__(self, num_envs: int, device: torch.device | str, seed: int, max_episode_steps: int = 1000) -> None:
        self.num_envs, self.device, self.max_episode_steps = num_envs, torch.device(device), max_episode_steps
        self.deterministic = self.device.type == "cpu"  # a GPU may add up in another order
        model = mujoco.MjModel.from_xml_path(str(MODEL))
        self.step_dt = FRAME_SKIP * float(model.opt.timestep)
        self.single_observation_space = Box(-np.inf, np.inf, (model.nq + model.nv,))
        self.single_action_space = Box(*model.actuator_ctrlrange.T.astype(np.float32))
        wp.init()
        self._place = wp.device_from_torch(str(self.device))
        with wp.ScopedDevice(self._place):
            self._model = mjw.put_model(model)
            self._data = mjw.put_data(model, mujoco.MjData(model), nworld=num_envs, njmax=MOST_CONSTRAINTS)
        data = self._data
        self.qpos, self.qvel = wp.to_torch(data.qpos), wp.to_torch(data.qvel)
        self._ctrl, self._warmstart = wp.to_torch(data.ctrl), wp.to_torch(data.qacc_warmstart)
        self._generator = torch.Generator(device=self.device).manual_seed(seed)
        self._age = torch.zeros(num_envs, dtype=torch.int64, device=self.device)

    def reset(self) -> tuple[Tensor, dict[str, Any]]:
        """Start an episode everywhere."""
        self._start(torch.ones(self.num_envs, dtype=torch.bool, device=self.device))
        return self._observe(), {}

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Forces (N, 1) to observation, reward, terminated, truncated, and the last observations."""
        self._ctrl.copy_(actions)
        with wp.ScopedDevice(self._place), _current_stream(self.device):
            for _ in range(FRAME_SKIP):
                mjw.step(self._model, self._data)
        self._age += 1
        last = self._observe()
        terminated = ~(last.isfinite().all(1) & (last[:, 1].abs() <= LARGEST_ANGLE))
        truncated = self._age >= self.max_episode_steps
        self._start(terminated | truncated)
        return self._observe(), (~terminated).float(), terminated, truncated, {"final_obs": last}

    def close(self) -> None:
        """Nothing is held that Warp does not free."""

    def _observe(self) -> Tensor:
        """Positions and speeds (N, 4) float32, as a tensor of their own."""
        return torch.cat((self.qpos, self.qvel), 1)

    def _start(self, where: Tensor) -> None:
        """Begin episodes in these rows (N,); numbers are drawn for all, since choosing would wait for the device."""
        shape = (2, self.num_envs, self.qpos.shape[1])
        noise = torch.empty(shape, device=self.device).uniform_(-NOISE, NOISE, generator=self._generator)
        still = torch.zeros_like(noise[0])
        for state, fresh in ((self.qpos, noise[0]), (self.qvel, noise[1]), (self._warmstart, still)):
            state.copy_(torch.where(where[:, None], fresh, state))
        self._age.masked_fill_(where, 0)


def _current_stream(device: torch.device) -> Any:  # noqa: ANN401 - Warp has no types
    """Has Warp queue its kernels where torch queues its own; a CPU has no streams."""
    on_gpu = device.type == "cuda"
    return wp.ScopedStream(wp.stream_from_torch(torch.cuda.current_stream(device)) if on_gpu else None)


def make(num_envs: int, device: torch.device | str, seed: int, **options: Any) -> WarpPendulum:  # noqa: ANN401 - theirs
    """The factory that ``env.task=examples.warp_pendulum:make`` names; ``env.kwargs`` arrive as ``options``."""
    return WarpPendulum(num_envs, device, seed, **options)
