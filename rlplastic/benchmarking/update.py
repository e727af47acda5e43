"""Time of one update against its arithmetic floor: the matrix products of the same update, done alone.

With ``critic=flow``: of updates with flow critics, by steps and noises, against those with categorical and scalar ones.

The products are those that two updates (one with an actor step) really do, recorded from an eager run with their
shapes, strides and precision; the floor is the time that they take one after the other on tensors that lie ready.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlplastic.acceleration import barrier, compiled
from rlplastic.agents import make_agent
from rlplastic.agents.graphs import WARM_UP, Record, cuda_graph
from rlplastic.benchmarking.timing import interleaved
from rlplastic.composition import compose
from rlplastic.machine import probe_machine
from rlplastic.presets import resolve
from rlplastic.replay.sample import Batch

OBSERVATIONS, ACTIONS = 348, 17
CAPTION = (
    "Milliseconds per update, median; FlashSAC's actor learns every second time. floor: the same products alone; "
    "categorical, scalar: the same agent with that critic."
)
SIZES = {"flashsac": [(256, 512), (128, 256), (64, 256)], "sac": [(256, 256), (128, 128)]}
"""Width of the critic, and batch: published, smaller, `preset=auto` on few cores; for plain SAC usual, and smaller."""
GPU_SIZES = {"flashsac": [(256, 2048)], "sac": [(256, 256)]}
"""On a GPU: published, and usual."""
COUNTS = (1, 2, 4, 8)
"""Steps and noises of flow critics; 8 and 8 are published."""
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
Product = tuple[Any, list[tuple[torch.Size, tuple[int, ...], torch.dtype]]]


def measure(options: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - the verb's arguments
    """A row for every size and precision, compiled where a compiler is found, and eager; quick: eager only.

    On a GPU there is a row for either as a CUDA graph, too, and the floor is that of a graph of the products.

    Compiling takes about a minute for each row. Of flow critics there is a row for every number of steps and of noises,
    eager only: the ratio is what is asked for, and 16 of their losses would compile for an hour.
    """
    machine = probe_machine("auto")
    if options.critic == "flow":
        return _flow_rows(COUNTS[:2] if options.quick else COUNTS, options.quick, options.repeats)
    on_cpu = machine.device == "cpu"
    eager = options.quick or (machine.compiler is None and on_cpu)
    graphed = ["off"] if on_cpu else ["on", "off"]
    ways = [(compile, graphs) for compile in (["off"] if eager else ["on", "off"]) for graphs in graphed]
    plain = ["float32"] if on_cpu else ["tf32"]
    return [
        _row(agent, width, batch, precision, compile, graphs, options.repeats)
        for agent, sizes in (SIZES if on_cpu else GPU_SIZES).items()
        for width, batch in ([(32, 64)] if options.quick else sizes)
        for precision in (["bf16"] if machine.bf16_hardware and agent != "sac" else []) + plain
        for compile, graphs in ways
    ]


def _flow_rows(counts: Sequence[int], quick: bool, repeats: int) -> list[dict[str, Any]]:
    machine = probe_machine("auto")
    flows = {
        (steps, noises): ["critic=flow", f"critic.steps={steps}", f"critic.noises={noises}"]
        for steps in counts
        for noises in counts
    }
    overrides: dict[Any, list[str]] = {kind: [f"critic={kind}"] for kind in ("categorical", "scalar")}
    overrides.update(flows)
    width, batch = (32, 64) if quick else (64, 256)
    drawn = _batch(batch, machine.device)
    rows = []
    for name in ("flashsac", "sac"):
        works = {key: partial(_two, agent_of(name, width, batch, words), drawn) for key, words in overrides.items()}
        times = {key: time / 2e3 for key, time in interleaved(works, repeats, wait=barrier(machine.device)).items()}
        rows += [
            {
                "agent": name,
                "width": width,
                "batch": batch,
                "steps": steps,
                "noises": noises,
                "update ms": times[steps, noises],
                "categorical ms": times["categorical"],
                "scalar ms": times["scalar"],
                "times categorical": times[steps, noises] / times["categorical"],
                "GFLOP": sum(map(_flop, _products(works[steps, noises]))) / 2e9,
            }
            for steps, noises in flows
        ]
    return rows


def agent_of(
    name: str,
    width: int,
    batch: int,
    overrides: Sequence[str],
    compile: Callable[[Any], Any] = lambda function: function,
    record: Record | None = None,
) -> Any:  # noqa: ANN401 - an agent, of which `Agent` shows less
    """An agent of Humanoid's sizes on this machine; ``compile`` and ``record`` are what `make_agent` takes."""
    actor = width if name == "sac" else width // 2
    sizes = [f"agent.critic_width={width}", f"agent.actor_width={actor}", f"replay.batch_size={batch}"]
    config, _ = resolve(compose([f"agent={name}", *sizes, *overrides, "compile=off"]), probe_machine("auto"))
    return make_agent(config, {"policy": OBSERVATIONS}, ACTIONS, compile, record=record)


