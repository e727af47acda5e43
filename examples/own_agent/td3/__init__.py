"""TD3 (arXiv 1802.09477), an agent from outside of rlplastic: `AGENT` is all that rlplastic looks for.

    cd examples/own_agent
    python -m rlplastic.train --config-dir=configs agent=td3 env=pendulum env_steps=10000
    python -m rlplastic.evaluate run=runs/pendulum_td3_seed0
    python -m rlplastic.export run=runs/pendulum_td3_seed0

What one sees: a run like any other, which solves Pendulum (a return of about -200) within its 10,000 steps, one minute.
Killed with -9 and started again it goes on bit for bit, and its policy leaves as verified ONNX.
"""

from rlplastic.agents.base import AgentKind
from td3.agent import TD3Config, make
from td3.networks import actor_like

AGENT = AgentKind(
    config=TD3Config,
    make=make,
    actor_like=actor_like,
    settings={
        "precision": ("float32", "agent=td3 has no bfloat16"),
        "replay_ratio": (1.0, "published"),
    },
)
