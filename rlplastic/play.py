"""`python -m rlplastic.play policy=policy.onnx`: an exported policy in its task, or in plain MuJoCo (sim-to-sim).

    python -m rlplastic.play policy=runs/hopper/export/policy.onnx episodes=20
    python -m rlplastic.play policy=policy.onnx env=hopper env.backend=gymnasium perturb.friction=0.5 realtime=true
    python -m rlplastic.play policy=policy.onnx mjcf=robot.xml command=[0.5,0,0] robustness=true

Nothing but the ONNX file and its document is read of the training run, and torch is never imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from rlplastic.command_line import first_line, leave, parse, run_verb
from rlplastic.config import EnvConfig, RandomiseConfig
from rlplastic.envs.perturbation import NAMES, OF_DYNAMICS, OF_SIGNALS, Perturbation
from rlplastic.errors import ConfigurationError

if TYPE_CHECKING:
    from rlplastic.deploy import Document, OnnxPolicy
    from rlplastic.envs import VectorEnv
    from rlplastic.evaluation import Evaluation
    from rlplastic.playing.rollout import Act
    from rlplastic.terminal import View

CHANGEABLE_BACKEND = "gymnasium"
"""Whose MuJoCo models can be edited."""


@dataclass
class Arguments:
    """Play whole episodes with an exported policy, at its own rate; prints and writes what came of it.

    policy: the ONNX file; env: a task, its own if left out (settings as in training: env.backend=gymnasium); mjcf: a
    MuJoCo XML file instead; command: what mjcf= commands (forward, sideways, turning), in m/s and rad/s; seconds: time
    limit of mjcf=; episodes; seed: of starts and perturbations, the training run's if left out; realtime: wait for the
    end of every control period; perturb: one value of each perturbation; robustness: a sweep over all of them; video:
    one episode as MP4; out: the folder of what is written, beside the export if left out.
    """

    policy: str = MISSING
    mjcf: str | None = None
    command: list[float] = field(default_factory=lambda: [0.5, 0.0, 0.0])
    seconds: float = 20.0
    episodes: int = 10
    seed: int | None = None
    realtime: bool = False
    perturb: Perturbation = field(default_factory=Perturbation)
    robustness: bool = False
    video: bool = False
    out: str | None = None


@dataclass(frozen=True)
class Stage:
    """Where a policy is played.

    name: for titles; unit: of what an episode is scored by; make: the one environment of an episode, by its number and
    the perturbation of its dynamics; names: perturbations that it can show; period: seconds of a control step; seed: of
    starts and perturbations; film: records one episode to a path, or says why not.
    """

    name: str
    unit: str
    make: Callable[[int, Perturbation], VectorEnv]
    names: tuple[str, ...]
    period: float
    seed: int
    film: Callable[[Act, Perturbation, Path], str | None]


def main(arguments: Sequence[str]) -> None:
    """Play, print, write.

    Raises:
        ConfigurationError: wrong arguments, no such policy, or a task or model that does not fit it.
        NonFiniteError: an observation is not finite.
    """
    of_env = [argument for argument in arguments if argument.startswith(("env=", "env."))]
    options = parse([argument for argument in arguments if argument not in of_env], Arguments, "play")
    _check(options, of_env)

    from rlplastic.deploy import OnnxPolicy
    from rlplastic.terminal import View, standard_console

    view = View(live=False, console=standard_console())
    policy = OnnxPolicy.load(options.policy)
    seed = int(policy.document.provenance.configuration.get("seed", 0)) if options.seed is None else options.seed
    stage = _task_stage(policy, of_env, options, seed) if options.mjcf is None else _mjcf_stage(policy, options, seed)
    refused = [n for n in NAMES if n not in stage.names and getattr(options.perturb, n) != getattr(Perturbation(), n)]
    if refused:
        raise ConfigurationError(
            f"perturb.{refused[0]} edits the model of the robot, which envpool does not give away; expected "
            f"env.backend={CHANGEABLE_BACKEND}, or mjcf="
        )
    out = _folder(options)
    if options.robustness:
        _robustness(policy, stage, options, out, view)
    else:
        _play(policy, stage, options, out, view)
    if options.video:
        from rlplastic.playing.rollout import perturbed
        from rlplastic.seeding import key

        path = out / f"{stage.name}.mp4"
        reason = stage.film(perturbed(policy, options.perturb, key("play", stage.seed, 0)), options.perturb, path)
        view.note(f"  no video: {reason}" if reason else f"  video at {path}")


def _play(policy: OnnxPolicy, stage: Stage, options: Arguments, out: Path, view: View) -> None:
    """Episodes at the policy's rate: returns and latencies."""
    from rlplastic.playing.rollout import Pace, Timings, perturbed, play
    from rlplastic.run_directory import write_report
    from rlplastic.seeding import key
    from rlplastic.terminal import standard_console

    timings = Timings(stage.period)
    pace = Pace(timings, options.realtime)
    policy.run(_zeros(policy))  # the first call of a runtime allocates
    result = play(
        lambda index: stage.make(index, options.perturb),
        lambda index: pace.around(perturbed(policy, options.perturb, key("play", stage.seed, index))),
        options.episodes,
    )
    found = timings.summary()
    low, high = result.ci95
    view.note(f"{stage.name}, {options.episodes} episodes, seed {stage.seed}{_told(options.perturb)}")
    view.note(f"  {stage.unit:<16}{result.mean:.5g} (95 % interval {low:.5g} to {high:.5g}), std {result.std:.5g}")
    view.note(f"  length          {result.lengths.mean():.0f} steps, {result.terminated.mean():.0%} ended early")
    latency = found["latency_ms"]
    view.note(
        f"  latency         p50 {latency['p50']:.3g} ms, p99 {latency['p99']:.3g} ms, max {latency['max']:.3g} ms of a "
        f"control period of {stage.period * 1e3:.4g} ms"
    )
    mode = "in real time" if options.realtime else "as fast as it goes"
    view.note(f"  deadlines       {timings.missed:,} of {found['cycles']:,} cycles were late, {mode}")
    standard_console().print(timings.table())
    report = _header(stage, options) | _scores(result) | found
    write_report(out / f"{stage.name}.json", report, "play again")
    view.note(f"  written to {out / f'{stage.name}.json'}")


