"""FlashSAC (arXiv 2604.04539): `networks`, `update` (the losses and steps), `exploration`, `agent`."""

from rlplastic.agents.flashsac.agent import FlashSAC

__all__ = ["FlashSAC"]
