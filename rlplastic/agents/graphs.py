"""Updates as recorded graphs: a GPU gets one launch per update instead of some three hundred.

A recording is one of addresses, not of values. What changes between two updates therefore lives in tensors that stay
where they are: the batch, the noise, and the learning rates, which are plain numbers elsewhere. An update that moves
the actor and one that does not are two recordings. Noise is drawn outside, by the number of the update as always.

What records is injected: `cuda_graph` on a GPU, a tape of operators in the tests, which run on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from rlplastic.agents.steps import CriticNoise, Inputs, Metrics, Rates

T = TypeVar("T")
WARM_UP = 3
"""Updates of either kind that run as they are before one is recorded: they compile, allocate and choose algorithms."""
Move = Callable[[Inputs, Tensor | None, CriticNoise, Rates], Metrics]
Record = Callable[[Callable[[], Metrics]], tuple[Callable[[], None], Metrics]]
"""Records a work without doing it; returns what does it, and the metrics that hold its results from then on."""


def cuda_graph(work: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """A `Record` as a CUDA graph, of any work; other threads may use the device meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = work()
    return graph.replay, results


class GraphedUpdate:
    """Runs an agent's updates through recordings, which move the very tensors that the updates move.

    The metrics of a recorded update hold until the next one of its kind: whoever keeps them longer copies them.

    Args:
        record: see `Record`.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._recordings: dict[bool, _Recording] = {}

    def __call__(
        self, move: Move, inputs: Inputs, actor_noise: Tensor | None, critic_noise: CriticNoise, rates: Rates
    ) -> Metrics:
        """What ``move`` does with the other arguments, whose shapes are those of the first call."""
        actor_moves = actor_noise is not None
        if actor_moves not in self._recordings:
            self._recordings[actor_moves] = _Recording(inputs, actor_noise, critic_noise)
        recording = self._recordings[actor_moves]
        recording.take(inputs, actor_noise, critic_noise, rates)
        return recording.run(move, self._record)


class _Recording:
    """One kind of update: the tensors that it reads, and what replays it."""

    def __init__(self, inputs: Inputs, actor_noise: Tensor | None, critic_noise: CriticNoise) -> None:
        self._read = tree_map_only(Tensor, torch.clone, (vars(inputs), actor_noise, critic_noise))
        # In float32, since torch's fused Adam reads no other tensor on a GPU.
        self._rates = torch.zeros(len(Rates._fields), device=inputs.reward.device).unbind()
        self._runs = 0
        self._replay: Callable[[], None] | None = None
        self._metrics: Metrics = {}

    def take(self, inputs: Inputs, actor_noise: Tensor | None, critic_noise: CriticNoise, rates: Rates) -> None:
        """Write what the next run reads."""
        torch._foreach_copy_(_tensors(self._read), _tensors((vars(inputs), actor_noise, critic_noise)))
        for held, rate in zip(self._rates, rates, strict=True):
            held.fill_(rate)

    def run(self, move: Move, record: Record) -> Metrics:
        """Once more, recording it if it is time."""
        if self._runs < WARM_UP:
            self._runs += 1
            return self._moved(move)
        if self._replay is None:
            self._replay, self._metrics = record(partial(self._moved, move))
        self._replay()
        return dict(self._metrics)

    def _moved(self, move: Move) -> Metrics:
        inputs, actor_noise, critic_noise = self._read
        return move(Inputs(**inputs), actor_noise, critic_noise, Rates(*self._rates))


def _tensors(tree: Any) -> list[Tensor]:  # noqa: ANN401 - nested dictionaries and tuples
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
