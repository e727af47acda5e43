"""Gymnasium's Pendulum-v1 in torch: any number of pendulums as one batch of tensors, on a CPU or a GPU.

    python -m rlplastic.train env=torch env.task=examples.torch_pendulum:make

With theta = 0 upright, gravity g = 10, mass m = 1, length l = 1 and time step dt = 0.05, a torque |u| <= 2 moves it by

    thetadot' = clip(thetadot + (3 g / (2 l) sin(theta) + 3 / (m l^2) u) dt, -8, 8)      theta' = theta + thetadot' dt

for a reward of -(wrap(theta)^2 + 0.1 thetadot^2 + 0.001 u^2), wrap going to [-pi, pi). Episodes last 200 steps and
start at theta in [-pi, pi], thetadot in [-1, 1]. As in gymnasium the state is float64, and torques are float32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from torch import Tensor

GRAVITY, MASS, LENGTH, TIME_STEP = 10.0, 1.0, 1.0, 0.05
MAX_SPEED, MAX_TORQUE = 8.0, 2.0


def dynamics(state: Tensor, torque: Tensor) -> tuple[Tensor, Tensor]:
    """The state (N, 2) float64 after one step under ``torque`` (N,) float32, and the reward (N,)."""
    theta, speed = state.unbind(1)
    torque = torque.clamp(-MAX_TORQUE, MAX_TORQUE)
    wrapped = torch.remainder(theta + math.pi, 2 * math.pi) - math.pi
    reward = -(wrapped**2 + 0.1 * speed**2 + 0.001 * torque**2)
    pull = 3 * GRAVITY / (2 * LENGTH) * torch.sin(theta) + 3.0 / (MASS * LENGTH**2) * torque
    speed = (speed + pull * TIME_STEP).clamp(-MAX_SPEED, MAX_SPEED)
    return torch.stack((theta + speed * TIME_STEP, speed), 1), reward


def observe(state: Tensor) -> Tensor:
    """cos(theta), sin(theta) and speed of states (N, 2), as (N, 3) float32."""
    theta, speed = state.unbind(1)
    return torch.stack((torch.cos(theta), torch.sin(theta), speed), 1).float()


class TorchPendulum:
    """N pendulums; a `rlplastic.envs.torch_adapter.Simulator`.

    Args:
        num_envs: N.
        device: where they are.
        seed: of all starting states.
        compile: fuse a step into a few kernels with ``torch.compile``; equal up to rounding.
        max_episode_steps: the time limit.
    """

    deterministic = True
    step_dt = TIME_STEP

    def __init__(
        self, num_envs: int, device: torch.device | str, seed: int, compile: bool = False, max_episode_steps: int = 200
    ) -> None:
        self.num_envs, self.device, self.max_episode_steps = num_envs, torch.device(device), max_episode_steps
        high = np.array([1.0, 1.0, MAX_SPEED], np.float32)
        self.single_observation_space = Box(-high, high)
        self.single_action_space = Box(-MAX_TORQUE, MAX_TORQUE, (1,))
        self._dynamics = torch.compile(dynamics) if compile else dynamics
        self._generator = torch.Generator(device=self.device).manual_seed(seed)
        self.state = self._starts()
        self.age = torch.zeros(num_envs, dtype=torch.int64, device=self.device)

    def _starts(self) -> Tensor:
        """Starting states of all environments: drawn for all, since choosing some would wait for the device."""
        drawn = torch.rand(self.num_envs, 2, generator=self._generator, device=self.device, dtype=torch.float64)
        return (2 * drawn - 1) * drawn.new_tensor([math.pi, 1.0])

    def reset(self) -> tuple[Tensor, dict[str, Any]]:
        """Start an episode everywhere."""
        self.state = self._starts()
        self.age = torch.zeros_like(self.age)
        return observe(self.state), {}

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Torques (N, 1) to observation, reward, terminated (never), truncated, and the last observations."""
        state, reward = self._dynamics(self.state, actions[:, 0])
        age = self.age + 1
        truncated = age >= self.max_episode_steps
        self.state = torch.where(truncated[:, None], self._starts(), state)
        self.age = age.masked_fill(truncated, 0)
        return observe(self.state), reward, torch.zeros_like(truncated), truncated, {"final_obs": observe(state)}

    def close(self) -> None:
        """Nothing is held that torch does not free."""


def make(num_envs: int, device: torch.device | str, seed: int, **options: Any) -> TorchPendulum:  # noqa: ANN401 - theirs
    """The factory that ``env.task=examples.torch_pendulum:make`` names; ``env.kwargs`` arrive as ``options``."""
    return TorchPendulum(num_envs, device, seed, **options)
