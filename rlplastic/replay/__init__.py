"""Experience replay: `ring` stores each observation once, `sample` says what a batch is and draws it."""

from rlplastic.replay.holdout import Holdout
from rlplastic.replay.ring import ReplayRing
from rlplastic.replay.sample import Batch, Prioritisation, Sampler

__all__ = ["Batch", "Holdout", "Prioritisation", "ReplayRing", "Sampler"]
