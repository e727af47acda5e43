"""A folded policy as an ONNX graph of standard operators (opset 17), and as TorchScript.

    obs (N, D) -> layers -> tanh -> raw_actions (N, A) -> middle + half * raw, within the Box -> actions (N, A)

Both outputs have 0 * obs summed over a row added to them, which is 0 for finite numbers and NaN otherwise: a broken
sensor can never look like an action, whatever a runtime makes of the comparison of NaN with 0 inside a ReLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import ArrayLike
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from rlplastic.deploy.document import METADATA_KEY, AffineMap, Document
from rlplastic.deploy.policy import INPUT, OUTPUTS
from rlplastic.exporting.fold import Affine, Centre, Folded, Layer, LayerNorm, Relu, Residual, RMSNorm

OPSET, IR_VERSION = 17, 8
MEAN = "mean"
"""The tensor before tanh; not an output, but there by name for whoever verifies the graph."""


def onnx_model(policy: Folded, box: AffineMap, metadata: dict[str, str]) -> onnx.ModelProto:
    """The whole policy with its document.

    Args:
        policy: from `rlplastic.exporting.fold.fold`.
        box: from [-1, 1] to the action Box.
        metadata: strings by key, from `metadata_of`.
    """
    graph = _Graph()
    hidden = graph.chain(policy.layers, INPUT)
    graph.node("Identity", [hidden], MEAN)
    squashed = graph.node("Tanh", [MEAN])
    zero = graph.node("Mul", [INPUT, graph.constant("zero", 0.0)])
    axes = graph.constant("row", [1], np.int64)
    guard = graph.node("ReduceSum", [zero, axes], "guard", keepdims=1)
    scaled = graph.node("Mul", [squashed, graph.constant("action_scale", box.scale)])
    moved = graph.node("Add", [scaled, graph.constant("action_offset", box.offset)])
    lower = graph.node("Max", [moved, graph.constant("action_low", box.low)])
    bounded = graph.node("Min", [lower, graph.constant("action_high", box.high)])
    graph.node("Add", [bounded, guard], OUTPUTS[0])
    graph.node("Add", [squashed, guard], OUTPUTS[1])
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "policy",
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", policy.observation_dim])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", policy.action_dim]) for name in OUTPUTS],
            graph.constants,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="rlplastic",
    )
    helper.set_model_props(model, metadata)
    return model


class _Graph:
    """Nodes and constants as they are added, with names that nobody else has."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, values: ArrayLike, dtype: type = np.float32) -> str:
        """Store numbers, rounded once."""
        self.constants.append(numpy_helper.from_array(np.asarray(values, np.float64).astype(dtype), name))
        return name

    def node(self, operator: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:  # noqa: ANN401
        """Append a node; returns its output's name."""
        output = output or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def chain(self, layers: Sequence[Layer], x: str) -> str:
        """Append layers one after the other."""
        for layer in layers:
            x = self.layer(layer, x)
        return x

    def layer(self, layer: Layer, x: str) -> str:
        """Append one layer; returns its output's name."""
        number = len(self.nodes)
        match layer:
            case Centre(mean):
                return self.node("Sub", [x, self.constant(f"mean_{number}", mean)])
            case Affine(weight, bias):
                named = self.constant(f"weight_{number}", weight), self.constant(f"bias_{number}", bias)
                return self.node("Gemm", [x, *named], transB=1)
            case Relu():
                return self.node("Relu", [x])
            case Residual(body):
                return self.node("Add", [x, self.chain(body, x)])
            case RMSNorm(eps):
                square = self.node("ReduceMean", [self.node("Mul", [x, x])], axes=[1], keepdims=1)
                padded = self.node("Add", [square, self.constant(f"eps_{number}", eps)])
                return self.node("Div", [x, self.node("Sqrt", [padded])])
            case LayerNorm(gain, bias, eps):
                named = self.constant(f"gain_{number}", gain), self.constant(f"bias_{number}", bias)
                return self.node("LayerNormalization", [x, *named], axis=-1, epsilon=eps)


def metadata_of(document: Document) -> dict[str, str]:
    """What goes into the file's metadata: the document, and flat keys that other runners read.

    Such runners take one order for outputs and joints alike. The joint keys are therefore there only where every output
    drives a joint of its own and their orders agree.
    """
    metadata = {METADATA_KEY: document.to_json()}
    metadata["observation_names"] = ",".join(term.name for term in document.observation.terms)
    metadata["action_scale"] = _listed((document.action.target or document.action.box).scale)
    if document.commands:
        metadata["command_names"] = ",".join(command.name for command in document.commands)
    driven = [joint for joint in document.joints if joint.output is not None]
    if not driven or [joint.output for joint in driven] != list(range(document.action.width)):
        return metadata
    names = [joint.name for joint in driven]
    metadata["joint_names"], metadata["dof_names"] = ",".join(names), _json(names)
    metadata["default_joint_pos"] = _listed([joint.default_position for joint in driven])
    kp = [joint.kp for joint in driven if joint.kp is not None]
    if len(kp) == len(driven):
        kd = [(joint.kd or 0.0) + (joint.damping or 0.0) for joint in driven]
        metadata |= {"kp": _json(kp), "kd": _json(kd), "joint_stiffness": _listed(kp), "joint_damping": _listed(kd)}
    return metadata


def _listed(numbers: Sequence[float]) -> str:
    return ",".join(repr(number) for number in numbers)


def _json(values: Sequence[object]) -> str:
    return str(list(values)).replace("'", '"')


class PlainPolicy(nn.Module):
    """A folded policy as a module that TorchScript can trace: ``obs`` (N, D) to actions and raw actions (N, A)."""

    def __init__(self, policy: Folded, box: AffineMap) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_module(layer) for layer in policy.layers)
        for name in ("scale", "offset", "low", "high"):
            self.register_buffer(name, torch.tensor(getattr(box, name), dtype=torch.float64).float())

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """As the ONNX graph."""
        x = obs
        for layer in self.layers:
            x = layer(x)
        raw, guard = torch.tanh(x), (obs * 0.0).sum(1, keepdim=True)
        moved = raw * self.get_buffer("scale") + self.get_buffer("offset")
        bounded = torch.minimum(torch.maximum(moved, self.get_buffer("low")), self.get_buffer("high"))
        return bounded + guard, raw + guard