def _robustness(policy: OnnxPolicy, stage: Stage, options: Arguments, out: Path, view: View) -> None:
    """The sweep: table, JSON and plot."""
    from rlplastic.playing.robustness import plot, sweep, table
    from rlplastic.playing.rollout import perturbed, play
    from rlplastic.run_directory import write_report
    from rlplastic.seeding import key
    from rlplastic.terminal import standard_console

    left_out = [name for name in NAMES if name not in stage.names]
    if left_out:
        view.note(
            f"left out: {', '.join(left_out)}, since {stage.name} gives no model away; env.backend=gymnasium does"
        )

    def score(perturbation: Perturbation) -> Evaluation:
        return play(
            lambda index: stage.make(index, perturbation),
            lambda index: perturbed(policy, perturbation, key("play", stage.seed, index)),
            options.episodes,
        )

    rows = list(sweep(score, options.perturb, stage.names, lambda items: view.track(items, "perturbing")))
    title = f"{stage.name}, {options.episodes} episodes each, seed {stage.seed}{_told(options.perturb)}"
    view.note(title)
    standard_console().print(table(rows, stage.unit))
    report = _header(stage, options) | {"rows": [row.as_json(rows[0].evaluation.mean) for row in rows]}
    path = out / f"{stage.name}_robustness.json"
    write_report(path, report, "play again")
    plot(rows, stage.unit, title, path.with_suffix(".png"))
    view.note(f"  written to {path} and {path.with_suffix('.png')}")


def _task_stage(policy: OnnxPolicy, of_env: Sequence[str], options: Arguments, seed: int) -> Stage:
    """The training backend on a task, by default the policy's own; starts as in `rlplastic.evaluate` with this seed."""
    from rlplastic.envs import build_envs
    from rlplastic.envs.changes import Clock
    from rlplastic.seeding import environment_seeds
    from rlplastic.video import record, seconds_per_step

    env = replace(_env_config(policy.document, of_env), vectorization="sync", autoreset="next_step")
    seeds = environment_seeds(seed, "eval", 0, options.episodes, 0)
    steps = policy.document.provenance.training_steps

    def under(perturbation: Perturbation) -> EnvConfig:
        changed = [name for name in OF_DYNAMICS if getattr(perturbation, name) != getattr(Perturbation(), name)]
        values = {name: [getattr(perturbation, name)] * 2 for name in changed}
        return replace(env, randomise=RandomiseConfig(**values))

    def make(index: int, perturbation: Perturbation) -> VectorEnv:
        return build_envs(under(perturbation), [seeds[index]], Clock(steps))

    def film(act: Act, perturbation: Perturbation, path: Path) -> str | None:
        return record(act, under(perturbation), path, seed=seed, transitions=steps)

    trial: Any = make(0, Perturbation())
    try:
        widths = trial.observation_dims["policy"], trial.action_dim
        if widths != (policy.observation_dim, policy.action_dim):
            raise ConfigurationError(
                f"{env.task} has {widths[0]} observations and {widths[1]} actions, the policy {policy.observation_dim} "
                f"and {policy.action_dim}; expected the task it was trained on, "
                f"{policy.document.provenance.environment}"
            )
        editable = env.backend == CHANGEABLE_BACKEND and hasattr(trial._env.envs[0].unwrapped, "model")
        return Stage(
            env.task, "return", make, NAMES if editable else OF_SIGNALS, seconds_per_step(env, trial), seed, film
        )
    finally:
        trial.close()


