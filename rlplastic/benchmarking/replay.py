"""Time of sample() and memory per transition, beside Stable-Baselines3's and TorchRL's buffers where installed.

All buffers hold the same number of random transitions of Humanoid's sizes, from eight environments, and are asked in
turn, so that whatever else the machine does falls on all of them. A batch counts when its tensors are there. On a GPU
all end in its memory: rlplastic's and TorchRL's buffers lie there, Stable-Baselines3's, which knows no other, in the
host's.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlplastic.acceleration import barrier
from rlplastic.benchmarking.timing import interleaved
from rlplastic.envs.base import AutoresetMode, Step
from rlplastic.kernels import dispatch
from rlplastic.machine import probe_machine
from rlplastic.replay import ReplayRing, Sampler, memory

OBSERVATIONS, ACTIONS, ENVS, GAMMA = 348, 17, 8, 0.99
CAPTION = (
    "Microseconds per sample(), median; bytes per transition. Humanoid's sizes: 348 float32 observations, 17 actions. "
    "TorchRL's n-step returns are made when transitions are stored, so its sampling is that of one step."
)

Contender = tuple[int, Callable[[], object]]
"""Bytes per transition, and a function that draws a batch."""


def measure(options: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - the verb's arguments
    """A row for every batch size, number of steps and buffer."""
    capacity = 20_000 if options.quick else 1_000_000
    batches = [256] if options.quick else [256, 512, 2048]
    device = probe_machine("auto").device
    kernels = dispatch.choose("auto", device).name if device != "cpu" else "auto"
    rings = {"rlplastic": _ring(capacity, "float32", device, kernels)}
    rings |= {f"rlplastic, {dtype}": _ring(capacity, dtype, device, kernels) for dtype in ("float16", "int8")}
    peers = _peers(capacity, device)
    rows = []
    for batch in batches:
        for n_step in (1, 3):
            contenders = {name: _ours(ring, batch, n_step, kernels) for name, ring in rings.items()}
            if device != "cpu":
                contenders["rlplastic, in torch"] = _ours(rings["rlplastic"], batch, n_step, "torch")
            contenders |= {name: make(batch, n_step) for name, make in peers.items()}
            works = {name: draw for name, (_, draw) in contenders.items()}
            times = interleaved(works, options.repeats, burst=5, wait=barrier(device))
            ours = times["rlplastic"]
            rows += [
                {
                    "batch": batch,
                    "n": n_step,
                    "buffer": name,
                    "us per sample": times[name],
                    "times rlplastic's": times[name] / ours,
                    "bytes per transition": size,
                }
                for name, (size, _) in contenders.items()
            ]
    return rows


def _data(rows: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]]:
    """Observations (ENVS, D), actions and rewards of vector steps, cycling through a few random ones."""
    rng = np.random.default_rng(0)
    observations = rng.standard_normal((64, ENVS, OBSERVATIONS), np.float32)
    actions = rng.uniform(-1, 1, (64, ENVS, ACTIONS)).astype(np.float32)
    rewards = rng.standard_normal((64, ENVS), np.float32)
    for row in range(rows):
        yield observations[row % 64], actions[row % 64], rewards[row % 64]


def _ring(capacity: int, dtype: str, device: str, kernels: str) -> ReplayRing:
    dims = {"policy": OBSERVATIONS}
    ring = ReplayRing(capacity, ENVS, dims, ACTIONS, AutoresetMode.NEXT_STEP, dtype, device, kernels=kernels)
    never, always = np.zeros(ENVS, np.bool_), np.ones(ENVS, np.bool_)
    ring.begin({"policy": np.zeros((ENVS, OBSERVATIONS), np.float32)})
    for observation, action, reward in _data(ring.num_slots):
        ring.add(action, Step({"policy": observation}, reward, never, never, {}), always)
    return ring


def _ours(ring: ReplayRing, batch: int, n_step: int, kernels: str) -> Contender:
    sampler = Sampler(ring, batch, n_step, GAMMA, seed=0, kernels=kernels)
    scale, number = torch.tensor(0.5, device=ring.device), iter(range(10**9))
    return memory.bytes_per_transition(ring.layout), lambda: sampler.sample(next(number), scale)


def _peers(capacity: int, device: str) -> dict[str, Callable[[int, int], Contender]]:
    """Those that are installed, each filled once."""
    peers: dict[str, Callable[[int, int], Contender]] = {}
    for name, (module, make) in PEERS.items():
        if find_spec(module):
            peers[name] = make(capacity, device)
        else:
            print(f"{name} is not installed, and left out: pip install 'rlplastic[peers]'", file=sys.stderr)
    return peers


def _stable_baselines3(capacity: int, device: str) -> Callable[[int, int], Contender]:
    from gymnasium.spaces import Box
    from stable_baselines3.common.buffers import NStepReplayBuffer, ReplayBuffer

    spaces = Box(-np.inf, np.inf, (OBSERVATIONS,), np.float32), Box(-1, 1, (ACTIONS,), np.float32)
    plain = ReplayBuffer(capacity, *spaces, device=device, n_envs=ENVS)
    for row, (observation, action, reward) in enumerate(_data(plain.buffer_size)):
        plain.observations[row] = plain.next_observations[row] = observation
        plain.actions[row], plain.rewards[row] = action, reward
    plain.full = True
    several = NStepReplayBuffer(ENVS, *spaces, device=device, n_envs=ENVS, n_steps=3, gamma=GAMMA)
    for name in ("observations", "next_observations", "actions", "rewards", "dones", "timeouts", "buffer_size"):
        setattr(several, name, getattr(plain, name))
    several.full = True
    arrays = (plain.observations, plain.next_observations, plain.actions, plain.rewards, plain.dones, plain.timeouts)
    size = round(sum(array.nbytes for array in arrays) / (plain.buffer_size * ENVS))

    def contender(batch: int, n_step: int) -> Contender:
        buffer = plain if n_step == 1 else several
        return size, lambda: buffer.sample(batch)

    return contender


def _torchrl(capacity: int, device: str) -> Callable[[int, int], Contender]:
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

    logging.getLogger("torchrl").setLevel(logging.WARNING)  # it tells stdout about its storage
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(capacity, device=device), batch_size=256)
    steps = 64
    for _ in range(-(-capacity // (steps * ENVS))):
        data = list(_data(steps))
        observation, action, reward = (torch.from_numpy(np.concatenate(part)) for part in zip(*data, strict=True))
        flags = torch.zeros(len(reward), 1, dtype=torch.bool)
        following = {"observation": observation, "reward": reward[:, None]}
        following |= {"done": flags, "terminated": flags, "truncated": flags}
        buffer.extend(
            TensorDict({"observation": observation, "action": action, "next": following}, batch_size=[len(reward)])
        )
    size = round(sum(tensor.nbytes for tensor in buffer[:].values(True, True)) / capacity)
    return lambda batch, n_step: (size, lambda: buffer.sample(batch))


PEERS = {"Stable-Baselines3": ("stable_baselines3", _stable_baselines3), "TorchRL": ("torchrl", _torchrl)}
"""Module, and what fills its buffer, by name."""
