"""What a document says, put to the running task: move one output, see where numbers appear, drive whole episodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlplastic import seeding
from rlplastic.config import EnvConfig
from rlplastic.deploy.document import Document
from rlplastic.deploy.policy import OnnxPolicy
from rlplastic.envs import Observation, build_envs, make_envs, step
from rlplastic.evaluation import Evaluation, evaluate
from rlplastic.exporting.model_facts import Model, Pose, responses, velocity_names
from rlplastic.exporting.task_facts import POSITIONS, VELOCITIES, without_noise
from rlplastic.policy import Policy

Finding = tuple[str, bool | None]
"""What was seen, and whether it is as it should be; None: nothing was there to judge."""
RAW = 0.5
FACTOR, TINY = 2.0, 1e-30
RESETS = 2
"""Starting states in which every output is moved."""


def moved_outputs(document: Document, env: EnvConfig, model: Model | None) -> Finding:
    """Move one output in equal environments, and see whether the joint responds that it is said to drive.

    A + 1 environments with one seed start alike; output i of environment i + 1 is moved for one policy step, and the
    difference to the first is its response. Coupling moves other joints as well, so responses are compared with those
    of the task's model in the same pose, on the ground or in the air, since the height is not observed. The most
    similar one, by cosine, in any of a few starts has to be that of the actuator with the output's name: a foot that
    happens to be stuck on the ground says little about its ankle. There it also has to move as far, within a `FACTOR`:
    scales, gears and timing are right.
    """
    action, timing = document.action, document.timing
    if model is None or timing is None or not all(action.joints):
        return "left out: the task's model names no joint for every output", None
    named = [t for t in document.observation.terms if t.name in POSITIONS and set(action.joints) <= set(t.elements)]
    if not named:
        return "left out: no observation term has the positions of the driven joints", None
    newest = document.observation.newest(named[0])
    columns = [newest.start + named[0].elements.index(str(name)) for name in action.joints]
    width = action.width
    similar, strength = np.full((width, width), -1.0), np.ones(width)
    for reset in range(RESETS):
        seed = seeding.key("moved outputs", reset, bits=31)
        raw = np.concatenate((np.zeros((1, width)), RAW * np.eye(width))).astype(np.float32)
        before, after = _one_step(without_noise(env), seed, raw)
        seen = after[1:, columns].astype(np.float64) - after[0, columns]
        pose = _pose(document, before[0], model)
        either = [responses(model, action, timing.decimation, RAW, pose, contacts) for contacts in (True, False)]
        for expected in either:
            found = _unit(seen) @ _unit(expected).T
            ratio = np.linalg.norm(seen, axis=1) / np.maximum(np.linalg.norm(expected, axis=1), TINY)
            strength = np.where(found.diagonal() > similar.diagonal(), ratio, strength)
            similar = np.maximum(similar, found)
    best = similar.argmax(1)
    wrong = [f"{action.names[i]} moves like {action.names[best[i]]}" for i in range(width) if best[i] != i]
    wrong += [
        f"{action.names[i]} moves {strength[i]:.2g} times as far as in the model"
        for i in range(width)
        if best[i] == i and not 1 / FACTOR < strength[i] < FACTOR
    ]
    own = similar.diagonal()
    if wrong:
        return "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""), False
    similarity = f"cosine {own.min():.2f} to {own.max():.2f}, distance {strength.min():.2f} to {strength.max():.2f}"
    return f"{width} of {width} by {named[0].name}: {similarity} of the model's", True


def _one_step(env: EnvConfig, seed: int, raw: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Policy observations before and after one step of environments that all start from ``seed``."""
    envs = build_envs(env, [seed] * len(raw))
    try:
        before = envs.reset()["policy"]
        return before, step(envs, raw).observation["policy"]
    finally:
        envs.close()


def _pose(document: Document, row: NDArray[np.float32], model: Model) -> Pose:
    """What an observation says about joints, in the model's units; a walking robot's trunk is taken to be upright."""
    position: dict[str, float] = {}
    velocity: dict[str, float] = {}
    root = velocity_names(model)[:6]
    trunk = {"linear_velocity": root[:3], "angular_velocity": root[3:]}
    for term in document.observation.terms:
        numbers = (row[document.observation.newest(term)].astype(np.float64) - term.offset) / term.scale
        if term.name in POSITIONS:
            position.update(zip(term.elements, numbers, strict=True))
        if term.name in VELOCITIES:
            velocity.update(zip(term.elements, numbers, strict=True))
        if term.name in trunk:
            velocity.update(zip(trunk[term.name], numbers, strict=True))
    return Pose(position, velocity)


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float64] = rows / np.where(norms > 0, norms, 1)
    return unit


