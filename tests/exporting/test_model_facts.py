"""What is read from a model is what its MJCF says, class by class; responses tell actuators apart."""

from __future__ import annotations

from dataclasses import replace

import mujoco
import numpy as np
import pytest

from rlplastic.deploy.document import Action, AffineMap
from rlplastic.exporting import model_facts
from rlplastic.exporting.model_facts import Model, Pose, responses

MJCF = """
<mujoco>
  <compiler angle="radian" autolimits="true"/>
  <option timestep="0.002"/>
  <default>
    <joint damping="0.25" armature="0.01" frictionloss="0.125"/>
    <default class="strong"><position kp="75" kv="1.5" forcerange="-20 30"/></default>
  </default>
  <worldbody>
    <body name="base" pos="0 0 1">
      <freejoint name="root"/>
      <geom size="0.1" mass="5"/>
      <body name="upper">
        <joint name="hip" axis="0 1 0" range="-1.5 0.5" actuatorfrcrange="-25 25"/>
        <geom type="capsule" fromto="0 0 0 0.3 0 0" size="0.02" mass="1"/>
        <body name="lower" pos="0.3 0 0">
          <joint name="knee" axis="0 0 1" damping="1" ref="0"/>
          <geom type="capsule" fromto="0 0 0 0.3 0 0" size="0.02" mass="0.5"/>
        </body>
      </body>
      <body name="arm" pos="0 0.2 0">
        <joint name="slide" type="slide" axis="0 1 0"/>
        <geom size="0.05" mass="1"/>
      </body>
      <body name="wrist" pos="0 -0.3 0">
        <joint name="ball" type="ball"/>
        <geom size="0.05" mass="1"/>
      </body>
    </body>
  </worldbody>
  <tendon><fixed name="both"><joint joint="hip" coef="1"/><joint joint="knee" coef="1"/></fixed></tendon>
  <actuator>
    <motor name="m_knee" joint="knee" gear="40" ctrlrange="-0.5 1"/>
    <position name="p_hip" joint="hip" class="strong"/>
    <velocity joint="slide" kv="3"/>
    <motor name="m_both" tendon="both"/>
  </actuator>
  <keyframe>
    <key name="other" qpos="0 0 9 1 0 0 0  9 9 9  1 0 0 0"/>
    <key name="home" qpos="0 0 1 1 0 0 0  -0.3 0.6 0.1  1 0 0 0"/>
  </keyframe>
</mujoco>
"""


@pytest.fixture(scope="module")
def model() -> Model:
    return mujoco.MjModel.from_xml_string(MJCF)


def test_outputs_are_in_the_actuators_order_and_joints_in_the_models(model: Model) -> None:
    assert model_facts.actuator_names(model) == ("m_knee", "p_hip", "slide", "m_both")
    assert model_facts.driven_joints(model) == ("knee", "hip", "slide", None)
    assert model_facts.kinds(model) == ("torque", "position", "velocity", "torque")
    assert [joint.name for joint in model_facts.joints(model)] == ["hip", "knee", "slide"]
    assert [joint.output for joint in model_facts.joints(model)] == [1, 0, 2]


def test_gains_limits_and_defaults_are_the_actuators_and_joints_own(model: Model) -> None:
    hip, knee, slide = model_facts.joints(model)
    assert (hip.kp, hip.kd, hip.damping, hip.armature, hip.friction) == (75.0, 1.5, 0.25, 0.01, 0.125)
    assert (hip.lower, hip.upper, hip.effort) == (-1.5, 0.5, (-20.0, 25.0))  # the tighter of joint and actuator
    assert (knee.kp, knee.kd, knee.damping, knee.effort) == (None, None, 1.0, (-20.0, 40.0))  # gear * ctrlrange
    assert (knee.lower, knee.upper) == (None, None)
    assert (slide.kp, slide.kd, slide.effort) == (None, 3.0, None)
    assert [joint.default_position for joint in (hip, knee, slide)] == [-0.3, 0.6, 0.1]


def test_a_damping_ratio_is_resolved_to_the_gain_that_the_model_runs_with() -> None:
    ratio = MJCF.replace('kp="75" kv="1.5"', 'kp="75" dampratio="1"')
    hip = model_facts.joints(mujoco.MjModel.from_xml_string(ratio))[0]
    assert hip.kp == 75.0 and hip.kd is not None and hip.kd > 0


@pytest.mark.parametrize(
    "actuator",
    [
        '<position name="p_hip" joint="hip" kp="75" gear="2"/>',
        '<intvelocity name="p_hip" joint="hip" kp="5" actrange="-1 1"/>',
        '<muscle name="p_hip" joint="hip"/>',
    ],
)
def test_actuators_whose_command_is_none_of_the_three_are_called_other(actuator: str) -> None:
    odd = mujoco.MjModel.from_xml_string(MJCF.replace('<position name="p_hip" joint="hip" class="strong"/>', actuator))
    assert model_facts.kinds(odd)[1] == "other"
    assert model_facts.joints(odd)[0].kp is None


def test_every_element_of_positions_and_velocities_has_a_name(model: Model) -> None:
    assert model_facts.position_names(model)[:9] == tuple(
        ["root.x", "root.y", "root.z", "root.qw", "root.qx", "root.qy", "root.qz", "hip", "knee"]
    )
    assert model_facts.velocity_names(model)[-4:] == ("slide", "ball.wx", "ball.wy", "ball.wz")
    assert (len(model_facts.position_names(model)), len(model_facts.velocity_names(model))) == (model.nq, model.nv)
    assert model_facts.has_quaternions(model)


def action_of(model: Model) -> Action:
    width = 3
    box = AffineMap((0.5,) * width, (0.0,) * width, (-0.5,) * width, (0.5,) * width, True)
    return Action(width, box, None, model_facts.actuator_names(model)[:3], model_facts.driven_joints(model)[:3])


def test_a_response_is_largest_at_the_driven_joint_and_follows_a_permutation_of_names(model: Model) -> None:
    action, pose = action_of(model), Pose({"hip": -0.2}, {})
    found = responses(model, action, 5, 0.5, pose, contacts=True)
    assert np.abs(found).argmax(1).tolist() == [0, 1, 2]
    turned = replace(action, names=("p_hip", "slide", "m_knee"))
    np.testing.assert_array_equal(
        responses(model, turned, 5, 0.5, pose, contacts=True), found[np.ix_([1, 2, 0], [1, 2, 0])]
    )


def test_a_response_is_in_proportion_to_the_action_scale_where_there_is_no_friction() -> None:
    smooth = mujoco.MjModel.from_xml_string(MJCF.replace(' frictionloss="0.125"', ""))
    action = action_of(smooth)
    pose, larger = Pose({"hip": 0.0}, {}), replace(action, box=replace(action.box, scale=(1.0,) * 3))
    once = responses(smooth, action, 1, 0.1, pose, contacts=False)
    twice = responses(smooth, larger, 1, 0.1, pose, contacts=False)
    np.testing.assert_allclose(twice, 2 * once, rtol=1e-6, atol=1e-12)


def test_a_response_leaves_the_model_as_it_was(model: Model) -> None:
    before = model.opt.disableflags
    responses(model, action_of(model), 1, 0.1, Pose({}, {}), contacts=False)
    assert model.opt.disableflags == before
