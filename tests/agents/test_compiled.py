"""Compiled updates equal eager ones over 100 updates, and nothing is compiled again after the first two."""

from __future__ import annotations

import pytest
import torch

from rlplastic import seeding
from rlplastic.acceleration import compiled as compiler
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.steps import Inputs
from rlplastic.config import CategoricalCriticConfig, FlashSACConfig

OBSERVATIONS, ACTIONS, ROWS, UPDATES = 6, 2, 32, 100


def agent_of(bf16: bool, compile=lambda function: function) -> FlashSAC:
    settings = FlashSACConfig(critic_width=16, actor_width=8, num_blocks=1, gamma=0.99)
    return FlashSAC(
        {"policy": OBSERVATIONS},
        ACTIONS,
        1,
        settings,
        CategoricalCriticConfig(num_atoms=21),
        bf16=bf16,
        compile=compile,
    )


def inputs_of(index: int) -> Inputs:
    rng = seeding.generator("cpu", 0, "batch", index)
    observations = torch.randn(2, ROWS, OBSERVATIONS, generator=rng)
    return Inputs(
        observation=observations[0],
        next_observation=observations[1],
        critic_observation=observations[0],
        next_critic_observation=observations[1],
        action=torch.rand(ROWS, ACTIONS, generator=rng) * 2 - 1,
        reward=torch.randn(ROWS, generator=rng) / 10,
        discount=torch.full((ROWS,), 0.99),
    )


def updated(agent: FlashSAC, first: int, last: int) -> list[dict[str, float]]:
    """The metrics of updates ``first`` to ``last - 1``."""
    told = []
    for index in range(first, last):
        rng = seeding.generator("cpu", 0, "noise", index)
        noise = torch.randn(3 * ROWS, ACTIONS, generator=rng)
        actor_noise = noise[: 2 * ROWS] if agent.actor_is_due else None
        metrics = agent.update_with(inputs_of(index), actor_noise, noise[2 * ROWS :], 0.0)
        told.append({name: float(value) for name, value in metrics.items()})
    return told


@pytest.mark.parametrize(
    ("bf16", "tolerance"),
    [
        pytest.param(False, 1e-5, id="float32"),
        # A compiler keeps in float32 what eager execution rounds between two operations.
        pytest.param(True, 5e-2, id="bf16", marks=pytest.mark.slow),
    ],
)
def test_compiled_equals_eager_over_100_updates_and_compiles_nothing_after_the_second(
    bf16: bool, tolerance: float
) -> None:
    eager, compiled = agent_of(bf16), agent_of(bf16, compiler)
    found = updated(compiled, 0, 2)
    with torch.compiler.set_stance("fail_on_recompile"):
        found += updated(compiled, 2, UPDATES)
    for index, expected in enumerate(updated(eager, 0, UPDATES)):
        for name, value in expected.items():
            assert found[index][name] == pytest.approx(value, rel=tolerance, abs=tolerance), (index, name)
    state = compiled.state_dict()
    for name, value in eager.state_dict().items():
        if name.startswith("optimizer") or not value.is_floating_point():  # gradients of nearly nothing differ more
            continue
        allowed = tolerance * float(value.abs().max().clamp(min=1e-3))
        assert float((state[name] - value).abs().max()) <= allowed, name
