"""Does an environment keep the contract of `rlplastic.envs.base`? Watched from outside.

    python -m rlplastic.envs.checker task=Ant-v5
    python -m rlplastic.envs.checker env=g1 num_envs=8 steps=1500
    python -m rlplastic.envs.checker task=Pendulum-v1 backend=gymnasium autoreset=disabled
    python -m rlplastic.envs.checker env=torch task=module:factory device=cuda

Keys: env, a short name, or task; all of training's env.…; and of the check num_envs (4), steps
(0: a little more than one time limit) and seed (0). Prints one line per check and leaves with 0 if
none failed, 2 otherwise, 130 if interrupted. For an environment of your own call `check` with a
function that builds it from a list of seeds.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rlplastic.command_line import leave, refused, run_verb
from rlplastic.envs.base import ActionMap, AutoresetMode, Observation, Step, VectorEnv
from rlplastic.envs.episodes import EpisodeStatistics, FinishedEpisodes
from rlplastic.envs.gymnasium_adapter import in_words, raised_at
from rlplastic.errors import ConfigurationError, EnvironmentContractError, NonFiniteError, RlplasticError, nearest

if TYPE_CHECKING:
    from rich.table import Table

    from rlplastic.config import EnvConfig

Status = Literal["pass", "fail", "skip"]
_MOST_STEPS = 2000


@dataclass(frozen=True)
class Finding:
    """One check, its outcome and the evidence in one sentence."""

    name: str
    status: Status
    sentence: str


@dataclass(frozen=True)
class Report:
    """What `check` found."""

    description: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed; skipped checks do not count."""
        return all(finding.status != "fail" for finding in self.findings)

    def status(self, name: str) -> Status:
        """The outcome of one check."""
        return next(finding.status for finding in self.findings if finding.name == name)

    def table(self) -> Table:
        """For a terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table("check", "result", "evidence", title=Text(self.description), title_justify="left")
        colours = {"pass": "green", "fail": "bold red", "skip": "yellow"}
        for finding in self.findings:
            # Texts, in which brackets, of arrays say, are no markup.
            table.add_row(finding.name, Text(finding.status, colours[finding.status]), Text(finding.sentence))
        return table


@dataclass
class _Rollout:
    """T vector steps of random actions: ``observations`` has T + 1 entries, the reset's first."""

    observations: list[Observation]
    steps: list[Step]
    episodes: FinishedEpisodes

    def done(self) -> NDArray[np.bool_]:
        """(T, N): where an episode ended."""
        return np.array([step.terminated | step.truncated for step in self.steps])


def check(make: Callable[[list[int]], VectorEnv], num_envs: int = 4, steps: int | None = None, seed: int = 0) -> Report:
    """Build the environment a few times, drive it with random actions, and judge what comes back.

    Args:
        make: builds ``len(seeds)`` environments from construction seeds.
        num_envs: environments per copy.
        steps: vector steps per copy; None: a little more than one time limit, at most 2,000.
        seed: of the seeds and actions.
    """
    seeds = [seed * 1_000_003 + index for index in range(num_envs)]
    envs = make(seeds)
    try:
        return _judge(envs, make, seeds, steps, seed)
    finally:
        with suppress(Exception):  # judged already; the processes of one that failed must not stay
            envs.close()


