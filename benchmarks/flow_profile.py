"""What telling z and t to its network costs a flow critic's update: the question whether a fused kernel would pay.

    python benchmarks/flow_profile.py

For both agents, eager, 64 wide, batch 128, K = m = 4: the shares of an update's processor time that go to the HL-Gauss
code of z and to the cosines of t, neither of which has a gradient. Processor time of this process, not wall time, so
that other work on the machine changes little.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from rlplastic.agents import make_agent
from rlplastic.agents.flow import Encoding
from rlplastic.composition import compose
from rlplastic.machine import probe_machine
from rlplastic.presets import resolve
from rlplastic.replay.sample import Batch

OBSERVATIONS, ACTIONS, ROWS, UPDATES = 11, 3, 128, 100
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


def counted(name: str, spent: dict[str, float]) -> None:
    """Add the time of every call of a method of `Encoding` to ``spent``."""
    method = getattr(Encoding, name)

    def call(self: Encoding, values: Tensor) -> Tensor:
        begun = time.process_time()
        result: Tensor = method(self, values)
        spent[name] = spent.get(name, 0.0) + time.process_time() - begun
        return result

    setattr(Encoding, name, call)


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


def main() -> None:
    """See the module."""
    torch.set_num_threads(1)
    spent: dict[str, float] = {}
    for name in ("code", "time"):
        counted(name, spent)
    print("| agent | ms of an update | code of z | cosines of t |\n|---|---|---|---|")
    for name, overrides in AGENTS.items():
        config, _ = resolve(compose([*overrides, *COMMON]), probe_machine("cpu"))
        agent = make_agent(config, {"policy": OBSERVATIONS}, ACTIONS)
        drawn = batch()
        for _ in range(4):
            agent.update(drawn, 0.5)
        spent.clear()
        begun = time.process_time()
        for _ in range(UPDATES):
            agent.update(drawn, 0.5)
        whole = time.process_time() - begun
        shares = (f"{spent[part] / whole:.1%}" for part in ("code", "time"))
        print(f"| {name} | {1e3 * whole / UPDATES:.1f} | {' | '.join(shares)} |", flush=True)


if __name__ == "__main__":
    main()