def _mjcf_stage(policy: OnnxPolicy, options: Arguments, seed: int) -> Stage:
    """Plain MuJoCo on a model from a file."""
    import copy
    import os

    os.environ.setdefault("MUJOCO_GL", "egl")  # read as MuJoCo is imported; needs no display
    from rlplastic.playing.mjcf import MjcfEnv, load_model
    from rlplastic.seeding import key
    from rlplastic.video import record_with

    model = load_model(str(options.mjcf))

    def make(index: int, perturbation: Perturbation) -> MjcfEnv:
        return MjcfEnv(
            copy.copy(model),
            policy.document,
            seconds=options.seconds,
            seed=key("play", seed, index),
            command=tuple(options.command),
            perturbation=perturbation,
        )

    def film(act: Act, perturbation: Perturbation, path: Path) -> str | None:
        return record_with(act, make(0, perturbation).camera(), path)

    trial = make(0, Perturbation())
    return Stage(Path(str(options.mjcf)).stem, "seconds upright", make, NAMES, trial.period, seed, film)


def _env_config(document: Document, of_env: Sequence[str]) -> EnvConfig:
    """The task of ``env=``, else the policy's own, with what else was asked for."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from rlplastic.composition import compose, refuse_unknown

    if any(argument.startswith("env=") for argument in of_env):
        return compose(of_env).env
    refuse_unknown(of_env)
    asked = OmegaConf.from_dotlist([argument.removeprefix("env.") for argument in of_env])
    try:
        own = OmegaConf.merge(OmegaConf.structured(EnvConfig), document.provenance.configuration["env"], asked)
        config = OmegaConf.to_object(own)
    except (KeyError, OmegaConfBaseException) as error:
        raise ConfigurationError(
            f"the policy's document describes no task that can be built ({first_line(error)}); name one with env=…"
        ) from error
    assert isinstance(config, EnvConfig)
    return config


def _check(options: Arguments, of_env: Sequence[str]) -> None:
    if options.mjcf is not None and of_env:
        raise ConfigurationError(f"mjcf= and {of_env[0]} were given; expected one simulator: leave one out")
    for name in ("episodes", "seconds"):
        if not getattr(options, name) > 0:
            raise ConfigurationError(f"{name}={getattr(options, name)} is out of range; expected a number above 0")
    if options.seed is not None and options.seed < 0:
        raise ConfigurationError(f"seed={options.seed} is out of range; expected a number of 0 or more")


def _folder(options: Arguments) -> Path:
    """Where results go; never inside an export, which is replaced as a whole."""
    policy = Path(options.policy).parent
    out = (
        Path(options.out)
        if options.out is not None
        else (policy.parent if policy.name == "export" else policy) / "play"
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"out={out} cannot be made ({error.strerror}); name another folder") from error
    return out


def _zeros(policy: OnnxPolicy) -> Any:  # noqa: ANN401 - an array, whose type numpy is not yet imported for
    import numpy as np

    return np.zeros((1, policy.observation_dim), np.float32)


def _told(perturbation: Perturbation) -> str:
    changed = [
        f"{n}={getattr(perturbation, n):g}" for n in NAMES if getattr(perturbation, n) != getattr(Perturbation(), n)
    ]
    return f", {', '.join(changed)}" if changed else ""


def _header(stage: Stage, options: Arguments) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "policy": options.policy,
        "simulator": stage.name,
        "score": stage.unit,
        "seed": stage.seed,
        "episodes": options.episodes,
        "perturbation": asdict(options.perturb),
    }


def _scores(result: Evaluation) -> dict[str, Any]:
    return {
        "mean": result.mean,
        "ci95": list(result.ci95),
        "std": result.std,
        "returns": result.returns.tolist(),
        "lengths": result.lengths.tolist(),
        "terminated": result.terminated.tolist(),
    }


if __name__ == "__main__":
    leave(run_verb(main, sys.argv[1:]))