def _judge(
    envs: VectorEnv, make: Callable[[list[int]], VectorEnv], seeds: list[int], steps: int | None, seed: int
) -> Report:
    """`check` of environments that are there; ``make`` builds others to compare them with."""
    num_envs = len(seeds)
    findings = [_check_attributes(envs, num_envs)]
    description = str(getattr(envs, "description", type(envs).__name__))
    names = ("shapes", "finite", "determinism", "autoreset", "time limit", "seeds", "actions", "close")
    if findings[0].status == "fail":
        skipped = [Finding(name, "skip", "the attributes must be right first") for name in names]
        return Report(description, (*findings, *skipped))
    count = steps or min((envs.max_episode_steps or 1000) + 2, _MOST_STEPS)
    try:
        rollout = _rollout(envs, count, seed)
    except Exception as error:
        # the adapter's own sentence sends the reader here
        cause = (error.__cause__ if isinstance(error, RlplasticError) else None) or error
        place = raised_at(cause)
        words = f"reset and step raised {in_words(cause)}" + (f" at {place}" if place else "")
        failed = Finding("shapes", "fail", words)
        skipped = [Finding(name, "skip", "the environment does not step") for name in names[1:]]
        return Report(description, (*findings, failed, *skipped))
    findings.append(_check_shapes(envs, rollout))
    sound = findings[-1].status == "pass"
    twin = partial(make, seeds)
    judged: list[tuple[str, Callable[[], Finding]]] = [
        ("finite", lambda: _check_finite(rollout)),
        ("determinism", lambda: _check_determinism(envs, rollout, twin, seed)),
        # called next: a twin is only a witness if it repeats what its like did
        ("autoreset", lambda: _check_autoreset(envs, rollout, twin if findings[-1].status == "pass" else None, seed)),
        ("time limit", lambda: _check_time_limit(envs, rollout)),
        ("seeds", lambda: _check_seeds(envs, rollout, make([other + 500_009 for other in seeds]), seed)),
        ("actions", lambda: _check_actions(envs)),
        ("close", lambda: _check_close(envs)),
    ]
    for name, judge in judged:
        if not sound and name not in ("actions", "close"):
            findings.append(Finding(name, "skip", "the shapes must be right first"))
            continue
        try:
            findings.append(judge())
        except Exception as error:
            findings.append(Finding(name, "fail", f"raised {type(error).__name__}: {error}"))
    return Report(description, tuple(findings))


def _actions(seed: int, time: int, num_envs: int, action_dim: int) -> NDArray[np.float32]:
    return np.random.default_rng([seed, time]).uniform(-1, 1, (num_envs, action_dim)).astype(np.float32)


def _rollout(envs: VectorEnv, steps: int, seed: int, other_action_after_done: bool = False) -> _Rollout:
    statistics = EpisodeStatistics(envs.num_envs, envs.autoreset)
    rollout = _Rollout([envs.reset()], [], statistics.pop_finished())
    after_done = np.zeros(envs.num_envs, np.bool_)
    for time in range(steps):
        actions = _actions(seed, time, envs.num_envs, envs.action_dim)
        if other_action_after_done:
            # the sign is flipped and no entry stays near zero, so that the action surely matters if it is used
            actions[after_done] = np.where(actions[after_done] > 0, np.float32(-1), np.float32(1))
        envs.send(actions)
        step = envs.receive()
        rollout.observations.append(step.observation)
        rollout.steps.append(step)
        after_done = np.asarray(step.terminated) | np.asarray(step.truncated)
        if after_done.shape == (envs.num_envs,):
            statistics.observe(step)
        else:
            break
    rollout.episodes = statistics.pop_finished()
    return rollout


def _check_attributes(envs: VectorEnv, num_envs: int) -> Finding:
    missing = [
        name for name in (*VectorEnv.__annotations__, "reset", "send", "receive", "close") if not hasattr(envs, name)
    ]
    if missing:
        return Finding("attributes", "fail", f"{', '.join(missing)} missing; expected every attribute of VectorEnv")
    faults = []
    if envs.num_envs != num_envs:
        faults.append(f"num_envs is {envs.num_envs}, expected {num_envs}, one per seed")
    dims = envs.observation_dims
    if not isinstance(dims, dict) or list(dims) not in (["policy"], ["policy", "critic"]):
        faults.append(
            f"observation_dims is {dims!r}, expected a dictionary of policy and perhaps critic, in that order"
        )
    limit = envs.max_episode_steps
    if limit is not None and not (isinstance(limit, int | np.integer) and limit > 0):
        faults.append(f"max_episode_steps is {limit!r}, expected an integer of at least 1, or None")
    if not isinstance(envs.autoreset, AutoresetMode):
        faults.append(f"autoreset is {envs.autoreset!r}, expected an AutoresetMode")
    if np.shape(envs.action_low) != (envs.action_dim,) or np.shape(envs.action_high) != (envs.action_dim,):
        faults.append(f"the action bounds are {np.shape(envs.action_low)}, expected ({envs.action_dim},)")
    if faults:
        return Finding("attributes", "fail", "; ".join(faults))
    widths = ", ".join(f"{group} {width}" for group, width in dims.items())
    return Finding("attributes", "pass", f"observations {widths}; actions {envs.action_dim}; {envs.autoreset.value}")


