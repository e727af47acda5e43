"""rlplastic: off-policy robot learning that keeps its plasticity.

Names are imported when they are first used, so that `import rlplastic` costs nothing and parts that need no torch never
load it (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "compose": "rlplastic.composition",
    "diagnose_run": "rlplastic.diagnosis",
    "export_policy": "rlplastic.exporting.build",
    "load_policy": "rlplastic.policy",
    "make_agent": "rlplastic.agents",
    "make_envs": "rlplastic.envs",
    "train_agent": "rlplastic.training",
}

if TYPE_CHECKING:
    from rlplastic.agents import make_agent as make_agent
    from rlplastic.composition import compose as compose
    from rlplastic.diagnosis import diagnose_run as diagnose_run
    from rlplastic.envs import make_envs as make_envs
    from rlplastic.exporting.build import export_policy as export_policy
    from rlplastic.policy import load_policy as load_policy
    from rlplastic.training import train_agent as train_agent

__all__ = [
    "__version__",
    "compose",
    "diagnose_run",
    "export_policy",
    "load_policy",
    "make_agent",
    "make_envs",
    "train_agent",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the submodule defines
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'rlplastic' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
