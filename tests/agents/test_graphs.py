"""Recorded updates equal plain ones bit for bit.

A tape stands in for a CUDA graph: like one it keeps operators with the very tensors and numbers that they were called
with, does not do them while it records, and runs no Python when it replays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from batches import on_gpu, random_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlplastic import acceleration
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.graphs import WARM_UP, cuda_graph
from rlplastic.agents.sac import SAC
from rlplastic.agents.steps import Metrics
from rlplastic.config import CategoricalCriticConfig, FlashSACConfig, FlowCriticConfig, SACConfig, ScalarCriticConfig

DIMS = {"policy": 4, "critic": 6}
ACTIONS, ENVS, ROWS = 2, 3, 16
AGENTS = ["flashsac", "sac", "flow"]


class Tape(TorchDispatchMode):
    """Operators in order; those that return a view, or write in place, leave nothing to copy when they run again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        storages = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if torch.is_tensor(leaf)]
        new = [leaf for leaf in made if leaf.untyped_storage().data_ptr() not in storages]
        self.calls.append((func, args, kwargs or {}, new))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, new in self.calls:
            result = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if torch.is_tensor(leaf)]
            for mine, again in zip(new, result, strict=bool(new)):
                mine.copy_(again)


class Recorder:
    """A `Record` by tapes, which puts back what recording moved: a graph does nothing before its first replay."""

    def __init__(self) -> None:
        self.agent: Any = None
        self.recordings = 0

    def __call__(self, work: Callable[[], Metrics]) -> tuple[Callable[[], None], Metrics]:
        before = {name: value.detach().clone() for name, value in self.agent.learned_state().items()}
        with Tape() as tape:
            metrics = work()
        self.agent.load_learned_state(before)
        self.recordings += 1
        return tape.replay, metrics


def agent_of(name: str, record: Any = None, **device: Any) -> Any:
    common: dict[str, Any] = {"critic_width": 8, "actor_width": 8, "gamma": 0.99, "final_learning_rate": 1e-5}
    if name == "sac":
        plain = SACConfig(**common, weight_decay=0.01, initial_alpha=1.0)
        return SAC(DIMS, ACTIONS, ENVS, plain, ScalarCriticConfig(), record=record, **device)
    critic = FlowCriticConfig(steps=2, noises=2) if name == "flow" else CategoricalCriticConfig(num_atoms=11)
    return FlashSAC(DIMS, ACTIONS, ENVS, FlashSACConfig(**common, num_blocks=1), critic, record=record, **device)


def recorded(name: str) -> tuple[Any, Recorder]:
    recorder = Recorder()
    recorder.agent = agent_of(name, recorder)
    return recorder.agent, recorder


def plain(name: str) -> Any:
    """With learning rates rounded to float32, as a tensor on a device holds them."""
    agent = agent_of(name)
    exact = agent.learning_rate
    agent.learning_rate = lambda index, used: float(np.float32(exact(index, used)))
    return agent


def learn(agent: Any, start: int, stop: int) -> list[dict[str, float]]:
    told = []
    for index in range(start, stop):
        metrics = agent.update(random_batch(DIMS, ACTIONS, ROWS, index, kept=0.8), index / 100)
        told.append({key: float(value) for key, value in metrics.items()})
    return told


def same(first: Any, second: Any) -> bool:
    other = second.state_dict()
    return all(torch.equal(value, other[key]) for key, value in first.state_dict().items())


@pytest.mark.parametrize("name", AGENTS)
def test_recorded_updates_are_plain_ones_bit_for_bit(name: str) -> None:
    (agent, recorder), expected = recorded(name), plain(name)
    kinds = 2 if agent.config.actor_every > 1 else 1
    assert learn(agent, 0, 40) == learn(expected, 0, 40)
    assert recorder.recordings == kinds
    assert same(agent, expected) and agent.updates == 40


def test_tensors_that_are_gone_when_a_recording_runs_again_are_not_read() -> None:
    (agent, _), expected = recorded("sac"), plain("sac")
    for index in range(4 * WARM_UP):
        batch = replace(random_batch(DIMS, ACTIONS, ROWS, index, kept=0.8), weight=torch.rand(ROWS))
        agent.update(batch, 0.0)
        expected.update(batch, 0.0)
        assert torch.equal(agent.td_error, expected.td_error)
        for tensor in (*batch.observation.values(), batch.action, batch.reward):
            tensor.fill_(torch.nan)
    assert same(agent, expected)


@pytest.mark.parametrize("name", AGENTS)
def test_a_branch_leaves_recordings_alone_and_what_it_learned_is_replayed_from(name: str) -> None:
    (agent, _), expected = recorded(name), plain(name)
    learn(agent, 0, 20), learn(expected, 0, 20)
    before = {key: value.clone() for key, value in agent.state_dict().items()}
    branch, other = agent.branch(), expected.branch()
    learn(branch, 20, 25), learn(other, 20, 25)
    assert all(torch.equal(value, before[key]) for key, value in agent.state_dict().items())
    agent.load_learned_state(other.learned_state()), expected.load_learned_state(other.learned_state())
    assert learn(agent, 20, 30) == learn(expected, 20, 30) and same(agent, expected)


def test_a_restored_agent_goes_on_as_if_it_had_not_stopped() -> None:
    first, _ = recorded("flashsac")
    learn(first, 0, 15)
    second, _ = recorded("flashsac")
    second.load_state_dict(first.state_dict())  # and so its own warm-up comes later
    assert learn(first, 15, 40) == learn(second, 15, 40) and same(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", AGENTS)
def test_cuda_graphs_compute_what_plain_updates_compute(name: str, compiled: bool) -> None:
    transform = {"compile": acceleration.compiled} if compiled else {}
    graphed, expected = (agent_of(name, record, device="cuda", **transform) for record in (cuda_graph, None))
    for index in range(30):
        batch = on_gpu(random_batch(DIMS, ACTIONS, ROWS, index, kept=0.8))
        ours, theirs = graphed.update(batch, index / 100), expected.update(batch, index / 100)
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-5, msg=f"{key} at {index}")
