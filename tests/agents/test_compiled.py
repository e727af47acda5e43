"""Compiled updates equal eager ones, of every agent and critic, and nothing is compiled again after the first two."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from batches import random_batch

from rlplastic import seeding
from rlplastic.acceleration import compiled as compiler
from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.sac import SAC
from rlplastic.agents.steps import Inputs
from rlplastic.config import CategoricalCriticConfig, FlashSACConfig, FlowCriticConfig, SACConfig, ScalarCriticConfig

OBSERVATIONS, ACTIONS, ROWS, UPDATES = 6, 2, 32, 100


def agent_of(bf16: bool, compile=lambda function: function, device: str = "cpu") -> FlashSAC:
    settings = FlashSACConfig(critic_width=16, actor_width=8, num_blocks=1, gamma=0.99)
    return FlashSAC(
        {"policy": OBSERVATIONS},
        ACTIONS,
        1,
        settings,
        CategoricalCriticConfig(num_atoms=21),
        bf16=bf16,
        kernels="triton" if device == "cuda" else "torch",
        device=device,
        compile=compile,
    )


def inputs_of(index: int, device: torch.device) -> Inputs:
    rng = seeding.generator("cpu", 0, "batch", index)
    observations = torch.randn(2, ROWS, OBSERVATIONS, generator=rng)
    now, later = observations.to(device)
    return Inputs(
        observation=now,
        next_observation=later,
        critic_observation=now,
        next_critic_observation=later,
        action=(torch.rand(ROWS, ACTIONS, generator=rng) * 2 - 1).to(device),
        reward=(torch.randn(ROWS, generator=rng) / 10).to(device),
        discount=torch.full((ROWS,), 0.99, device=device),
    )


def updated(agent: FlashSAC, first: int, last: int) -> list[dict[str, float]]:
    """The metrics of updates ``first`` to ``last - 1``."""
    told = []
    for index in range(first, last):
        rng = seeding.generator("cpu", 0, "noise", index)
        noise = torch.randn(3 * ROWS, ACTIONS, generator=rng).to(agent.device)
        actor_noise = noise[: 2 * ROWS] if agent.actor_is_due else None
        metrics = agent.update_with(inputs_of(index, agent.device), actor_noise, noise[2 * ROWS :], 0.0)
        told.append({name: float(value) for name, value in metrics.items()})
    return told


@pytest.mark.parametrize(
    ("bf16", "tolerance", "device"),
    [
        pytest.param(False, 1e-5, "cpu", id="float32"),
        # A GPU's compiled sums and products are made in another order than its eager ones, and updates add up.
        pytest.param(False, 1e-3, "cuda", id="float32 on a GPU", marks=pytest.mark.gpu),
        # A compiler keeps in float32 what eager execution rounds between two operations.
        pytest.param(True, 5e-2, "cpu", id="bf16", marks=pytest.mark.slow),
    ],
)
def test_compiled_equals_eager_over_100_updates_and_compiles_nothing_after_the_second(
    bf16: bool, tolerance: float, device: str
) -> None:
    eager, compiled = agent_of(bf16, device=device), agent_of(bf16, compiler, device)
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


COMMON = {"critic_width": 16, "actor_width": 8, "gamma": 0.99}
FLOW = FlowCriticConfig(steps=2, noises=2)
MADE: dict[str, Callable[..., FlashSAC | SAC]] = {
    "FlashSAC, scalar": partial(FlashSAC, agent=FlashSACConfig(**COMMON, num_blocks=1), critic=ScalarCriticConfig()),
    "FlashSAC, flow": partial(FlashSAC, agent=FlashSACConfig(**COMMON, num_blocks=1), critic=FLOW),
    "SAC, scalar": partial(SAC, agent=SACConfig(**COMMON, initial_alpha=1.0), critic=ScalarCriticConfig()),
    "SAC, categorical, layer norms, decay": partial(
        SAC,
        agent=SACConfig(**COMMON, initial_alpha=1.0, layer_norm=True, weight_decay=0.01, reward_scaling=True),
        critic=CategoricalCriticConfig(num_atoms=21),
    ),
    "SAC, flow": partial(SAC, agent=SACConfig(**COMMON, initial_alpha=1.0, reward_scaling=True), critic=FLOW),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_other_agents_and_critics_compiled_equal_eager_ones_too(name: str) -> None:
    dims = {"policy": OBSERVATIONS}
    eager, compiled = (MADE[name](dims, ACTIONS, 1, compile=way) for way in (lambda function: function, compiler))
    for index in range(20):
        batch = random_batch(dims, ACTIONS, ROWS, index, kept=0.8)
        ours, theirs = compiled.update(batch, 0.0), eager.update(batch, 0.0)
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=1e-4, atol=1e-4, msg=lambda told: f"{key}: {told}")  # noqa: B023
    networks = compiled.learner
    for module, other in ((networks.actor, eager.learner.actor), (networks.critic, eager.learner.critic)):
        for (key, value), expected in zip(module.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4, msg=lambda told: f"{key}: {told}")  # noqa: B023