def _check_shapes(envs: VectorEnv, rollout: _Rollout) -> Finding:
    groups = {name: ("float32", (envs.num_envs, width)) for name, width in envs.observation_dims.items()}
    for time, observation in enumerate(rollout.observations):
        found = {name: (str(array.dtype), array.shape) for name, array in observation.items()}
        if found != groups:
            return Finding("shapes", "fail", f"observation {time} is {found}, expected {groups}")
    for time, step in enumerate(rollout.steps):
        for name, dtype in (("reward", "float32"), ("terminated", "bool"), ("truncated", "bool")):
            array = np.asarray(getattr(step, name))
            if str(array.dtype) != dtype or array.shape != (envs.num_envs,):
                return Finding(
                    "shapes",
                    "fail",
                    f"{name} {time} is {array.dtype} {array.shape}, expected {dtype} ({envs.num_envs},)",
                )
    return Finding("shapes", "pass", f"{len(rollout.steps)} steps of {envs.num_envs} environments, float32 and bool")


def _check_finite(rollout: _Rollout) -> Finding:
    for time, observation in enumerate(rollout.observations):
        for name, array in observation.items():
            if not np.isfinite(array).all():
                row, column = np.argwhere(~np.isfinite(array))[0].tolist()
                return Finding(
                    "finite", "fail", f"{name} observation {time}, environment {row}, entry {column} is not finite"
                )
    for time, step in enumerate(rollout.steps):
        if not np.isfinite(step.reward).all():
            return Finding("finite", "fail", f"the reward of step {time} is {step.reward.tolist()}, expected numbers")
    largest = max(float(np.abs(array).max()) for observation in rollout.observations for array in observation.values())
    return Finding("finite", "pass", f"largest observation {largest:.4g}")


def _check_autoreset(envs: VectorEnv, rollout: _Rollout, twin: Callable[[], VectorEnv] | None, seed: int) -> Finding:
    """Compare the declared mode with what the first end of every environment shows.

    A ``twin`` acts differently after each end, which must not matter; without one that is not looked at.
    """
    done = rollout.done()
    ended = np.flatnonzero(done[:-1].any(axis=0))
    if not len(ended):
        return Finding("autoreset", "skip", f"no episode ended within {len(done)} steps; give more steps")
    first = {int(row): int(np.argmax(done[:, row])) for row in ended}
    fault = (
        _next_step_fault(rollout, first, twin, seed)
        if envs.autoreset is AutoresetMode.NEXT_STEP
        else _same_step_fault(envs, rollout, first)
    )
    if fault:
        return Finding("autoreset", "fail", fault)
    return Finding("autoreset", "pass", f"{envs.autoreset.value} seen at the first end of {len(first)} environments")


def _next_step_fault(
    rollout: _Rollout, first: dict[int, int], twin: Callable[[], VectorEnv] | None, seed: int
) -> str | None:
    other = None
    if twin is not None:
        copy = twin()
        other = _rollout(copy, max(first.values()) + 2, seed, other_action_after_done=True)
        copy.close()
    for row, time in first.items():
        if "final_observation" in rollout.steps[time].info:
            return f"environment {row} hands out final_observation, which belongs to SAME_STEP; NEXT_STEP was declared"
        after = rollout.steps[time + 1]
        if after.reward[row] != 0 or after.terminated[row] or after.truncated[row]:
            return (
                f"environment {row} has reward {after.reward[row]:.4g} in the row after its end; "
                "NEXT_STEP returns the reset there, with reward 0"
            )
        if other and any(
            not np.array_equal(group[row], other.observations[time + 2][name][row])
            for name, group in rollout.observations[time + 2].items()
        ):
            return (
                f"environment {row} acted in the row after its end; NEXT_STEP ignores that action and returns the reset"
            )
    return None


def _same_step_fault(envs: VectorEnv, rollout: _Rollout, first: dict[int, int]) -> str | None:
    for row, time in first.items():
        final = rollout.steps[time].info.get("final_observation")
        if final is None:
            return f"environment {row} ended without info['final_observation'], which SAME_STEP demands"
        found = {name: (str(array.dtype), array.shape) for name, array in final.items()}
        groups = {name: ("float32", (envs.num_envs, width)) for name, width in envs.observation_dims.items()}
        if found != groups:
            return f"final_observation is {found}, expected {groups}"
        if not all(np.isfinite(array[row]).all() for array in final.values()):
            return f"the final observation of environment {row} is not finite"
        if all(np.array_equal(array[row], rollout.observations[time + 1][name][row]) for name, array in final.items()):
            return f"environment {row} returned its final observation again instead of the reset's"
    return None


