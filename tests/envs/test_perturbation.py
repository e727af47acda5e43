"""Perturbations: delays are exact shifts, and a scaled model is the one compiled from a scaled MJCF."""

from __future__ import annotations

import math
from typing import Any

import mujoco
import numpy as np
import pytest

from rlplastic.envs import perturbation as module
from rlplastic.envs.perturbation import NAMES, OF_DYNAMICS, OF_SIGNALS, Dynamics, Perturbation, Signals
from rlplastic.errors import ConfigurationError

TIMESTEP = 0.002
MOTOR = '<motor joint="hinge" gear="3"/>'
SERVO = '<position joint="hinge" kp="20" kv="2"/>'


def mjcf(mass: float = 1.0, friction: float = 1.0, gravity: float = -9.81, actuator: str = MOTOR) -> str:
    """A box with a free joint and a hinged pole on it, above a floor; scaled by hand, in the text."""
    pair, floor = (
        " ".join(f"{mu * friction!r}" for mu in mus) for mus in ((0.3, 0.2, 0.1, 0.05, 0.04), (0.4, 0.1, 0.02))
    )
    inertia = " ".join(repr(moment * mass) for moment in (0.01, 0.02, 0.03))
    return f"""<mujoco><option timestep="{TIMESTEP}" gravity="0 0 {gravity}" cone="elliptic"/>
      <worldbody><geom name="floor" type="plane" size="9 9 1" friction="{floor}"/>
        <body name="box" pos="0 0 0.1"><freejoint/>
          <geom name="box" type="box" size="0.1 0.1 0.1" mass="{2.5 * mass!r}" friction="{floor}"/>
          <body name="pole" pos="0 0 0.2"><joint name="hinge" axis="0 1 0" damping="0.1" armature="0.05"/>
            <inertial pos="0 0 0.3" mass="{0.7 * mass!r}" diaginertia="{inertia}"/>
            <geom name="pole" type="capsule" fromto="0 0 0 0 0 0.5" size="0.03" mass="0" contype="0"
              conaffinity="0" friction="{floor}"/>
          </body></body></worldbody>
      <contact><pair geom1="pole" geom2="floor" friction="{pair}"/></contact>
      <actuator>{actuator}</actuator></mujoco>"""


def simulation(**options: Any) -> tuple[Any, Any]:
    model = mujoco.MjModel.from_xml_string(mjcf(**options))
    return model, mujoco.MjData(model)


def dynamics(model: Any, data: Any, **values: Any) -> Dynamics:
    made = Dynamics(model, data, 10 * TIMESTEP, gain=True)
    made.perturb(Perturbation(**values), seed=3)
    return made


def numbers(model: Any) -> dict[str, np.ndarray]:
    """Every array of a model."""
    fields = {name: getattr(model, name) for name in dir(model) if not name.startswith("_")}
    return {name: value.copy() for name, value in fields.items() if isinstance(value, np.ndarray)}


@pytest.mark.parametrize("values", [{"mass": 2.0}, {"friction": 0.5}, {"mass": 0.7, "friction": 1.4}])
def test_scaled_model_is_the_one_compiled_from_a_scaled_mjcf(values: dict[str, float]) -> None:
    model, data = simulation()
    before = numbers(model)
    dynamics(model, data, **values)
    expected = numbers(mujoco.MjModel.from_xml_string(mjcf(**values)))
    for name, array in numbers(model).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-12, atol=1e-14, err_msg=name)
    changed = {name for name, array in numbers(model).items() if not np.array_equal(array, before[name])}
    assert {"geom_friction", "pair_friction"} <= changed if "friction" in values else "body_invweight0" in changed


def test_doubled_mass_doubles_the_force_of_gravity_and_not_its_acceleration() -> None:
    model, data = simulation()
    mujoco.mj_forward(model, data)
    weight = data.qfrc_bias[2]
    assert weight == pytest.approx(3.2 * 9.81)
    dynamics(model, data, mass=2.0)
    data.qpos[2] = 5.0  # away from the floor
    mujoco.mj_forward(model, data)
    assert data.qfrc_bias[2] == pytest.approx(2 * weight, rel=1e-12)
    assert data.qacc[2] == pytest.approx(-9.81)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_sliding_box_stops_where_coulombs_law_says(factor: float) -> None:
    model = mujoco.MjModel.from_xml_string(
        """<mujoco><option timestep="0.001" cone="elliptic" impratio="100"/><worldbody>
        <geom type="plane" size="9 9 1" friction="0.4"/>
        <body pos="0 0 0.1"><freejoint/><geom type="box" size="0.3 0.3 0.1" friction="0.4"/></body>
        </worldbody></mujoco>"""
    )
    data = mujoco.MjData(model)
    dynamics(model, data, friction=factor)
    mujoco.mj_step(model, data, nstep=500)  # it settles
    start, speed = float(data.qpos[0]), 1.0
    data.qvel[0] = speed
    while data.qvel[0] > 1e-3:
        mujoco.mj_step(model, data)
    assert data.qpos[0] - start == pytest.approx(speed**2 / (2 * 0.4 * factor * 9.81), rel=0.03)


@pytest.mark.parametrize("actuator", [MOTOR, SERVO])
def test_gain_scales_the_force_of_every_actuator_at_any_state(actuator: str) -> None:
    forces = []
    for gain in (1.0, 0.6):
        model, data = simulation(actuator=actuator)
        dynamics(model, data, gain=gain)
        data.qpos[7], data.qvel[6], data.ctrl[0] = 0.2, -0.7, 0.9
        mujoco.mj_forward(model, data)
        forces.append(float(data.actuator_force[0]))
    assert forces[0] != 0
    assert forces[1] == pytest.approx(0.6 * forces[0], rel=1e-12)


