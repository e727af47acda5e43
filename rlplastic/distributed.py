"""The ranks of one training under `torchrun`: who they are, what they agree on, and gradients as one message.

All ranks do the same: each steps its environments, keeps its part of the replay, and moves its copy of the networks by
the gradient averaged over all of them (data-parallel training; Li et al., "PyTorch Distributed", VLDB 2020). Whatever
decides anything is the same number on every rank, so that all of them always meet in the same message.

Alone, a process takes part in nothing: every method of `ALONE` gives back what it was given.
"""

from __future__ import annotations

import copy
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from rlplastic import errors
from rlplastic.config import Config
from rlplastic.errors import ConfigurationError, DistributedError, RlplasticError

T = TypeVar("T")
Reduce = Callable[[list[Tensor]], list[Tensor]]
"""From one rank's tensors to their means over all ranks, dense, in the same order; valid until it is called again."""
ALIGNMENT = 4
"""Elements of float32 at whose multiples a tensor begins in a bucket: 16 bytes, the widest load of a GPU."""
POLL_SECONDS = 0.02


def dense(tensors: list[Tensor]) -> list[Tensor]:
    """The means over one rank: only what does not lie densely is copied."""
    return [tensor.contiguous() for tensor in tensors]


@dataclass(frozen=True)
class Group:
    """One rank among ``size``; made by `joined`."""

    rank: int = 0
    size: int = 1
    timeout: float = 0.0
    """Seconds that a rank waits for the others."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """Itself: a copy of an agent learns among the same ranks."""
        return self

    # Messages

    def gather(self, values: Tensor) -> Tensor:
        """Every rank's ``values``, tensors of one shape on the CPU, as (size, ...).

        Raises:
            DistributedError: a rank is gone, or silent for longer than the time-out; so in all methods below.
        """
        if self.size == 1:
            return values.unsqueeze(0)
        received = [torch.empty_like(values) for _ in range(self.size)]
        with self._waiting():
            dist.all_gather(received, values)
        return torch.stack(received)

    def average(self, tensor: Tensor) -> None:
        """Replace ``tensor``, on any device, by its mean over ranks: the same bits on all of them."""
        if self.size > 1:
            with self._waiting():
                dist.all_reduce(tensor)
            tensor.div_(self.size)

    def joined_rows(self, tensor: Tensor) -> Tensor:
        """Every rank's rows of ``tensor`` (B, ...), on its device, in the order of ranks: (size * B, ...)."""
        return tensor if self.size == 1 else self.gather(tensor.cpu()).flatten(0, 1).to(tensor.device)

    def exchange(self, document: Any) -> list[Any]:  # noqa: ANN401 - whatever JSON can hold
        """Every rank's ``document``, of anything that JSON can hold, in the order of ranks."""
        if self.size == 1:
            return [document]
        content = torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8)
        lengths = self.gather(torch.tensor(len(content))).tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(content)] = content
        received = self.gather(padded).numpy()
        return [json.loads(received[rank, :length].tobytes()) for rank, length in enumerate(lengths)]

    # Decisions

    def numbers(self, values: Sequence[float]) -> list[Sequence[float]]:
        """Every rank's ``values``, as many on each, in the order of ranks."""
        return [values] if self.size == 1 else self.gather(torch.tensor(values, dtype=torch.float64)).tolist()

    def total(self, count: int) -> int:
        """The sum of every rank's ``count``."""
        return sum(int(theirs) for (theirs,) in self.numbers([count]))

    def all(self, flag: bool) -> bool:
        """Whether ``flag`` is set on every rank."""
        return self.total(flag) == self.size

    def attempt(self, work: Callable[[], T], where: bool = True) -> T | None:
        """The result of ``work`` on the ranks ``where`` it is to be done, None elsewhere; it must not send messages.

        Raises:
            RlplasticError: that of a rank that met one, on all ranks, after all have done their part.
        """
        result, problem = None, None
        try:
            result = work() if where else None
        except RlplasticError as error:
            if self.size == 1:
                raise
            problem = error
        told = self.exchange(None if problem is None else [type(problem).__name__, str(problem)])
        if problem is not None:
            raise problem
        for rank, answer in enumerate(told):
            if answer is not None:
                raise getattr(errors, answer[0], RlplasticError)(f"rank {rank}: {answer[1]}")
        return result

    def require_equal(self, values: dict[str, int], what: str) -> None:
        """Compare numbers, by name, between ranks.

        Raises:
            DistributedError: they differ; the sentence begins with ``what`` and names the first that does.
        """
        gathered = self.gather(torch.tensor(list(values.values())))
        for name, column in zip(values, gathered.T, strict=True):
            if (column != column[0]).any():
                raise DistributedError(
                    f"{what}: {name} differs between ranks; expected the same bits everywhere, so look for a machine "
                    "with another processor or GPU, then rerun the command, which goes on from the last checkpoint"
                )

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0].partition(". ")[0]
            raise DistributedError(
                f"rank {self.rank} of {self.size} lost the others ({reason}); expected an answer within "
                f"{self.timeout:g} s: look for the first error of another rank, then rerun the command, which goes on "
                "from the last checkpoint"
            ) from error