def _check_time_limit(envs: VectorEnv, rollout: _Rollout) -> Finding:
    limit, episodes = envs.max_episode_steps, rollout.episodes
    if limit is None:
        return Finding("time limit", "skip", "the environment declares none")
    if (episodes.lengths > limit).any():
        return Finding("time limit", "fail", f"an episode took {episodes.lengths.max()} steps, the limit is {limit}")
    early = (episodes.lengths < limit) & ~episodes.terminated
    if early.any():
        return Finding(
            "time limit", "fail", f"truncated after {episodes.lengths[early][0]} steps, the limit is {limit}"
        )
    reached = episodes.lengths == limit
    if not reached.any():
        beyond = len(rollout.steps) > limit and not len(episodes.lengths)
        if beyond:
            return Finding(
                "time limit", "fail", f"no episode ended in {len(rollout.steps)} steps, the limit is {limit}"
            )
        return Finding("time limit", "skip", f"no episode lasted the {limit} steps")
    truncated = sum(int(step.truncated.sum()) for step in rollout.steps)
    if not truncated:
        return Finding(
            "time limit", "fail", f"episodes end at the limit of {limit} steps as terminated, expected truncated"
        )
    return Finding("time limit", "pass", f"{int(reached.sum())} episodes were truncated after {limit} steps")


def _difference(rollout: _Rollout, other: _Rollout) -> int | None:
    """The first time at which two rollouts differ in any bit of observation, reward or end."""
    for time in range(min(len(rollout.observations), len(other.observations))):
        mine, theirs = rollout.observations[time], other.observations[time]
        same = all(np.array_equal(mine[name], theirs[name], equal_nan=True) for name in mine)
        if time and same:
            first, second = rollout.steps[time - 1], other.steps[time - 1]
            same = all(np.array_equal(getattr(first, name), getattr(second, name)) for name in Step._fields[1:4])
        if not same:
            return time
    return None


def _check_determinism(envs: VectorEnv, rollout: _Rollout, twin: Callable[[], VectorEnv], seed: int) -> Finding:
    if not envs.deterministic:
        return Finding("determinism", "skip", "declared not deterministic: runs cannot resume exactly")
    copy = twin()
    time = _difference(rollout, _rollout(copy, len(rollout.steps), seed))
    copy.close()
    if time is not None:
        return Finding("determinism", "fail", f"equal seeds and actions differ at step {time}; expected equal bits")
    return Finding(
        "determinism", "pass", f"a second copy with the same seeds gave the same bits for {len(rollout.steps)} steps"
    )


def _starts_vary(rollout: _Rollout, autoreset: AutoresetMode) -> bool:
    """Whether any two episodes, of any environment, start from different observations."""
    delay = 2 if autoreset is AutoresetMode.NEXT_STEP else 1
    starts = list(rollout.observations[0]["policy"])
    for time, row in np.argwhere(rollout.done()):
        if time + delay < len(rollout.observations):
            starts.append(rollout.observations[time + delay]["policy"][row])
    return any(not np.array_equal(start, starts[0], equal_nan=True) for start in starts)


def _check_seeds(envs: VectorEnv, rollout: _Rollout, others: VectorEnv, seed: int) -> Finding:
    horizon = min(len(rollout.steps), 50)
    short = _Rollout(rollout.observations[: horizon + 1], rollout.steps[:horizon], rollout.episodes)
    time = _difference(short, _rollout(others, horizon, seed))
    others.close()
    if time is None and _starts_vary(rollout, envs.autoreset):
        return Finding(
            "seeds", "fail", f"other construction seeds gave the same bits for {horizon} steps: the seed is ignored"
        )
    if time is None:
        return Finding(
            "seeds", "skip", "all episodes start alike whatever the seed: the task is not random, or ignores it"
        )
    return Finding("seeds", "pass", f"other seeds differ from step {time} on")


