"""Small patients: a bare torch network, and actor and critic of every kind of agent after a few updates."""

from __future__ import annotations

from typing import Any

import torch
from batches import random_batch
from torch import Tensor, nn

from rlplastic.agents.flashsac import FlashSAC
from rlplastic.agents.patients import patients
from rlplastic.agents.sac import SAC
from rlplastic.agents.subjects import inputs_of
from rlplastic.config import (
    CategoricalCriticConfig,
    FlashSACConfig,
    FlowCriticConfig,
    SACConfig,
    ScalarCriticConfig,
)
from rlplastic.plasticity.patient import Patient, hidden_layers

DIMS = {"policy": 4, "critic": 6}
ACTIONS, ENVS, ROWS = 2, 3, 16
KINDS = [(agent, network) for agent in ("flashsac", "sac", "sac_layer_norm") for network in ("actor", "critic")]
KINDS += [("flashsac_flow", "critic"), ("sac_flow", "critic")]
FLOW = FlowCriticConfig(steps=2, noises=2)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(key: int, width: int = 16, inputs: int = 3, outputs: int = 1) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key)
        return nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
        )


def bare_patient(key: int = 0, rows: int = 256, target: bool = False, **settings: Any) -> Patient:
    """A network and an optimizer as anyone's loop has them."""
    net = mlp(key)
    fields: dict[str, Any] = {
        "fresh": mlp,
        "states": (normal(rows, 3),),
        "target": mlp(99) if target else None,
        "hidden": hidden_layers(net, "", ()),
        "head": ("4.weight", "4.bias"),
    }
    return Patient("net", net, torch.optim.Adam(net.parameters(), 1e-3), **(fields | settings))


def agent_of(kind: str, seed: int = 0, width: int = 8, updates: int = 3) -> FlashSAC | SAC:
    agent: FlashSAC | SAC
    flows = kind.endswith("flow")
    if kind.startswith("flashsac"):
        config = FlashSACConfig(critic_width=width, actor_width=width, gamma=0.99)
        agent = FlashSAC(
            DIMS, ACTIONS, ENVS, config, FLOW if flows else CategoricalCriticConfig(num_atoms=11), seed=seed
        )
    else:
        plain = SACConfig(
            critic_width=width, actor_width=width, gamma=0.99, initial_alpha=1.0, layer_norm=kind == "sac_layer_norm"
        )
        agent = SAC(DIMS, ACTIONS, ENVS, plain, FLOW if flows else ScalarCriticConfig(), seed=seed)
    for index in range(updates):
        agent.update(random_batch(DIMS, ACTIONS, ROWS, index, 0.8), 0.0)
    return agent


def patient_of(agent: FlashSAC | SAC, network: str, rows: int = 64) -> Patient:
    return patients(agent, inputs_of(agent, random_batch(DIMS, ACTIONS, rows, 7, 0.8)))[network]
