"""Experience replay: `ring` stores each observation once, `sample` says what a batch is and draws it."""

from rlplastic.replay.ring import ReplayRing
from rlplastic.replay.sample import Batch, Sampler

__all__ = ["Batch", "ReplayRing", "Sampler"]