def _check_actions(envs: VectorEnv) -> Finding:
    ActionMap(envs.action_low, envs.action_high)  # refuses bounds that are not finite and increasing
    for end in (-1, 1):
        envs.send(np.full((envs.num_envs, envs.action_dim), end, np.float32))
        envs.receive()
    good = np.zeros((envs.num_envs, envs.action_dim), np.float32)
    nan, beyond = good.copy(), good.copy()
    nan[-1, -1], beyond[-1, -1] = np.nan, 1.5
    bad: dict[str, tuple[Any, type[RlplasticError]]] = {
        "a missing row": (good[:-1], EnvironmentContractError),
        "a missing column": (good[:, :-1], EnvironmentContractError),
        "float64": (good.astype(np.float64), EnvironmentContractError),
        "NaN": (nan, NonFiniteError),
        "1.5": (beyond, EnvironmentContractError),
    }
    for name, (actions, expected) in bad.items():
        try:
            envs.send(actions)
        except expected:
            continue
        except Exception as error:
            return Finding("actions", "fail", f"{name} raised {type(error).__name__}, expected {expected.__name__}")
        return Finding("actions", "fail", f"{name} was accepted, expected {expected.__name__}")
    envs.send(good)
    envs.receive()
    return Finding("actions", "pass", "-1 and 1 are taken; wrong shape, dtype, NaN and 1.5 are refused")


def _check_close(envs: VectorEnv) -> Finding:
    envs.close()
    envs.close()
    return Finding("close", "pass", "closing twice is harmless")


def _configuration(arguments: Sequence[str]) -> tuple[EnvConfig, dict[str, int]]:
    """`key=value` arguments to the environment's configuration and the checker's own numbers."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from rlplastic.config import EnvConfig
    from rlplastic.envs import catalogue

    numbers = {"num_envs": 4, "steps": 0, "seed": 0}
    settings: dict[str, str] = {}
    own = ("num_envs", "kwargs", "randomise")
    keys = ["env", *numbers, *(f.name for f in fields(EnvConfig) if f.name not in own)]
    for argument in arguments:
        name, equals, value = argument.removeprefix("env.").partition("=")
        if not equals or (name not in keys and not name.startswith(("kwargs.", "randomise."))):
            raise ConfigurationError(f"{argument!r} is not understood; expected key=value, {nearest(name, keys)}")
        if name in numbers:
            least = 1 if name == "num_envs" else 0
            if not value.isdecimal() or int(value) < least:
                raise ConfigurationError(f"{name}={value} is out of range; expected an integer of at least {least}")
            numbers[name] = int(value)
        else:
            settings[name] = value
    folder = Path(__file__).resolve().parent.parent / "configs" / "env"
    chosen = {path.stem: path for path in folder.glob("*.yaml")}
    plain: Any = {}
    if (short := settings.pop("env", None)) is not None:
        if short not in chosen:
            raise ConfigurationError(f"there is no environment {short!r}; {nearest(short, chosen)}")
        plain = OmegaConf.load(chosen[short])
        plain.pop("defaults", None)
    elif "task" not in settings:
        raise ConfigurationError("no environment was named; expected task=<name> or env=<short name>")
    elif "family" not in settings:
        settings["family"] = catalogue.find_family(settings["task"]) or "mujoco"
        if settings["family"] in ("gymnasium", "torch"):
            settings.setdefault("backend", settings["family"])
    try:
        dotlist = OmegaConf.from_dotlist([f"{name}={value}" for name, value in settings.items()])
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(EnvConfig), plain, dotlist))
    except OmegaConfBaseException as error:
        raise ConfigurationError(refused(" ".join(arguments), error)) from error
    assert isinstance(config, EnvConfig)
    catalogue.require_task(config.family, config.task)
    return config, numbers


def main(arguments: Sequence[str]) -> None:
    """The command.

    Raises:
        ConfigurationError: the arguments name no environment that can be built.
        EnvironmentContractError: a check failed.
    """
    from rich.console import Console

    from rlplastic.envs import build_envs

    if any(argument in ("-h", "--help") for argument in arguments):
        print(inspect.cleandoc(__doc__ or ""))
        return
    config, numbers = _configuration(arguments)
    report = check(partial(build_envs, config), numbers["num_envs"], numbers["steps"] or None, numbers["seed"])
    Console().print(report.table())
    if not report.passed:
        failed = ", ".join(finding.name for finding in report.findings if finding.status == "fail")
        raise EnvironmentContractError(f"{config.task} breaks the contract ({failed}); the table says what to mend")


if __name__ == "__main__":
    leave(run_verb(main, sys.argv[1:]))
