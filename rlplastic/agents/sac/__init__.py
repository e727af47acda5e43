"""Plain SAC (arXiv 1812.05905): `networks`, `update` (the losses and steps), `agent`."""

from rlplastic.agents.sac.agent import SAC

__all__ = ["SAC"]
