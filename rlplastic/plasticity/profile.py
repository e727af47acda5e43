"""Which metrics say something about which kind of network.

On a norm-bounded network (unit rows, batch norm before every rectifier) the classic metrics are flat by construction. A
monitor that reads them there would always say "healthy"; here they are called uninformative, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

_CENTRED = "batch norm centres what enters every rectifier, so a unit is on for about half of the rows"
_SCALED = "batch norm gives every unit the same scale, so none is small beside its layer's mean"
_ON_AND_OFF = "batch norm puts every unit's inputs on both sides of zero on any batch"
_BOUNDED = "rows are unit vectors and gains have fixed norms"
_STATISTICS = "the network has no batch norm whose running statistics could lag"


@dataclass(frozen=True)
class Profile:
    """A kind of network.

    Args:
        name: of the kind.
        uninformative: reasons by metric; every other metric is informative.
    """

    name: str
    uninformative: Mapping[str, str]

    def reason(self, key: str) -> str | None:
        """Why a measurement says nothing about plasticity, or None where it does.

        Args:
            key: a name of `rlplastic.plasticity.measure.measure`, or a metric alone.
        """
        return self.uninformative.get(key.rsplit("/", 1)[-1].removesuffix("_worst"))


PLAIN = Profile("plain", MappingProxyType({"batch_norm_lag": _STATISTICS}))
"""Networks whose weights and activations are free: ordinary MLPs, Stable-Baselines3's SAC."""

BOUNDED = Profile(
    "bounded",
    MappingProxyType(
        {
            "active_fraction": _CENTRED,
            "dormant": _SCALED,
            "dormant_0.1": _SCALED,
            "dead": _ON_AND_OFF,
            "linearised": _ON_AND_OFF,
            "weight_norm": _BOUNDED,
            "distance_from_init": f"{_BOUNDED}, so distance saturates at that of unrelated rows; see angles",
        }
    ),
)
"""Norm-bounded networks: unit rows and a batch norm before every rectifier, such as FlashSAC's."""

ROW_NORMED = Profile(
    "row-normed",
    MappingProxyType({name: BOUNDED.uninformative[name] for name in ("weight_norm", "distance_from_init")}),
)
"""Norm-bounded networks with an RMSNorm before every rectifier, such as FlashSAC's flows: it bounds a row's activity,
not a unit's, so units can die."""
