"""The ONNX graph, run by onnxruntime, is the actor; so is its TorchScript twin."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from exports import flashsac_actor, rows, sac_actor
from torch import nn

from rlplastic.deploy.document import (
    Action,
    AffineMap,
    CommandRange,
    Document,
    Joint,
    Observation,
    ObservationTerm,
    Provenance,
)
from rlplastic.exporting.fold import Affine, Folded, Relu, fold
from rlplastic.exporting.graph import metadata_of, onnx_model, torchscript

BOX = AffineMap((0.4, 2.0, 1.0), (0.0, 1.0, -3.0), (-0.4, -1.0, -4.0), (0.4, 3.0, -2.0), True)
ACTORS = {
    "flashsac": flashsac_actor(5, 3),
    "sac": sac_actor(5, 3, layer_norm=False),
    "sac with norms": sac_actor(5, 3, layer_norm=True),
}


def outputs(actor: nn.Module, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return run(fold(actor), BOX, x)


def run(policy: Folded, box: AffineMap, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    model = onnx_model(policy, box, {})
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    actions, raw = session.run(["actions", "raw_actions"], {"obs": x})
    return actions, raw


def exact(actor: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.tanh(copy.deepcopy(actor).double()(torch.from_numpy(x).double())[0].numpy())


@pytest.mark.parametrize("actor", ACTORS.values(), ids=ACTORS)
def test_graph_equals_the_actor_and_maps_to_the_box(actor: nn.Module) -> None:
    x = rows(200, 5) * 4
    actions, raw = outputs(actor, x)
    expected = exact(actor, x)
    assert np.abs(raw - expected).max() < 2e-6
    assert np.abs(actions - (np.array(BOX.scale) * expected + BOX.offset)).max() < 5e-6
    assert (actions >= np.float32(BOX.low)).all() and (actions <= np.float32(BOX.high)).all()


def test_inputs_that_never_varied_lose_no_digits() -> None:
    """A constant input of 1000 has a gain of 316: a bias folded from it would cancel numbers of a hundred thousand."""
    actor = flashsac_actor(5, 3)
    with torch.no_grad():
        actor.trunk.input_norm.running_mean[1:3] = 1000.0
        actor.trunk.input_norm.running_var[1:3] = 0.0
    x = rows(200, 5)
    x[:, 1:3] = 1000.0
    assert np.abs(outputs(actor, x)[1] - exact(actor, x)).max() < 2e-6


@pytest.mark.parametrize("actor", ACTORS.values(), ids=ACTORS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_gives_nan_in_its_row_only(value: float, actor: nn.Module) -> None:
    x = rows(3, 5)
    x[1, 2] = value
    for output in outputs(actor, x):
        assert np.isnan(output[1]).all() and np.isfinite(output[[0, 2]]).all()


def test_infinity_gives_nan_even_where_a_relu_would_hide_it() -> None:
    one = np.ones((1, 1))
    hiding = Folded(1, 1, (Affine(-one, np.zeros(1)), Relu(), Affine(one, np.zeros(1))))
    box = AffineMap((1.0,), (0.0,), (-1.0,), (1.0,), True)
    x = np.array([[np.inf], [-2.0]], np.float32)
    script = [output.numpy() for output in torchscript(hiding, box)(torch.from_numpy(x))]
    for output in (*run(hiding, box, x), *script):
        assert np.isnan(output[0]).all() and output[1] == pytest.approx(np.tanh(2.0))


def test_torchscript_equals_the_graph_for_any_number_of_rows() -> None:
    script = torchscript(fold(ACTORS["sac with norms"]), BOX)
    for count in (1, 7):
        x = rows(count, 5)
        for ours, theirs in zip(script(torch.from_numpy(x)), outputs(ACTORS["sac with norms"], x), strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs, atol=2e-6)


def test_making_torchscript_draws_nothing_from_the_callers_random_stream() -> None:
    before = torch.random.get_rng_state()
    torchscript(fold(ACTORS["sac"]), BOX)
    assert torch.equal(torch.random.get_rng_state(), before)


def document_of_servos(outputs: tuple[int, int]) -> Document:
    """Two position servos; output i drives joint ``outputs[i]``."""
    names = ("hip", "knee")
    joints = [Joint(name, d, kp=30.1, kd=0.1, damping=0.2) for name, d in zip(names, (0.1, -1 / 3), strict=True)]
    box = AffineMap((1.0, 1.0), (0.0, 0.0), (-1.0, -1.0), (1.0, 1.0), True)
    target = AffineMap((0.25, 1 / 3), (0.1, -1 / 3), (-2.0, -2.0), (2.0, 2.0), False)
    return Document(
        schema_version=1,
        observation=Observation(
            2, (ObservationTerm("a", 0, 1, (1.0,), (0.0,)), ObservationTerm("b", 1, 2, (1.0,), (0.0,)))
        ),
        action=Action(2, box, target, names, tuple(names[i] for i in outputs), ("position", "position"), (1.0, 1.0)),
        provenance=Provenance("task", "backend", 1, "0", "0", {}, {}),
        joints=tuple(Joint(**{**vars(joint), "output": outputs.index(i)}) for i, joint in enumerate(joints)),
        commands=(CommandRange("forward", -1.0, 1.0),),
    )


def test_flat_keys_have_all_digits_and_the_damping_of_joints() -> None:
    document = document_of_servos((0, 1))
    flat = metadata_of(document)
    assert Document.from_json(flat["rlplastic"]) == document
    assert (flat["joint_names"], flat["observation_names"], flat["command_names"]) == ("hip,knee", "a,b", "forward")
    assert json.loads(flat["dof_names"]) == ["hip", "knee"]
    assert json.loads(flat["kp"]) == [30.1, 30.1] and json.loads(flat["kd"]) == [0.1 + 0.2, 0.1 + 0.2]
    for name, values in {
        "joint_stiffness": [30.1, 30.1],
        "joint_damping": [0.1 + 0.2] * 2,
        "default_joint_pos": [0.1, -1 / 3],
        "action_scale": [0.25, 1 / 3],
    }.items():
        assert [float(text) for text in flat[name].split(",")] == values


def test_flat_joint_keys_are_left_out_where_outputs_and_joints_have_different_orders() -> None:
    flat = metadata_of(document_of_servos((1, 0)))
    assert sorted(flat) == ["action_scale", "command_names", "observation_names", "rlplastic"]
