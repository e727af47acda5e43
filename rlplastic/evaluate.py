"""`python -m rlplastic.evaluate run=runs/humanoid episodes=50`: how good a trained policy is, and how sure that is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from rlplastic.command_line import leave, parse, run_verb
from rlplastic.errors import ConfigurationError


@dataclass
class Arguments:
    """Play whole episodes with a run's newest policy; prints the result and writes <run>/evaluation.json."""

    run: str = MISSING
    """Run directory."""
    episodes: int = 50
    """How many, one per environment."""
    seed: int | None = None
    """Of the environments; the run's own if left out."""
    video: bool = False
    """Also record one episode to <run>/videos/."""
    device: str = "cpu"
    """cpu, cuda or cuda:<index>."""


def main(arguments: Sequence[str]) -> None:
    """Evaluate, print, write.

    Raises:
        ConfigurationError: wrong arguments, no such run, no checkpoint, or an unwritable run directory.
        CheckpointError: every checkpoint is damaged.
        NonFiniteError: a return or an action is not finite.
    """
    options = parse(arguments, Arguments, "evaluate")
    if options.seed is not None and options.seed < 0:
        raise ConfigurationError(f"seed={options.seed} is out of range; expected a number of 0 or more")

    from rlplastic.evaluation import evaluate
    from rlplastic.policy import load_policy
    from rlplastic.run_directory import write_report
    from rlplastic.terminal import View, standard_console

    run, console = Path(options.run), standard_console()
    view = View(live=False, console=console)
    policy = load_policy(run, options.device, warn=view.warn)
    seed = policy.config.seed if options.seed is None else options.seed
    with console.status(f"playing {options.episodes} episodes of {policy.env.task}"):
        # index 0: starting states that no evaluation during training has seen
        result = evaluate(policy.act, policy.env, seed=seed, episodes=options.episodes, transitions=policy.step)
    low, high = result.ci95
    spread = f"95 % interval {low:.5g} to {high:.5g}" if options.episodes > 1 else "one episode, so no interval"
    view.note(f"{policy.env.task} after {policy.step:,} steps, {options.episodes} episodes, seed {seed}")
    view.note(
        f"  return   {result.mean:.5g} ({spread}), std {result.std:.5g}, "
        f"min {result.returns.min():.5g}, max {result.returns.max():.5g}"
    )
    view.note(
        f"  length   {result.lengths.mean():.0f} steps, {result.terminated.mean():.0%} ended before the time limit"
    )
    report = {
        "task": policy.env.task,
        "step": policy.step,
        "seed": seed,
        "episodes": options.episodes,
        "mean": result.mean,
        "ci95": [low, high],
        "std": result.std,
        "min": float(result.returns.min()),
        "max": float(result.returns.max()),
        "returns": result.returns.tolist(),
        "lengths": result.lengths.tolist(),
        "terminated": result.terminated.tolist(),
    }
    write_report(run / "evaluation.json", report, "evaluate again")
    view.note(f"  written to {run / 'evaluation.json'}")
    if options.video:
        from rlplastic.video import record

        path = run / "videos" / f"step_{policy.step:012d}.mp4"
        with console.status("recording an episode"):
            reason = record(policy.act, policy.env, path, seed=seed, transitions=policy.step)
        view.note(f"  no video: {reason}" if reason else f"  video at {path}")


if __name__ == "__main__":
    leave(run_verb(main, sys.argv[1:]))
