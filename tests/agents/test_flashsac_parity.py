"""The recorded reference run (tests/data/flashsac_golden.npz) is matched in float32 after every update."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.steps import Inputs
from rlplastic.config import CategoricalCriticConfig, FlashSACConfig

GOLDEN = Path(__file__).parents[1] / "data" / "flashsac_golden.npz"
RENAMES = [
    ("embedder.norm.", "trunk.input_norm."),
    ("embedder.w.w.", "trunk.embed."),
    ("embedder.w.", "trunk.embed."),
    ("encoder.", "trunk.blocks."),
    (".w1.w.", ".expand."),
    (".w1.", ".expand."),
    (".w2.w.", ".contract."),
    (".w2.", ".contract."),
    (".norm1.", ".expand_norm."),
    (".norm2.", ".contract_norm."),
    ("post_norm.weight", "trunk.post_norm.gain"),
    ("predictor.mean_w.w.", "head.mean."),
    ("predictor.std_w.w.", "head.spread."),
    ("predictor.std_bias", "head.spread_bias"),
    ("predictor.w.", "head.linear."),
    ("predictor.", "head."),
]


def translated(name: str) -> str:
    for old, new in RENAMES:
        name = name.replace(old, new)
    if "_norm." in name and "post_norm" not in name:
        name = name.replace("_norm.weight", "_norm.gamma").replace("_norm.bias", "_norm.beta")
    return name


def recorded(golden: np.lib.npyio.NpzFile, moment: str) -> dict[str, torch.Tensor]:
    """Every recorded tensor of a moment (`init`, `after0`, ...) under this package's names."""
    tensors = {}
    for name in golden.files:
        if name.startswith(f"{moment}/") and "bin_values" not in name:
            network, _, entry = name.removeprefix(f"{moment}/").partition("/")
            tensors[f"{network}.{translated(entry)}"] = torch.from_numpy(golden[name])
    log_alpha = tensors.pop("temperature.log_temp")
    return tensors | {"temperature.log_alpha": log_alpha}


def agent_of(golden: np.lib.npyio.NpzFile, compile=lambda function: function) -> FlashSAC:
    config = json.loads(str(golden["config"]))
    settings = FlashSACConfig(
        critic_width=config["critic_hidden"], actor_width=config["actor_hidden"], gamma=config["gamma"]
    )
    agent = FlashSAC(
        {"policy": config["obs_dim"]},
        config["action_dim"],
        1,
        settings,
        CategoricalCriticConfig(),
        planned_updates=config["lr_decay_steps"],
        compile=compile,
    )
    assert agent.learner.target_entropy == pytest.approx(config["target_entropy"])
    state = agent.state_dict()
    initial = recorded(golden, "init")
    assert set(initial) <= set(state), set(initial) - set(state)
    agent.load_state_dict(state | initial)
    return agent


def inputs_of(golden: np.lib.npyio.NpzFile, index: int) -> Inputs:
    field = {
        name: torch.from_numpy(golden[f"update{index}/batch/{name}"]).float()
        for name in ("observation", "next_observation", "action", "reward", "terminated")
    }
    return Inputs(
        observation=field["observation"],
        next_observation=field["next_observation"],
        critic_observation=field["observation"],
        next_critic_observation=field["next_observation"],
        action=field["action"],
        reward=field["reward"],
        discount=json.loads(str(golden["config"]))["gamma"] * (1 - field["terminated"]),
    )


SCALARS = {
    "actor/loss": "loss/actor",
    "actor/entropy": "policy/entropy",
    "actor/mean_action": "policy/action_mean",
    "critic/loss": "loss/critic",
    "critic/max_entropy_bonus": "value/max_entropy_term",
    "temperature/value": "policy/alpha",
    "temperature/loss": "loss/temperature",
}


def test_every_scalar_and_tensor_matches_the_recorded_reference_after_every_update() -> None:
    golden = np.load(GOLDEN)
    agent = agent_of(golden)
    for index in range(4):
        noises = [torch.from_numpy(golden[n]) for n in sorted(golden.files) if n.startswith(f"update{index}/noise")]
        assert (len(noises) == 2) == agent.actor_is_due
        metrics = agent.update_with(inputs_of(golden, index), noises[0] if len(noises) == 2 else None, noises[-1], 0.0)
        for name, value in json.loads(str(golden[f"update{index}/info"])).items():
            assert float(metrics[SCALARS[name]]) == pytest.approx(value, rel=1e-4), (index, name)
        state = agent.state_dict()
        for name, expected in recorded(golden, f"after{index}").items():
            tolerance = max(1e-4 * float(expected.abs().max()), 1e-6)
            worst = float((state[name] - expected).abs().max())
            assert worst <= tolerance, f"update {index}: {name} differs by {worst:.3g}, allowed {tolerance:.3g}"
    action = agent.act({"policy": golden["eval/observation"].astype(np.float32)})
    np.testing.assert_allclose(action, golden["eval/action"], rtol=0, atol=1e-5)