def test_gain_of_a_muscle_is_refused() -> None:
    model, data = simulation(actuator='<muscle joint="hinge" lengthrange="0.1 1"/>')
    with pytest.raises(ConfigurationError, match="gain cannot scale"):
        Dynamics(model, data, 0.02, gain=True)
    Dynamics(model, data, 0.02, gain=False).perturb(Perturbation(mass=2.0), 0)


def test_push_changes_the_momentum_by_force_times_time() -> None:
    model, data = simulation(gravity=0.0)
    data.qpos[2] = 5.0
    pushed = dynamics(model, data, push=0.5)
    momenta = [np.zeros(3)]
    for step in range(2 * 100 + 20):  # 0.02 s each: a push of 5 steps every 100, the first after 100
        pushed.push(step)
        mujoco.mj_step(model, data, nstep=10)
        mujoco.mj_forward(model, data)
        mujoco.mj_subtreeVel(model, data)
        momenta.append(3.2 * data.subtree_linvel[1])
    impulse = 0.5 * 3.2 * 9.81 * 0.1  # N s
    gained = np.diff(np.array(momenta), axis=0)
    active = np.flatnonzero(np.linalg.norm(gained, axis=1) > 0.1 * impulse)
    assert active.tolist() == [*range(100, 105), *range(200, 205)]
    for first in (100, 200):
        total = gained[first : first + 5].sum(axis=0)
        assert np.linalg.norm(total) == pytest.approx(impulse, rel=1e-3)
        assert abs(total[2]) < 1e-3 * impulse, "pushes are horizontal"


def test_directions_of_pushes_depend_on_the_seed_and_the_push() -> None:
    model, data = simulation()
    made = Dynamics(model, data, 0.02, gain=False)
    directions = []
    for seed in (3, 3, 4):
        made.perturb(Perturbation(push=1.0), seed)
        directions.append([math.atan2(*made.force(100 * count)[:2]) for count in range(1, 200)])
    assert directions[0] == directions[1] != directions[2]
    quadrants = np.floor(np.array(directions[0]) / (math.pi / 2))
    assert all((quadrants == quadrant).sum() > 30 for quadrant in (-2, -1, 0, 1))


def test_perturbing_again_starts_from_the_nominal_model() -> None:
    model, data = simulation(actuator=SERVO)
    nominal = numbers(model)
    made = dynamics(model, data, friction=0.3, mass=1.7, gain=0.2)
    made.perturb(Perturbation(friction=2.0, gain=3.0), seed=0)
    np.testing.assert_array_equal(model.geom_friction, nominal["geom_friction"] * 2.0)
    made.perturb(Perturbation(), seed=0)
    for name in module.SCALED_FIELDS:
        np.testing.assert_array_equal(getattr(model, name), nominal[name])
    for name, array in numbers(model).items():
        np.testing.assert_allclose(array, nominal[name], rtol=1e-12, atol=1e-14, err_msg=name)


def test_perturbation_of_nothing_leaves_every_bit_of_the_model() -> None:
    model, data = simulation(actuator=SERVO)
    nominal = numbers(model)
    dynamics(model, data).push(250)
    for name, array in numbers(model).items():
        np.testing.assert_array_equal(array, nominal[name], err_msg=name)
    assert not data.xfrc_applied.any()


@pytest.mark.parametrize(("observation_delay", "action_delay"), [(0, 0), (1, 0), (0, 1), (3, 2)])
def test_delays_are_exact_shifts(observation_delay: int, action_delay: int) -> None:
    steps, middle = 12, np.array([7.0, -7.0])
    sent = [np.array([float(t), t / 2]) for t in range(steps)]
    signals = Signals(Perturbation(observation_delay=observation_delay, action_delay=action_delay), middle, seed=0)
    for t in range(steps):
        np.testing.assert_array_equal(signals.observe(sent[t]), sent[max(t - observation_delay, 0)])
        expected = sent[t - action_delay] if t >= action_delay else middle
        np.testing.assert_array_equal(signals.act(sent[t]), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_noise_is_normal_keyed_and_keeps_the_dtype(dtype: type) -> None:
    def noise(seed: int) -> np.ndarray:
        signals = Signals(Perturbation(observation_noise=0.3), np.zeros(1), seed)
        return np.array([signals.observe(np.full(5, 2.0, dtype)) for _ in range(4000)])

    first = noise(1)
    assert first.dtype == dtype
    assert first.mean() == pytest.approx(2.0, abs=0.01)
    assert first.std() == pytest.approx(0.3, rel=0.02)
    np.testing.assert_array_equal(first, noise(1))
    assert not np.array_equal(first, noise(2))
    assert len(np.unique(first)) > 10_000, "every element and step has its own"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-1, math.nan, math.inf])
def test_value_out_of_range_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=name):
        Perturbation(**{name: value})


def test_robot_without_mass_is_refused_and_one_without_friction_is_not() -> None:
    with pytest.raises(ConfigurationError, match="mass=0"):
        Perturbation(mass=0.0)
    Perturbation(friction=0.0, gain=0.0)


def test_every_perturbation_is_of_signals_or_of_dynamics() -> None:
    assert sorted([*OF_SIGNALS, *OF_DYNAMICS]) == sorted(NAMES)
    assert set(module.SCALED_FIELDS.values()) | {"push"} == set(OF_DYNAMICS)
