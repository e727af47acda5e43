"""Ranks as threads of one process: the messages of `rlplastic.distributed.Group` without torch.distributed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlplastic.distributed import Group


class Board:
    """Where ranks leave what they send, and meet."""

    def __init__(self, size: int) -> None:
        self.sent: list[Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=60)


@dataclass(frozen=True)
class Threads(Group):
    """One rank; sums are taken in the order of ranks, so all ranks get the same bits."""

    board: Board = field(default_factory=lambda: Board(1))
    averaged: list[int] = field(default_factory=list)
    """Bytes of every tensor that was averaged, in order."""

    def gather(self, values: Tensor) -> Tensor:
        self.board.sent[self.rank] = values.clone()
        self.board.barrier.wait()
        received = torch.stack(self.board.sent)
        self.board.barrier.wait()
        return received

    def average(self, tensor: Tensor) -> None:
        self.averaged.append(tensor.numel() * tensor.element_size())
        tensor.copy_(self.gather(tensor).mean(0))


def on_ranks(size: int, work: Callable[[Threads], Any]) -> list[Any]:
    """What ``work`` returns, or raises, on every rank."""
    board, results = Board(size), [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(Threads(rank, size, 60.0, board))
        except BaseException as error:
            results[rank] = error
            if not isinstance(error, Exception) or type(error).__module__ != "rlplastic.errors":
                board.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def succeed(size: int, work: Callable[[Threads], Any]) -> list[Any]:
    """What ``work`` returns on every rank; the first error is raised."""
    results = on_ranks(size, work)
    errors = [result for result in results if isinstance(result, BaseException)]
    broken = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    for error in broken or errors:
        raise error
    return results