def observed_terms(document: Document, env: EnvConfig) -> Finding:
    """Let the task run for a few steps, and see whether what is known of the next observation stands where it should.

    Known are the last actions, commands that the task tells, and with a history the older values.
    """
    rng = np.random.default_rng(seeding.key("observed terms"))
    envs = build_envs(env, [seeding.key("observed terms", 0, bits=31)])
    rows, actions, commands = [], [], []
    try:
        rows.append(envs.reset()["policy"][0])
        for _ in range(4):
            raw = rng.uniform(-1, 1, (1, envs.action_dim)).astype(np.float32)
            result = step(envs, raw)
            actions.append(np.asarray(document.action.box.scale) * raw[0] + document.action.box.offset)
            rows.append(result.observation["policy"][0])
            commands.append(result.info.get("command"))
    finally:
        envs.close()
    seen = _histories(document, rows)
    for term in document.observation.terms:
        newest = rows[-1][document.observation.newest(term)]
        if term.name == "last_action":
            seen.append((term.name, bool(np.allclose(newest, actions[-1 - term.delay], atol=1e-6))))
        if term.name == "command" and commands[-1] is not None:
            seen.append((term.name, bool(np.allclose(newest, commands[-1][0], atol=1e-6))))
    wrong = [name for name, right in seen if not right]
    if wrong:
        return f"{', '.join(wrong)}: other numbers than the document says", False
    if not seen:
        return "left out: nothing in it is known beforehand", None
    return f"{', '.join(name for name, _ in seen)}: where they should be", True


def _histories(document: Document, rows: list[NDArray[np.float32]]) -> list[tuple[str, bool]]:
    """Whether the older values of the last row are the newest of the rows before."""
    observation = document.observation
    frame = observation.width // observation.frames
    blocks = [("frames", 0, frame, observation.frames, observation.order)] if observation.frames > 1 else []
    blocks += [
        (f"history of {t.name}", t.start, t.width, t.history, t.order) for t in observation.terms if t.history > 1
    ]
    seen = []
    for name, start, width, count, order in blocks:
        values = [row[start : start + count * width].reshape(count, width) for row in rows[-2:]]
        older, newer = (value if order == "oldest_first" else value[::-1] for value in values)
        seen.append((name, bool(np.array_equal(newer[:-1], older[1:]))))
    return seen


@dataclass(frozen=True)
class ClosedLoop:
    """What driving a task with the exported policy gave.

    evaluation: of it; error: the largest of its raw actions against the trained actor without rounding, in any step;
    rounding: the largest of the trained actor's own.
    """

    evaluation: Evaluation
    error: float
    rounding: float


def closed_loop(
    exported: OnnxPolicy,
    trained: Policy,
    exact: Callable[[NDArray[np.float32]], NDArray[np.float64]],
    seed: int,
    episodes: int,
) -> ClosedLoop:
    """Drive the episodes of an evaluation with the exported ``actions``, mapped back by the document's box.

    Args:
        exported: drives.
        trained: the actor as it acted in training.
        exact: raw actions (N, A) of that actor without rounding, of observations (N, D).
        seed: of the evaluation.
        episodes: of the evaluation.
    """
    box = exported.document.action.box
    errors, roundings = [0.0], [0.0]

    def act(observation: Observation) -> NDArray[np.float32]:
        actions = exported.act(observation["policy"]).astype(np.float64)
        raw = (actions - np.asarray(box.offset)) / np.asarray(box.scale)
        wanted = exact(observation["policy"])
        errors.append(float(np.abs(raw - wanted).max()))
        roundings.append(float(np.abs(trained.act(observation) - wanted).max()))
        sent: NDArray[np.float32] = np.clip(raw, -1, 1).astype(np.float32)
        return sent

    return ClosedLoop(evaluate(act, trained.env, seed=seed, episodes=episodes), max(errors), max(roundings))


def overlap(first: Evaluation, second: Evaluation) -> bool:
    """Whether two evaluations' 95 % intervals have a number in common (of one episode each: to a millionth)."""
    (low, high), (other_low, other_high) = first.ci95, second.ci95
    slack = 1e-6 * max(abs(first.mean), abs(second.mean), 1.0)
    return low <= other_high + slack and other_low <= high + slack


def real_observations(policy: Policy, seed: int, count: int) -> NDArray[np.float32]:
    """At least ``count`` observations (R, D) of episodes that the policy plays."""
    envs = make_envs(policy.env, seed=seed, role="eval", num_envs=16, rebuild=1)
    try:
        rows = [envs.reset()]
        while len(rows) * envs.num_envs < count:
            rows.append(step(envs, policy.act(rows[-1])).observation)
    finally:
        envs.close()
    observations: NDArray[np.float32] = np.concatenate([row["policy"] for row in rows])
    return observations
