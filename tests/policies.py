"""A policy for tests: one linear layer as an ONNX file with a document, made without training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rlplastic.config import EnvConfig
from rlplastic.deploy.document import METADATA_KEY, SCHEMA_VERSION, Document, Provenance
from rlplastic.deploy.policy import INPUT, OUTPUTS
from rlplastic.exporting.task_facts import task_facts


def document_of(env: EnvConfig, seed: int = 0) -> Document:
    """What an export of a policy of this task would say."""
    facts = task_facts(env)
    configuration = {"env": dataclasses.asdict(env), "seed": seed}
    provenance = Provenance(env.task, facts.backend, 0, "", "", {}, configuration)
    return Document(SCHEMA_VERSION, facts.observation, facts.action, provenance, facts.joints, facts.timing)


def write_policy(path: Path, document: Document, seed: int = 0) -> np.ndarray:
    """tanh(obs @ weights) with random weights, which are returned."""
    width, actions, box = document.observation.width, document.action.width, document.action.box
    weights = np.random.default_rng(seed).normal(0, 0.3, (width, actions)).astype(np.float32)
    constants = {"weights": weights, "scale": np.float32(box.scale), "offset": np.float32(box.offset)}
    nodes = [
        helper.make_node("MatMul", [INPUT, "weights"], ["mean"]),
        helper.make_node("Tanh", ["mean"], [OUTPUTS[1]]),
        helper.make_node("Mul", [OUTPUTS[1], "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "offset"], [OUTPUTS[0]]),
    ]
    graph = helper.make_graph(
        nodes,
        "policy",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["N", width])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", actions]) for name in OUTPUTS],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {METADATA_KEY: document.to_json()})
    onnx.save(model, path)
    return weights
