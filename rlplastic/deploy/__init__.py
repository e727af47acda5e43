"""Running an exported policy on a robot: numpy and onnxruntime only, never torch, a simulator or a run directory.

`document` says what a policy's inputs and outputs mean, `policy` runs its ONNX file, `control` puts a loop around it.
"""

from rlplastic.deploy.control import Command, Controller, Limits, ObservationAssembler
from rlplastic.deploy.document import Document
from rlplastic.deploy.policy import OnnxPolicy, Outputs, check_golden

__all__ = [
    "Command",
    "Controller",
    "Document",
    "Limits",
    "ObservationAssembler",
    "OnnxPolicy",
    "Outputs",
    "check_golden",
]
