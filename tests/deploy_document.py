"""A document with something in every part, for the tests of the runtime."""

from __future__ import annotations

from rlplastic.deploy.document import (
    Action,
    AffineMap,
    CommandRange,
    Document,
    EvaluationResult,
    Joint,
    Observation,
    ObservationTerm,
    Provenance,
    Timing,
)

THIRD = 1 / 3
DOCUMENT = Document(
    schema_version=1,
    observation=Observation(
        10,
        (
            ObservationTerm("gyro", 0, 6, (THIRD,) * 3, (0.1,) * 3, ("x", "y", "z"), clip=(-5.0, 5.0), history=2),
            ObservationTerm("joint_positions", 6, 8, (1.0, 1.0), (-THIRD, 0.0), ("knee", "hip")),
            ObservationTerm("last_action", 8, 10, (1.0, 1.0), (0.0, 0.0), delay=1),
        ),
    ),
    action=Action(
        2,
        AffineMap((0.4, 0.4), (0.0, 0.0), (-0.4, -0.4), (0.4, 0.4), True),
        AffineMap((0.25, 0.25), (0.7, -THIRD), (-1.0, -1.0), (1.0, 1.0), False),
        ("m_hip", "m_knee"),
        ("hip", "knee"),
        ("position", "position"),
        (1.0, 1.0),
    ),
    provenance=Provenance(
        "task",
        "envpool",
        10,
        "ab",
        "0.1",
        {"numpy": "2"},
        {"seed": 0},
        evaluation=EvaluationResult(THIRD, (0.0, 1.0), 9, 0),
    ),
    joints=(
        Joint("knee", -THIRD, output=1, kp=75.0, kd=0.0, lower=-1.0, upper=1.0, effort=(-5.0, 5.0)),
        Joint("hip", 0.7, 0),
    ),
    timing=Timing(0.002, 10, 0.02),
    quaternion_order="wxyz",
    commands=(CommandRange("forward", -1.0, THIRD),),
    absent={"frames": "a reason"},
)