class _Added(nn.Module):
    def __init__(self, body: nn.Sequential) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.body(x)
        return added


class _Centred(nn.Module):
    mean: Tensor

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean


class _RMS(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(1, keepdim=True) + self.eps)


def _module(layer: Layer) -> nn.Module:
    match layer:
        case Centre(mean):
            return _Centred(torch.from_numpy(mean).float())
        case Affine(weight, bias):
            linear = nn.Linear(weight.shape[1], weight.shape[0])
            linear.weight.data, linear.bias.data = torch.from_numpy(weight).float(), torch.from_numpy(bias).float()
            return linear
        case Residual(body):
            return _Added(nn.Sequential(*(_module(inner) for inner in body)))
        case RMSNorm(eps):
            return _RMS(eps)
        case LayerNorm(gain, bias, eps):
            norm = nn.LayerNorm(len(gain), eps)
            norm.weight.data, norm.bias.data = torch.from_numpy(gain).float(), torch.from_numpy(bias).float()
            return norm
        case Relu():
            return nn.ReLU()


def torchscript(policy: Folded, box: AffineMap) -> torch.jit.ScriptModule:
    """The same policy traced; any N."""
    with torch.random.fork_rng(devices=[]):  # layers draw initial weights, which the caller's stream must not notice
        module = PlainPolicy(policy, box).eval().requires_grad_(False)
    traced = torch.jit.trace(module, torch.zeros(2, policy.observation_dim))  # type: ignore[no-untyped-call]
    assert isinstance(traced, torch.jit.ScriptModule)
    return traced