ALONE = Group()
"""A process that trains by itself."""


class Bucket:
    """The gradients of one optimizer, and what travels with them, as one message.

    The first call lays out a flat tensor with a place for each tensor of the list; what is given back are views of it,
    which the optimizer reads as they lie.

    Args:
        average: replaces a tensor by its mean over ranks.
    """

    def __init__(self, average: Callable[[Tensor], None]) -> None:
        self._average = average
        self._flat = torch.empty(0)
        self._views: list[Tensor] = []

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        """The means over ranks, float32; see `Reduce`."""
        if not self._views:
            self._lay_out(tensors)
        torch._foreach_copy_(self._views, tensors)
        self._average(self._flat)
        return self._views

    def _lay_out(self, tensors: list[Tensor]) -> None:
        sizes = [-(-tensor.numel() // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        self._flat = torch.zeros(sum(sizes), device=tensors[0].device)
        places = torch.split(self._flat, sizes)
        self._views = [p[: t.numel()].view(t.shape) for p, t in zip(places, tensors, strict=True)]


@contextmanager
def joined(device: str, timeout: float) -> Iterator[Group]:
    """This process as a rank of the group that `torchrun` started it in; `ALONE` without one.

    Args:
        device: as asked for; ranks of one machine take its GPUs in turn.
        timeout: seconds that a rank waits for the others.

    Raises:
        DistributedError: the others did not come.
    """
    size = world_size()
    if size == 1:
        yield ALONE
        return
    group = Group(int(os.environ["RANK"]), size, timeout)
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    limit = timedelta(seconds=timeout)
    with group._waiting():
        store, rank, _ = next(rendezvous("env://", timeout=limit))
        corner = meet(store, rank, size, timeout)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=corner, rank=rank, world_size=size, timeout=limit)
    yield group
    dist.destroy_process_group()  # after an error the others may be gone, and waiting for them would hide it


def meet(store: Store, rank: int, size: int, timeout: float) -> Store:
    """The corner of ``store`` that belongs to the ranks of this start alone.

    torchrun keeps its store when it restarts ranks, and in it where the dead ones listened. How often it restarted
    them does not tell starts apart: every machine counts the ends of its own ranks. But all ranks of a start are dead
    before one of the next begins. So each leaves a name that nobody had before, and the first answers whatever names
    lie there, those of the dead too, until each rank has come by its answer.

    Raises:
        RuntimeError: a rank did not come within ``timeout`` seconds.
    """
    name = uuid.uuid4().hex
    if rank:
        store.set(f"rank {rank}", name)
        corner = PrefixStore(store.get(f"answer to {name}").decode(), store)
        corner.set(f"rank {rank}", "")
        return corner
    corner = PrefixStore(name, store)
    limit = time.monotonic() + timeout
    for other in range(1, size):
        while not corner.check([f"rank {other}"]):
            if time.monotonic() > limit:
                raise RuntimeError(f"rank {other} did not come")
            store.set(f"answer to {store.get(f'rank {other}').decode()}", name)
            time.sleep(POLL_SECONDS)
    return corner


def world_size() -> int:
    """Ranks that `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_ranks() -> int:
    """Ranks on this machine, which share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def restarts() -> int:
    """How often `torchrun --max-restarts` has started all ranks anew after one of this machine died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def share_of(config: Config, group: Group) -> Config:
    """The configuration of one rank: its environments, its rows of every batch, its part of the replay.

    With ``distributed.scale_batch`` every rank draws a whole ``replay.batch_size``. Counts of transitions (budget,
    minimum, cadences) and the replay ratio stay those of all ranks together.

    Raises:
        ConfigurationError: environments or rows cannot be dealt out evenly, or losses that send messages be compiled.
    """
    config = copy.deepcopy(config)
    envs, batch, capacity = config.env.num_envs, config.replay.batch_size, config.replay.capacity
    assert envs and batch and capacity and config.env.threads, "resolve the configuration first"
    if group.size == 1:
        return config
    if config.compile == "on" and config.distributed.bn_sync == "forward":
        raise ConfigurationError(
            "compile=on does not go with distributed.bn_sync=forward, whose losses send messages; leave one of them out"
        )
    rows = {} if config.distributed.scale_batch else {"replay.batch_size": batch}
    for key, count in {"env.num_envs": envs, **rows}.items():
        if count % group.size:
            raise ConfigurationError(
                f"{key}={count} cannot be dealt out to {group.size} ranks; expected a multiple of {group.size}"
            )
    config.env.num_envs = envs // group.size
    config.env.threads = min(config.env.threads, config.env.num_envs)
    config.replay.capacity = -(-capacity // envs) * config.env.num_envs  # as many slots per environment as alone
    if not config.distributed.scale_batch:
        config.replay.batch_size = batch // group.size
    return config
