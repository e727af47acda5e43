"""Where the time of a flow critic's update goes: what telling z and t to the network takes of it.

    python benchmarks/flow_profile.py

For both agents, eager, 64 wide, batch 128, K = m = 4 (a row for each precision): the shares of torch's profiler, of all
operations of ten updates, that go to the HL-Gauss code of z, to the cosines of t, to matrix products, and to all other
operations. They are shares of the same run, so other work on the machine changes them little.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from rlplastic.agents import make_agent
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.flow import Encoding
from rlplastic.agents.sac import SAC
from rlplastic.composition import compose
from rlplastic.presets import probe_machine, resolve
from rlplastic.replay.sample import Batch

OBSERVATIONS, ACTIONS, ROWS, UPDATES = 11, 3, 128, 10
"""Hopper's sizes."""
COMMON = [
    *("agent.critic_width=64", "agent.actor_width=64", f"replay.batch_size={ROWS}", "compile=off"),
    *("critic=flow", "critic.steps=4", "critic.noises=4"),
]
AGENTS = {
    "flashsac, float32": ["agent=flashsac", "precision=float32"],
    "flashsac, bf16": ["agent=flashsac", "precision=bf16"],
    "sac": ["agent=sac"],
}
PRODUCTS = ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")


def recorded(name: str) -> None:
    """Let the profiler see a method of `Encoding` by its name."""
    method = getattr(Encoding, name)

    def seen(self: Encoding, values: Tensor) -> Tensor:
        with record_function(name):
            result: Tensor = method(self, values)
            return result

    setattr(Encoding, name, seen)


def batch() -> Batch:
    """Random numbers."""
    rng = torch.Generator().manual_seed(0)
    here, there = torch.randn(2, ROWS, OBSERVATIONS, generator=rng)
    return Batch(
        observation={"policy": here},
        action=torch.rand(ROWS, ACTIONS, generator=rng) * 2 - 1,
        reward=torch.randn(ROWS, generator=rng) / 10,
        discount=torch.full((ROWS,), 0.99),
        next_observation={"policy": there},
        rows=torch.zeros(ROWS, dtype=torch.int64),
    )


def shares(overrides: list[str]) -> dict[str, float]:
    """Shares of an update's operations, which sum to 1."""
    config, _ = resolve(compose([*overrides, *COMMON]), probe_machine("cpu"))
    agent = make_agent(config, {"policy": OBSERVATIONS}, ACTIONS)
    assert isinstance(agent, FlashSAC | SAC)
    drawn = batch()
    agent.update(drawn, 0.5)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(UPDATES):
            agent.update(drawn, 0.5)
    events = {event.key: event for event in profiler.key_averages()}
    total = sum(event.self_cpu_time_total for event in events.values())
    found = {name: events[name].cpu_time_total / total for name in ("code", "time")}
    found["products"] = sum(events[name].self_cpu_time_total for name in PRODUCTS if name in events) / total
    return found | {"rest": 1 - sum(found.values())}


def main() -> None:
    """See the module."""
    torch.set_num_threads(1)
    for name in ("code", "time"):
        recorded(name)
    print("| agent | code of z | cosines of t | matrix products | all else |\n|---|---|---|---|---|")
    for name, overrides in AGENTS.items():
        print(f"| {name} | {' | '.join(f'{share:.1%}' for share in shares(overrides).values())} |", flush=True)


if __name__ == "__main__":
    main()