def _row(name: str, width: int, batch: int, precision: str, compile: str, graphs: str, repeats: int) -> dict[str, Any]:
    machine = probe_machine("auto")
    agent_with = partial(agent_of, name, width, batch, [f"precision={precision}"])
    drawn = _batch(batch, machine.device)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    products = _products(lambda: _two(agent_with(), drawn))
    floor = _replay(products, machine.device)
    if machine.device != "cpu":  # as one launch: a floor of products, and not of launches
        floor()
        floor, _ = cuda_graph(floor)
    transform = compiled if compile == "on" else lambda function: function
    agent = agent_with(transform, cuda_graph if graphs == "on" else None)
    for _ in range(WARM_UP + 1 if graphs == "on" else 0):  # until both kinds of updates are recorded
        _two(agent, drawn)
    works = {"update": lambda: _two(agent, drawn), "floor": floor}
    times = interleaved(works, repeats, wait=barrier(machine.device))
    update_ms, floor_ms = (times[name] / 2e3 for name in ("update", "floor"))
    return {
        "agent": name,
        "width": width,
        "batch": batch,
        "precision": precision,
        "compile": compile,
        "graphs": graphs,
        "update ms": update_ms,
        "floor ms": floor_ms,
        "ratio": update_ms / floor_ms,
        "GFLOP": sum(_flop(product) for product in products) / 2e9,
    }


def _batch(size: int, device: str) -> Batch:
    rng = torch.Generator().manual_seed(0)
    block = torch.randn(2 * size, OBSERVATIONS + ACTIONS, generator=rng).to(device)
    return Batch(
        observation={"policy": block[:size, :OBSERVATIONS]},
        action=block[:size, OBSERVATIONS:].tanh(),
        reward=torch.randn(size, generator=rng).to(device) / 10,
        discount=torch.full((size,), 0.99, device=device),
        next_observation={"policy": block[size:, :OBSERVATIONS]},
        rows=torch.zeros(size, dtype=torch.int64, device=device),
    )


def _two(agent: Any, drawn: Batch) -> None:  # noqa: ANN401
    for _ in range(2):
        agent.update(drawn, 0.5)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Product] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if func.overloadpacket.__name__ in PRODUCTS:
            tensors = [(t.shape, t.stride(), t.dtype) for t in args if isinstance(t, Tensor)]
            self.seen.append((func, tensors))
        return func(*args, **(kwargs or {}))


def _products(work: Callable[[], None]) -> list[Product]:
    with _Recorder() as recorder:
        work()
    seen: list[Product] = recorder.seen
    return seen


def _replay(products: list[Product], device: str) -> Callable[[], None]:
    def tensor(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        stored = [
            size if step else 1 for size, step in zip(shape, stride, strict=True)
        ]  # what is expanded is there once
        once = torch.empty_strided(stored, stride, dtype=torch.float32, device=device).normal_().to(dtype)
        return once.expand(shape)

    ready = [(func, [tensor(*spec) for spec in specs]) for func, specs in products]

    def work() -> None:
        for func, tensors in ready:
            func(*tensors)

    return work


def _flop(product: Product) -> float:
    (left, _, _), (right, _, _) = product[1][-2:]
    return 2.0 * left.numel() * right[-1]
