"""Time of every Triton kernel on a GPU, beside the torch operations that it replaces and the time that its bytes take.

*Called* is what a training loop pays: calls one after the other, the device waited for after the last. *On the device*
is what the profiler sums over the kernels of a call; the difference is launching, which a CUDA graph saves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from rlplastic.agents.layers import NormBounds
from rlplastic.benchmarking.timing import interleaved
from rlplastic.benchmarking.update import agent_of
from rlplastic.envs.base import AutoresetMode, Step
from rlplastic.errors import ConfigurationError
from rlplastic.kernels.categorical import categorical_target, categorical_target_triton
from rlplastic.machine import probe_machine
from rlplastic.replay import ReplayRing, Sampler

OBSERVATIONS, ACTIONS, GAMMA = 348, 17, 0.99
MEMBERS, ATOMS, SUPPORT = 2, 101, 5.0
CAPTION = (
    "Microseconds of a call, median. floor: the bytes that must be read and written once, at the rate of a large copy "
    "of the same run. Sizes are Humanoid's; a vector step is one of 1,024 environments; bounds are those of twin "
    "critics of width 256."
)
CALLS = 50
"""In a row for one figure: a single call would measure how long waiting takes."""


class Contest(NamedTuple):
    """One piece of work, done by several implementations."""

    kernel: str
    size: str
    moved: int
    """Bytes that must be read or written."""
    works: Mapping[str, Callable[[], object]]
    """By implementation, of which ``triton`` and ``torch`` are always there."""


def measure(options: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - the verb's arguments
    """A row for every kernel, size and implementation.

    Raises:
        ConfigurationError: there is no GPU.
    """
    machine = probe_machine("auto")
    if machine.device == "cpu":
        raise ConfigurationError(
            "what=kernels measures Triton kernels, but torch sees no GPU here; expected a CUDA device, so run it on one"
        )
    rate = _copy_rate()
    rows = []
    for contest in contests(machine.device, options.quick):
        called = _called(contest.works, options.repeats)
        for name, work in contest.works.items():
            rows.append(
                {
                    "kernel": contest.kernel,
                    "size": contest.size,
                    "by": name,
                    "us called": called[name],
                    "times triton's": called[name] / called["triton"],
                    "us on the device": _on_the_device(work),
                    "floor us": contest.moved / rate * 1e6,
                }
            )
    return rows


def contests(device: str, quick: bool = False) -> Iterator[Contest]:
    """All of them, made one after the other, since a replay takes gigabytes."""
    batches, envs = ([64], 8) if quick else ([2048, 8192], 1024)
    capacity = 1_000 if quick else 1_000_000
    for dtype, n_step in (("float32", 1), ("bfloat16", 3)):
        yield from _replay(device, capacity, envs, batches, dtype, n_step)
    for rows in batches:
        yield _categorical(device, rows)
    yield _bounds(device, 32 if quick else 256)


def _replay(device: str, capacity: int, envs: int, batches: list[int], dtype: str, n_step: int) -> Iterator[Contest]:
    rings = {
        name: ReplayRing(
            capacity, envs, {"policy": OBSERVATIONS}, ACTIONS, AutoresetMode.NEXT_STEP, dtype, device, kernels=name
        )
        for name in ("triton", "torch")
    }
    rng = np.random.default_rng(0)
    observation = {"policy": rng.standard_normal((envs, OBSERVATIONS), np.float32)}
    action = rng.uniform(-1, 1, (envs, ACTIONS)).astype(np.float32)
    reward, always = rng.standard_normal(envs, np.float32), np.ones(envs, np.bool_)
    step = Step(observation, reward, np.zeros(envs, np.bool_), np.zeros(envs, np.bool_), {})
    for ring in rings.values():
        ring.begin(observation)
        for _ in range(ring.num_slots):
            ring.add(action, step, always)
    stored = rings["torch"].layout.row_bytes
    add = {name: partial(ring.add, action, step, always) for name, ring in rings.items()}
    yield Contest("store a vector step", f"{envs} x {stored} bytes, {dtype}", 2 * envs * stored, add)
    scale = torch.tensor(0.5, device=device)
    for batch in batches:
        draws = {
            name: partial(_draw, Sampler(ring, batch, n_step, GAMMA, seed=0, kernels=name), iter(range(10**9)), scale)
            for name, ring in rings.items()
        }
        written = 8 * batch * rings["torch"].layout.batch_width
        yield Contest("draw a batch", f"{batch}, {dtype}, n = {n_step}", 2 * batch * stored + written, draws)


def _draw(sampler: Sampler, numbers: Iterator[int], scale: torch.Tensor) -> None:
    sampler.sample(next(numbers), scale)


def _categorical(device: str, rows: int) -> Contest:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(MEMBERS, rows, ATOMS, generator=rng).to(device)
    reward, bonus = (torch.randn(rows, generator=rng).to(device) / 10 for _ in range(2))
    discount, atoms = torch.full((rows,), GAMMA, device=device), torch.linspace(-SUPPORT, SUPPORT, ATOMS, device=device)
    given = logits, reward, discount, bonus, atoms, SUPPORT
    works: dict[str, Callable[[], object]] = {
        "triton": partial(categorical_target_triton, *given),
        "torch": partial(categorical_target, *given),
        "torch, compiled": partial(torch.compile(categorical_target, dynamic=False, fullgraph=True), *given),
    }
    moved = 4 * (logits.numel() + rows * ATOMS + 4 * rows)
    return Contest("categorical target", f"{rows} x {MEMBERS} x {ATOMS}", moved, works)


def _bounds(device: str, width: int) -> Contest:
    critic = agent_of("flashsac", width, 64, [f"device={device}"]).learner.critic
    bounds = {name: NormBounds(critic, name) for name in ("triton", "torch")}
    works: dict[str, Callable[[], object]] = {name: bound.project for name, bound in bounds.items()}
    numbers = sum(parameter.numel() for parameter in critic.parameters())
    return Contest("norm bounds", f"{numbers:,} numbers", 8 * numbers, works)


def _copy_rate() -> float:
    """Bytes per second, read and written, of copying a gigabyte within the device."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (_called({"copy": partial(target.copy_, source)}, 5)["copy"] / 1e6)


def _called(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    bursts = {name: partial(_burst, work) for name, work in works.items()}
    times = interleaved(bursts, repeats, wait=torch.cuda.synchronize)
    return {name: microseconds / CALLS for name, microseconds in times.items()}


def _burst(work: Callable[[], object]) -> None:
    for _ in range(CALLS):
        work()


def _on_the_device(work: Callable[[], object]) -> float:
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        _burst(work)
        torch.cuda.synchronize()
    return float(sum(event.self_device_time_total for event in profiled.key_averages())) / CALLS
