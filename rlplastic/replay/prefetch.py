"""Batches from a replay that lies in the host's memory: the next one is gathered and copied while the learner learns.

Within one vector step the ring does not change, so a batch that is drawn early is the batch that would have been drawn
in time: prefetching changes no bit. A worker thread gathers into page-locked memory (torch and numpy release the
interpreter's lock there) and copies on a stream of its own; two buffers take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlplastic.kernels.replay_sample import Draw
from rlplastic.replay.sample import Batch, Sampler, batch_of

WRITTEN = ("block", "reward", "discount", "rows")
"""What a draw writes, and what is copied to the learner's device."""


@dataclass
class _Buffer:
    """One of the two places that a batch passes through."""

    host: Sampler
    draw: Draw
    """What the host's sampler writes to, on the learner's device."""
    batch: Batch
    copied: torch.cuda.Event | None = None
    """When the copy out of the host's buffer is over."""


class PrefetchingSampler:
    """Draws from a ring on the host, delivers on ``device``; the same batches as `Sampler`.

    Args:
        make_host: builds a sampler of the host's ring, with page-locked buffers where ``device`` is a GPU.
        device: the learner's.
    """

    def __init__(self, make_host: Callable[[], Sampler], device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._buffers = [self._buffer(make_host()) for _ in range(2)]
        self._stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="replay prefetch")

    def _buffer(self, host: Sampler) -> _Buffer:
        written: dict[str, Any] = {
            name: torch.zeros_like(getattr(host.buffers, name), device=self.device) for name in WRITTEN
        }
        draw = replace(host.buffers, **written)
        return _Buffer(host, draw, batch_of(host.ring, draw))

    def batches(self, first: int, count: int, reward_scale: Tensor | None = None) -> Iterator[Batch]:
        """Draws ``first`` .. ``first + count - 1``; the ring must not be written to before the last one.

        Raises:
            ConfigurationError: the ring holds no transition yet.
        """
        if count < 1:
            return
        following = self._start(first)
        for draw in range(first, first + count):
            buffer = following.result()
            if draw + 1 < first + count:
                following = self._start(draw + 1)
            if buffer.copied is not None:
                torch.cuda.current_stream(self.device).wait_event(buffer.copied)
            if reward_scale is not None:
                buffer.draw.reward.mul_(reward_scale)
            yield buffer.batch

    def _start(self, draw: int) -> Future[_Buffer]:
        """Begin to fetch a draw into the buffer that the learner has finished with, as far as it has been told to."""
        free = None
        if self._stream is not None:
            free = torch.cuda.current_stream(self.device).record_event()
        return self._worker.submit(self._fetch, draw, free)

    def _fetch(self, draw: int, free: torch.cuda.Event | None) -> _Buffer:
        buffer = self._buffers[draw % 2]
        if buffer.copied is not None:
            buffer.copied.synchronize()  # the host's buffer may still be on its way
        buffer.host.sample(draw)
        if self._stream is not None and free is not None:
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(free)
                self._copy(buffer)
                buffer.copied = self._stream.record_event()
        else:
            self._copy(buffer)
        return buffer

    @staticmethod
    def _copy(buffer: _Buffer) -> None:
        for name in WRITTEN:
            getattr(buffer.draw, name).copy_(getattr(buffer.host.buffers, name), non_blocking=True)

    def reprioritise(self, rows: Tensor, td_error: Tensor) -> None:
        """Priorities are not kept on the host; there is nothing to do."""
