"""`python -m rlplastic.play policy=policy.onnx`: an exported policy in its task, or in plain MuJoCo (sim-to-sim).

    python -m rlplastic.play policy=runs/hopper/export/policy.onnx episodes=20
    python -m rlplastic.play policy=policy.onnx env=hopper env.backend=gymnasium perturb.friction=0.5 realtime=true
    python -m rlplastic.play policy=policy.onnx mjcf=robot.xml command=[0.5,0,0] robustness=true

Nothing but the ONNX file and its document is read of the training run, and torch is never imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import MISSING

from rlplastic.command_line import leave, parse, run_verb
from rlplastic.envs.perturbation import NAMES, Perturbation
from rlplastic.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.console import Console

    from rlplastic.playing.stages import Stage
    from rlplastic.terminal import View

GIVEN_AWAY = "which MuJoCo tasks with env.backend=gymnasium, and mjcf=, give away"


@dataclass
class Arguments:
    """Play whole episodes with an exported policy, at its own rate; prints and writes what came of it.

    In its own task, or in another with env=<short name>, with settings as in training (env.backend=gymnasium).
    """

    policy: str = MISSING
    """The ONNX file."""
    mjcf: str | None = None
    """A MuJoCo XML file to play in, instead of a task."""
    command: list[float] = field(default_factory=lambda: [0.5, 0.0, 0.0])
    """What mjcf= commands: forward, sideways and turning, in m/s and rad/s."""
    seconds: float = 20.0
    """Time limit of mjcf=."""
    episodes: int = 10
    """How many."""
    seed: int | None = None
    """Of starts and perturbations; the training run's if left out."""
    realtime: bool = False
    """Wait for the end of every control period."""
    perturb: Perturbation = field(default_factory=Perturbation)
    robustness: bool = False
    """A sweep over all perturbations."""
    video: bool = False
    """Also record one episode as MP4."""
    out: str | None = None
    """Folder of what is written; beside the export if left out."""


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
    from rlplastic.playing.stages import mjcf_stage, task_stage
    from rlplastic.terminal import View, standard_console

    policy = OnnxPolicy.load(options.policy)
    seed = int(policy.document.provenance.configuration.get("seed", 0)) if options.seed is None else options.seed
    if options.mjcf is None:
        stage = task_stage(policy, of_env, seed, options.episodes)
    else:
        stage = mjcf_stage(policy, options.mjcf, seed, options.seconds, options.command)
    hidden = [name for name in options.perturb.changed() if name not in stage.names]
    if hidden:
        raise ConfigurationError(f"perturb.{hidden[0]} edits the robot's model, {GIVEN_AWAY}; expected one of them")
    console = standard_console()
    view = View(live=False, console=console)
    file = _folder(options) / f"{stage.name}.json"
    if options.robustness:
        _robustness(stage, options, file.with_stem(f"{stage.name}_robustness"), view, console)
    else:
        _play(stage, options, file, view, console)
    if options.video:
        reason = stage.film(options.perturb, file.with_suffix(".mp4"))
        view.note(f"  no video: {reason}" if reason else f"  video at {file.with_suffix('.mp4')}")


def _play(stage: Stage, options: Arguments, file: Path, view: View, console: Console) -> None:
    """Episodes at the policy's rate: returns, latencies, deadlines."""
    from rlplastic.playing.rollout import Pace, Timings
    from rlplastic.run_directory import write_report

    timings = Timings(stage.period)
    stage.policy.run(np.zeros((1, stage.policy.observation_dim), np.float32))  # a runtime's first call allocates
    result = stage.evaluate(options.perturb, options.episodes, Pace(timings, options.realtime))
    found = timings.summary()
    (low, high), latency = result.ci95, found["latency_ms"]
    spread = f"95 % interval {low:.5g} to {high:.5g}" if options.episodes > 1 else "one episode, so no interval"
    mode = "in real time" if options.realtime else "as fast as it goes"
    view.note(_title(stage, options))
    view.note(f"  {stage.unit:<20}{result.mean:.5g} ({spread}), std {result.std:.5g}")
    view.note(f"  length              {result.lengths.mean():.0f} steps, {result.terminated.mean():.0%} ended early")
    view.note(
        f"  latency             p50 {latency['p50']:.3g} ms, p99 {latency['p99']:.3g} ms, max {latency['max']:.3g} ms "
        f"of a control period of {stage.period * 1e3:.4g} ms"
    )
    view.note(f"  deadlines           {timings.missed:,} of {found['cycles']:,} cycles were late, {mode}")
    console.print(timings.table())
    scores = {
        "mean": result.mean,
        "ci95": [low, high],
        "std": result.std,
        "returns": result.returns.tolist(),
        "lengths": result.lengths.tolist(),
        "terminated": result.terminated.tolist(),
    }
    write_report(file, _header(stage, options) | scores | found, "play again")
    view.note(f"  written to {file}")


def _robustness(stage: Stage, options: Arguments, file: Path, view: View, console: Console) -> None:
    """The sweep: table, JSON and plot."""
    from rlplastic.playing.robustness import plot, sweep, table
    from rlplastic.run_directory import write_report

    left_out = [name for name in NAMES if name not in stage.names]
    if left_out:
        view.note(f"left out: {', '.join(left_out)}, which edit the robot's model, {GIVEN_AWAY}")
    rows = list(
        sweep(
            lambda perturbation: stage.evaluate(perturbation, options.episodes),
            options.perturb,
            stage.names,
            lambda items: view.track(items, "perturbing"),
        )
    )
    view.note(_title(stage, options))
    console.print(table(rows, stage.unit))
    document = {"rows": [row.as_json(rows[0].evaluation.mean) for row in rows]}
    write_report(file, _header(stage, options) | document, "play again")
    plot(rows, stage.unit, _title(stage, options)).savefig(file.with_suffix(".png"), dpi=120)
    view.note(f"  written to {file} and {file.with_suffix('.png')}")


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
    beside = Path(options.policy).parent
    if beside.name == "export":
        beside = beside.parent
    out = Path(options.out) if options.out is not None else beside / "play"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"out={out} cannot be made ({error.strerror}); name another folder") from error
    return out


def _title(stage: Stage, options: Arguments) -> str:
    changed = [f"{name}={getattr(options.perturb, name):g}" for name in options.perturb.changed()]
    return ", ".join([stage.name, f"{options.episodes} episodes", f"seed {stage.seed}", *changed])


def _header(stage: Stage, options: Arguments) -> dict[str, Any]:
    return {
        "policy": options.policy,
        "simulator": stage.name,
        "score": stage.unit,
        "seed": stage.seed,
        "episodes": options.episodes,
        "perturbation": asdict(options.perturb),
    }


if __name__ == "__main__":
    leave(run_verb(main, sys.argv[1:]))
