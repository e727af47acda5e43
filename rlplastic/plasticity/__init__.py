"""Plasticity of any torch network: what it is measured by, how it is probed, and what is done about its loss.

`measure` gives all metrics of a tier at once; the metrics themselves are functions in `units`, `ranks`, `weights`,
`gradients`, `curvature` and `representation`. `probe` asks whether a network still learns, and `interventions` treat
it; both work on a `patient.Patient`. Everything here knows modules, optimizers and callables only.
"""

from rlplastic.plasticity.activations import Layer, ModuleReader, untouched
from rlplastic.plasticity.measure import Past, Subject, gradient_dormancy, measure, uninformative
from rlplastic.plasticity.profile import BOUNDED, PLAIN, ROW_NORMED, Profile
from rlplastic.plasticity.weights import snapshot

__all__ = [
    "BOUNDED",
    "PLAIN",
    "ROW_NORMED",
    "Layer",
    "ModuleReader",
    "Past",
    "Profile",
    "Subject",
    "gradient_dormancy",
    "measure",
    "snapshot",
    "uninformative",
    "untouched",
]
