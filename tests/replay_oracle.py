"""A simulated vector environment whose observations say where they come from, and a list-based replay as the oracle."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from rlplastic.envs.base import Array, AutoresetMode, Observation, Step
from rlplastic.kernels import replay_sample
from rlplastic.replay import Batch, Holdout, ReplayRing, Sampler

DIMS = {"policy": 3, "critic": 2}
ACTION_DIM = 2


@dataclass
class Transition:
    """What one environment step really was, and which of its column's rows should hold it."""

    row: int
    life: tuple[int, int]  # (rebuild, episode): returns never reach across
    observation: tuple[int, int, int]
    next_observation: tuple[int, int, int]
    action: float
    reward: float
    terminated: bool
    truncated: bool


def groups(rows: list[tuple[int, int, int]]) -> Observation:
    """Observations as (env, episode, step), and a second group made of other multiples of the same."""
    policy = np.array(rows, np.float32).reshape(-1, 3)
    return {"policy": policy, "critic": np.stack((policy[:, 0] - 7 * policy[:, 1], policy[:, 2] + 0.5), 1)}


@dataclass
class Simulation:
    """Steps ``num_envs`` random episodes, feeds a ring and keeps every transition in a Python list."""

    num_envs: int
    autoreset: AutoresetMode
    random: np.random.Generator
    end_probability: float = 0.3
    columns: list[list[Transition]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # rows completed per column
    rebuilds: int = -1

    @staticmethod
    def ring(
        capacity: int, num_envs: int, autoreset: AutoresetMode, dtype: str = "float32", **options: Any
    ) -> ReplayRing:
        """An empty ring of the simulation's widths."""
        return ReplayRing(capacity, num_envs, DIMS, ACTION_DIM, autoreset, dtype, **options)

    def __post_init__(self) -> None:
        """Columns start empty."""
        self.columns = [[] for _ in range(self.num_envs)]
        self.rows = [0] * self.num_envs
        self.episode = [-1] * self.num_envs
        self.now = [(0, 0, 0)] * self.num_envs
        self.waiting = [False] * self.num_envs  # finished; the next step is the reset row of NEXT_STEP

    def fresh(self, n: int) -> tuple[int, int, int]:
        self.episode[n] += 1
        return (n + 1, self.episode[n] + 1, 0)

    def begin(self, *rings: ReplayRing) -> None:
        """First reset, or a rebuild in the middle of whatever was going on."""
        if self.rebuilds >= 0:
            self.rows = [row + 1 for row in self.rows]
        self.rebuilds += 1
        self.episode = [e + w for e, w in zip(self.episode, self.waiting, strict=True)]  # the one to follow never comes
        self.now = [self.fresh(n) for n in range(self.num_envs)]
        self.waiting = [False] * self.num_envs
        for ring in rings:
            ring.begin(groups(self.now))

    def step(self, *rings: ReplayRing) -> None:
        """One vector step with random rewards (small halves, exact in float32) and random ends."""
        count = self.num_envs
        action = self.random.integers(-8, 9, (count, ACTION_DIM)).astype(np.float32) / 8
        reward = self.random.integers(-8, 9, count).astype(np.float32) / 2
        end = self.random.random(count) < self.end_probability
        kind = self.random.integers(0, 3, count)
        terminated, truncated = end & (kind != 1), end & (kind != 0)
        valid = np.ones(count, bool)
        returned, final = [(0, 0, 0)] * count, [(-1, -1, -1)] * count
        for n in range(count):
            if self.waiting[n]:
                valid[n], terminated[n], truncated[n], reward[n] = False, False, False, 0.0
                self.waiting[n], returned[n] = False, self.fresh(n)
                self.rows[n] += 1
                continue
            reached = (self.now[n][0], self.now[n][1], self.now[n][2] + 1)
            done = bool(terminated[n] or truncated[n])
            self.columns[n].append(
                Transition(
                    self.rows[n],
                    (self.rebuilds, self.episode[n]),
                    self.now[n],
                    reached,
                    float(action[n, 0]),
                    float(reward[n]),
                    bool(terminated[n]),
                    bool(truncated[n]),
                )
            )
            self.rows[n] += 1
            returned[n] = reached
            if done and self.autoreset is AutoresetMode.SAME_STEP:
                final[n], returned[n] = reached, self.fresh(n)
                self.rows[n] += 1
            elif done:
                self.waiting[n] = True
        self.now = returned
        info = {"final_observation": groups(final)} if self.autoreset is AutoresetMode.SAME_STEP else {}
        for ring in rings:
            ring.add(action, Step(groups(returned), reward, terminated, truncated, info), valid)

    def sampleable(self, num_slots: int) -> dict[tuple[int, int], int]:
        """(slot, column) of every transition among the last T - 1 completed rows -> its place in the column's list."""
        return {
            (transition.row % num_slots, n): place
            for n, column in enumerate(self.columns)
            for place, transition in enumerate(column)
            if self.rows[n] - (num_slots - 1) <= transition.row
        }

    def returns(self, n: int, place: int, n_step: int, gamma: float) -> tuple[float, float, tuple[int, int, int]]:
        """Reward sum, discount and bootstrap observation, straight from the list of transitions."""
        column, total, steps = self.columns[n], 0.0, 0
        while True:
            transition = column[place + steps]
            total += gamma**steps * transition.reward
            steps += 1
            if transition.terminated:
                return total, 0.0, transition.next_observation
            following = place + steps
            last = transition.truncated or following == len(column) or steps == n_step
            if last or column[following].life != transition.life:
                return total, gamma**steps, transition.next_observation

    def check(
        self, batch: Batch, num_slots: int, n_step: int, gamma: float, exact: bool = True
    ) -> set[tuple[int, int]]:
        """Hold every row of a batch to the list, and return the (slot, column) pairs seen."""
        allowed, seen = self.sampleable(num_slots), set()
        names = ("action", "reward", "discount", "rows")
        arrays: dict[str, Array] = {name: getattr(batch, name).cpu().numpy() for name in names}
        for index, row in enumerate(arrays["rows"].tolist()):
            slot, n = divmod(row, self.num_envs)
            assert (slot, n) in allowed, f"slot {slot} of column {n} is no transition"
            seen.add((slot, n))
            transition = self.columns[n][allowed[slot, n]]
            total, discount, bootstrap = self.returns(n, allowed[slot, n], n_step, gamma)
            tolerance = 0.0 if exact else 1e-6
            assert abs(arrays["reward"][index] - total) <= tolerance * 100
            assert abs(arrays["discount"][index] - discount) <= tolerance
            assert arrays["action"][index, 0] == np.float32(transition.action)
            for group in DIMS:
                observation, next_observation = batch.observation[group][index], batch.next_observation[group][index]
                assert observation.tolist() == groups([transition.observation])[group][0].tolist()
                assert next_observation.tolist() == groups([bootstrap])[group][0].tolist()
        return seen


def every_transition(ring: ReplayRing, n_step: int, gamma: float, kernels: str, held_out: bool = False) -> Any:
    """Batches that between them hold ranks 0 .. total - 1, each rank once (the last one repeated as filling)."""
    total = ring.held_out if held_out else ring.transitions
    size = min(ring.capacity, 7)
    sampler = Sampler(ring, size, n_step, gamma, seed=0, kernels=kernels, held_out=held_out)
    with pytest.MonkeyPatch.context() as patch:
        for begin in range(0, total, size):
            ranks = torch.arange(begin, begin + size, device=ring.device).clamp(max=total - 1)
            patch.setattr(replay_sample.seeding, "uniform_integers", lambda *_, ranks=ranks: ranks)
            patch.setattr(replay_sample, "_fractions", lambda *_, ranks=ranks: Fixed(ranks))
            if kernels == "triton":  # it draws inside the kernel: give it the rows that the reference locates
                sampler.buffers.rows.copy_(replay_sample._locate_torch(sampler.buffers, 0))
                patch.setattr(sampler, "prioritisation", "given")
                rows = sampler.buffers.rows.clone()
                patch.setattr(sampler, "_prioritised", lambda *_, rows=rows: (rows, None))
            yield sampler.sample(0)


class Fixed:
    """Fractions that give fixed integers."""

    def __init__(self, ranks: torch.Tensor) -> None:
        self.ranks = ranks

    def integers(self, bound: Any) -> Any:
        return self.ranks.numpy()


def copies(batch: Any) -> list[torch.Tensor]:
    groups = [*batch.observation.values(), *batch.next_observation.values()]
    return [tensor.cpu().clone() for tensor in [batch.rows, batch.action, batch.reward, batch.discount, *groups]]


def against_the_list(
    num_envs: int, capacity: int, n_step: int, autoreset: AutoresetMode, end_probability: float,
    gamma: float, actions: list[str], kernels: str, holdout: float, seed: int, device: str = "cpu",
) -> None:  # fmt: skip
    """A ring that is stepped, rebuilt and checked against the simulation's list of transitions as ``actions`` say."""
    envs = Simulation(num_envs, autoreset, np.random.default_rng(seed), end_probability)
    held = Holdout(holdout, seed) if holdout else None
    ring = envs.ring(capacity, num_envs, autoreset, kernels=kernels, holdout=held, device=device)
    envs.begin(ring)
    for action in [*actions, "check"]:
        if action == "step":
            envs.step(ring)
        elif action == "begin":
            envs.begin(ring)
        else:
            check_all(envs, ring, n_step, gamma, kernels, held, seed)
    assert ring.written.tolist() == envs.rows


def check_all(
    envs: Any, ring: ReplayRing, n_step: int, gamma: float, kernels: str, held: Holdout | None, seed: int
) -> None:
    """Both queues hold what the list says, each transition once, and every row of every batch is right."""
    sampleable = envs.sampleable(ring.num_slots)
    for held_out in [False, True] if held else [False]:
        expected = {
            (slot, column)
            for (slot, column), place in sampleable.items()
            if not held or held.takes(column, envs.columns[column][place].life[1]) == held_out
        }
        seen: list[tuple[int, int]] = []
        for batch in every_transition(ring, n_step, gamma, kernels, held_out):
            envs.check(batch, ring.num_slots, n_step, gamma, exact=gamma == 0.5)
            seen += [divmod(row, ring.num_envs) for row in batch.rows.tolist()]
        total = ring.held_out if held_out else ring.transitions
        assert len(expected) == total and len(set(seen)) == total
        assert set(seen) == expected
        if total:
            drawn = Sampler(ring, min(ring.capacity, 16), n_step, gamma, seed, kernels=kernels, held_out=held_out)
            seen = envs.check(drawn.sample(seed), ring.num_slots, n_step, gamma, exact=gamma == 0.5)
            assert set(seen) <= expected


def uneven_ring(wanted: list[int], capacity: int, device: str = "cpu") -> ReplayRing:
    """Column n holds ``wanted[n]`` transitions, spread among rows that are none."""
    count, rows = len(wanted), max(wanted)
    ring = ReplayRing(capacity, count, {"policy": 1}, 1, AutoresetMode.NEXT_STEP, device=device)
    zeros = np.zeros(count, np.float32)
    ring.begin({"policy": zeros[:, None]})
    never = np.zeros(count, bool)
    for index in range(rows):
        valid = np.array([n > 0 and index % (rows // n) == 0 for n in wanted])
        ring.add(zeros[:, None], Step({"policy": zeros[:, None]}, zeros, never, never, {}), valid)
    return ring
