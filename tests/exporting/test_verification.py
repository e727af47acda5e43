"""Sabotage: an export that is wrong in one way is caught, and the check that catches it says what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exports import bent, failures, rewrite
from onnx import numpy_helper

from rlplastic.deploy.document import Document
from rlplastic.exporting import verification
from rlplastic.exporting.fold import fold
from rlplastic.exporting.graph import metadata_of, onnx_model
from rlplastic.exporting.verification import Original, verify


@pytest.fixture(autouse=True)
def _no_time_is_spent_on_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "TIMED_CALLS", 3)


def document_in(folder: Path) -> Document:
    return Document.from_json((folder / "policy.json").read_text())


def with_graph(folder: Path, original: Original, **changed: object) -> None:
    """Put another graph under the same document; ``actor`` or ``box`` differ."""
    document = document_in(folder)
    actor, box = changed.get("actor", original.policy.actor), changed.get("box", document.action.box)
    onnx.save(onnx_model(fold(actor), box, metadata_of(document)), folder / "policy.onnx")  # type: ignore[arg-type]


def test_what_the_exporter_writes_passes_every_check(hopper_files: Path, hopper: Original) -> None:
    checks = verify(hopper_files, hopper)
    assert [check for check in checks if check.passed is False] == []
    judged = {check.name for check in checks if check.passed}
    assert {"real observations", "moved outputs", "closed loop, return", "golden.npz"} <= judged


def test_a_wrong_joint_order_is_caught_by_the_task_and_by_moving_one_output(
    hopper_files: Path, hopper: Original
) -> None:
    document = document_in(hopper_files)
    action, joints = document.action, list(document.joints)
    swapped = replace(action, names=bent(action.names, 0, 2), joints=bent(action.joints, 0, 2))
    joints = [
        replace(joint, output=swapped.joints.index(joint.name)) if joint.output is not None else joint
        for joint in joints
    ]
    rewrite(hopper_files, replace(document, action=swapped, joints=tuple(joints)))
    found = failures(hopper_files, hopper)
    assert set(found) == {"document", "moved outputs"}
    assert 'action.names[0] is "foot_joint", expected "thigh_joint"' in found["document"]
    assert "foot_joint moves like thigh_joint" in found["moved outputs"]


def test_a_normaliser_that_was_not_folded_is_caught(hopper_files: Path, hopper: Original) -> None:
    actor = type(hopper.policy.actor)(11, 3, 8, 2)  # type: ignore[call-arg]
    state = hopper.policy.actor.state_dict()
    norm = "trunk.input_norm."
    actor.load_state_dict(
        {
            name: torch.zeros_like(value) if name in (f"{norm}running_mean", f"{norm}beta") else value
            for name, value in state.items()
        }
        | {f"{norm}running_var": torch.ones(11), f"{norm}gamma": torch.ones(11)}
    )
    with_graph(hopper_files, hopper, actor=actor)
    assert {"real observations", "noisy observations", "closed loop, each step", "golden.npz"} <= set(
        failures(hopper_files, hopper)
    )


def test_rounded_numbers_are_caught_and_named(hopper_files: Path, hopper: Original) -> None:
    document = document_in(hopper_files)
    joints = [replace(j, lower=None if j.lower is None else round(j.lower, 3)) for j in document.joints]
    rewrite(hopper_files, replace(document, joints=tuple(joints)))
    found = failures(hopper_files, hopper)
    assert set(found) == {"document"} and ".lower is -2.618, expected -2.6179938" in found["document"]


def test_flat_keys_that_were_rounded_are_caught(hopper_files: Path, hopper: Original) -> None:
    model = onnx.load(hopper_files / "policy.onnx")
    for entry in model.metadata_props:
        if entry.key == "default_joint_pos":
            entry.value = "0.000,0.000,0.001"
    onnx.save(model, hopper_files / "policy.onnx")
    assert failures(hopper_files, hopper) == {"flat keys": "different: default_joint_pos"}


def test_exchanged_observation_terms_are_caught(hopper_files: Path, hopper: Original) -> None:
    document = document_in(hopper_files)
    qpos, qvel = document.observation.terms
    exchanged = (replace(qvel, start=0, stop=qvel.width), replace(qpos, start=qvel.width, stop=11))
    rewrite(hopper_files, replace(document, observation=replace(document.observation, terms=exchanged)))
    found = failures(hopper_files, hopper)
    assert found["document"] == 'observation.terms[0].name is "qvel", expected "qpos"'


def test_a_missing_action_scale_is_caught(pendulum_files: Path, pendulum: Original) -> None:
    box = pendulum.facts.action.box
    assert box.scale == (2.0,)
    with_graph(pendulum_files, pendulum, box=replace(box, scale=(1.0,)))
    assert {"real observations", "closed loop, each step", "golden.npz"} <= set(failures(pendulum_files, pendulum))


def test_a_nan_weight_is_caught_and_its_tensor_named(pendulum_files: Path, pendulum: Original) -> None:
    model = onnx.load(pendulum_files / "policy.onnx")
    tensor = next(one for one in model.graph.initializer if one.name.startswith("weight"))
    array = numpy_helper.to_array(tensor).copy()
    array[0, 0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, pendulum_files / "policy.onnx")
    found = failures(pendulum_files, pendulum)
    assert found["weights"] == f"not finite: {tensor.name}"
    assert {"real observations", "extremes, before tanh", "golden.npz"} <= set(found)


def test_a_graph_that_hides_nan_is_caught(pendulum_files: Path, pendulum: Original) -> None:
    model = onnx.load(pendulum_files / "policy.onnx")
    for node in model.graph.node:
        node.input[:] = ["hidden" if name == "obs" else name for name in node.input]
    model.graph.node.insert(0, onnx.helper.make_node("IsNaN", ["obs"], ["broken"]))
    model.graph.node.insert(1, onnx.helper.make_node("Where", ["broken", "zero", "obs"], ["hidden"]))
    onnx.save(model, pendulum_files / "policy.onnx")
    found = failures(pendulum_files, pendulum)
    assert found == {"numbers not finite": "rows with NaN: [False, True, True, False], expected the first three"}


def test_a_document_beside_the_file_that_is_not_the_one_inside_is_caught(
    pendulum_files: Path, pendulum: Original
) -> None:
    model = onnx.load(pendulum_files / "policy.onnx")
    entry = next(one for one in model.metadata_props if one.key == "rlplastic")
    entry.value = entry.value.replace('"training_steps": 1000', '"training_steps": 999')
    onnx.save(model, pendulum_files / "policy.onnx")
    found = failures(pendulum_files, pendulum)
    assert found["document"] == "policy.json is not the document in policy.onnx"


def test_a_wrong_provenance_is_caught(pendulum_files: Path, pendulum: Original) -> None:
    document = document_in(pendulum_files)
    rewrite(pendulum_files, replace(document, provenance=replace(document.provenance, training_steps=999)))
    assert failures(pendulum_files, pendulum) == {"document": "provenance.training_steps is 999, expected 1000"}


def test_a_file_that_cannot_be_read_fails_its_checks_and_breaks_nothing(
    pendulum_files: Path, pendulum: Original
) -> None:
    (pendulum_files / "policy.onnx").write_bytes(b"not a model")
    found = failures(pendulum_files, pendulum)
    assert "is not an ONNX model" in found["real observations"]
    assert "golden.npz" in found and "numpy and onnxruntime alone" in found
