"""The contract of `rlplastic.envs.base` over gymnasium 1.x vector environments: any registered id, or a factory.

All three of gymnasium's autoreset modes are accepted. ``disabled`` becomes SAME_STEP: the adapter itself resets the
finished rows with ``reset_mask`` and hands out the final observation, so environments that reset themselves badly in
their last step can still be used.

What an environment raises, or returns in the wrong shape, becomes an `EnvironmentContractError` that names the place.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rlplastic.envs.base import ActionMap, Array, AutoresetMode, Observation, Step, check_actions
from rlplastic.envs.observations import action_box, layout_of
from rlplastic.errors import ConfigurationError, EnvironmentContractError, nearest

if TYPE_CHECKING:
    import gymnasium

_Vector: TypeAlias = Any  # a SyncVectorEnv or an AsyncVectorEnv; only the latter has step_async and step_wait
_VECTORIZATIONS = ("sync", "async")
CLOSING = 30.0
"""Seconds that processes have to finish a step and close their environments before they are ended."""
_AUTORESETS = ("next_step", "same_step", "disabled")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_NOT_THE_ENVIRONMENT = re.compile(
    r"-packages/(gymnasium/(?!envs/)|numpy/|torch/)|^<"
    rf"|^{re.escape(os.path.dirname(__file__))}|^{re.escape(os.path.dirname(os.__file__))}/(?!.*-packages/)"
)
"""Whose lines say nothing about an environment's fault: those of libraries, and ours."""


class GymnasiumEnv:
    """A `VectorEnv` over copies of one gymnasium environment.

    Args:
        env_id: a registered id, or ``module:Id-v0`` to import the module that registers it.
        num_envs: environments stepped together.
        seeds: one seed per environment, given to the first ``reset``.
        vectorization: ``sync`` steps them in this process, ``async`` in one process each.
        autoreset: ``next_step``, ``same_step`` or ``disabled`` (then this adapter resets finished rows).
        kwargs: passed to ``gymnasium.make``.

    Attributes:
        terms: per observation group, the list of (term, slice of columns).

    Raises:
        ConfigurationError: unknown id or option.
        EnvironmentContractError: observations are not flat float Boxes, actions not one bounded Box, or the environment
            itself raised something; `reset` and `receive` raise it for the same reason.
    """

    _checker = "rlplastic.envs.checker.check"

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        seeds: list[int],
        vectorization: str = "sync",
        autoreset: str = "next_step",
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        self._checker = f"python -m rlplastic.envs.checker env=gymnasium task={env_id}"
        self._build(partial(make_env, env_id, dict(kwargs or {})), num_envs, seeds, vectorization, autoreset, env_id)

    @classmethod
    def from_factory(
        cls,
        make: Callable[[], gymnasium.Env[Any, Any]],
        num_envs: int,
        seeds: list[int],
        vectorization: str = "sync",
        autoreset: str = "next_step",
        name: str = "custom",
    ) -> GymnasiumEnv:
        """Vectorise an environment of your own; ``make`` returns a new ``gymnasium.Env`` at every call."""
        envs = cls.__new__(cls)
        envs._build(make, num_envs, seeds, vectorization, autoreset, name)
        return envs

    def _build(
        self,
        make: Callable[[], gymnasium.Env[Any, Any]],
        num_envs: int,
        seeds: list[int],
        vectorization: str,
        autoreset: str,
        name: str,
    ) -> None:
        import gymnasium
        from gymnasium.vector import AutoresetMode as GymnasiumMode
        from gymnasium.vector import SyncVectorEnv

        _one_of("env.vectorization", vectorization, _VECTORIZATIONS)
        _one_of("env.autoreset", autoreset, _AUTORESETS)
        if num_envs < 1 or len(seeds) != num_envs:
            raise ConfigurationError(
                f"{num_envs} environments and {len(seeds)} seeds were given; expected at least one and a seed for each"
            )
        self._name = name
        self._broken = False
        self._workers: list[BaseProcess] = []
        # a trial copy: contract errors appear here, before any process is started
        self._study(make())
        self.num_envs = num_envs
        self.autoreset = AutoresetMode.NEXT_STEP if autoreset == "next_step" else AutoresetMode.SAME_STEP
        self.description = (
            f"gymnasium {gymnasium.__version__} {name}, {num_envs} environments, {vectorization}, {autoreset}"
        )
        self._resets_itself = autoreset != "disabled"
        self._seeds: list[int] | None = list(seeds)
        self._is_async = vectorization == "async"
        self._actions: Array | None = None
        vector: Any = _async_vector_env() if self._is_async else SyncVectorEnv
        mode = {"next_step": GymnasiumMode.NEXT_STEP, "same_step": GymnasiumMode.SAME_STEP}.get(
            autoreset, GymnasiumMode.DISABLED
        )
        with _stop_signals_held_back():
            try:
                self._env: Any = vector([make] * num_envs, autoreset_mode=mode)
            except (EOFError, ConnectionError) as error:
                raise EnvironmentContractError(
                    f"a process of {name} died while it was made, with the traceback above if it left one; mend the "
                    "environment, or step it in this process with env.vectorization=sync"
                ) from error
            self._workers = list(getattr(self._env, "processes", ()))
            self._kill_workers = partial(_kill, self._workers)
            # Registered after multiprocessing's own hook and so called before it, which would wait for deaf workers.
            atexit.register(self._kill_workers)

    def _study(self, trial: gymnasium.Env[Any, Any]) -> None:
        """Read the spaces and the time limit of one environment, and close it."""
        self._space = getattr(trial, "observation_space", None)
        try:
            self._layout = layout_of(self._space, self._name, max_ndim=1)
            self._map = ActionMap(*action_box(getattr(trial, "action_space", None), self._name))
            self._action_dtype = trial.action_space.dtype
            self.max_episode_steps = _time_limit(trial)
            self.deterministic = not (trial.spec is not None and trial.spec.nondeterministic)
        finally:
            try:
                trial.close()
            except Exception as error:
                self._blame("close", error)
        self.terms = self._layout.terms
        self.observation_dims = self._layout.dims
        self.action_low, self.action_high = self._map.low, self._map.high
        self.action_dim = len(self.action_low)

    def reset(self) -> Observation:
        """Start an episode in every environment; the first call plants the seeds, later ones continue their streams."""
        env = self._open()
        if self._actions is not None:
            self.receive()
        try:
            observation = self._layout(env.reset(seed=self._seeds)[0])
        except Exception as error:
            self._blame("reset", error)
        self._seeds = None
        return observation

    def send(self, actions: NDArray[np.float32]) -> None:
        """Check ``actions`` and start stepping (``sync``: the work happens in ``receive``); see `VectorEnv.send`."""
        check_actions(actions, self.num_envs, self.action_dim)
        env = self._open()
        if self._actions is not None:
            raise EnvironmentContractError("a step is already in flight; expected receive() before the next send()")
        self._actions = self._map(actions).astype(self._action_dtype)
        if self._is_async:
            try:
                env.step_async(self._actions)
            except Exception as error:
                self._blame("step", error)

    def receive(self) -> Step:
        """Wait for the step that ``send`` started."""
        env = self._open()
        if self._actions is None:
            raise EnvironmentContractError("no step is in flight; expected send(actions) before receive()")
        actions, self._actions = self._actions, None
        try:
            return self._step(env, actions)
        except Exception as error:
            self._blame("step", error)

    def _step(self, env: _Vector, actions: Array) -> Step:
        observation, reward, terminated, truncated, info = env.step_wait() if self._is_async else env.step(actions)
        groups = self._layout(observation)
        if self.autoreset is AutoresetMode.SAME_STEP:
            done = terminated | truncated
            if done.any():
                info = dict(info)
                if self._resets_itself:
                    info["final_observation"] = self._final(info["final_obs"], done)
                else:
                    info["final_observation"] = groups
                    groups = self._layout(env.reset(options={"reset_mask": done})[0])
        return Step(groups, reward.astype(np.float32), terminated, truncated, info)

    def close(self) -> None:
        """End the processes and free the environments; calling it twice is harmless.

        Raises:
            EnvironmentContractError: an environment raised, or a process had to be ended after `CLOSING` seconds.
        """
        if self._env is None:
            return
        with self._deadline() as overdue:
            try:
                if self._is_async and self._actions is not None:
                    with suppress(Exception):  # nobody waits for this step any more
                        self._env.step_wait()
                if overdue.is_set():
                    self._give_up_workers()
                self._env.close()
            except Exception as error:
                self._give_up_workers()
                if not (self._broken or overdue.is_set()):  # else it was told, or is told below
                    self._blame("close", error)
            finally:
                self._env = None
                atexit.unregister(self._kill_workers)
        if overdue.is_set():
            raise EnvironmentContractError(
                f"a process of {self._name} was still busy {CLOSING:g} s after it was to end, and was ended; mend the "
                f"environment's step() or close(), and look at it alone with {self._checker}"
            )

    @contextmanager
    def _deadline(self) -> Iterator[threading.Event]:
        """End processes that the block still waits for after `CLOSING` seconds; the event says whether that was so."""
        overdue = threading.Event()

        def end() -> None:
            overdue.set()
            self._kill_workers()

        timer = threading.Timer(CLOSING, end)
        timer.daemon = True
        timer.start()
        try:
            yield overdue
        finally:
            timer.cancel()

    def _final(self, final_obs: Array, done: NDArray[np.bool_]) -> Observation:
        """gymnasium's object array of single observations as groups (N, dim); rows without an end are zero."""
        ended = list(final_obs[done])
        stacked = (
            {key: np.stack([one[key] for one in ended]) for key in ended[0]}
            if isinstance(ended[0], dict)
            else np.stack(ended)
        )
        groups: Observation = {}
        for group, rows in self._layout(stacked).items():
            groups[group] = np.zeros((self.num_envs, rows.shape[1]), np.float32)
            groups[group][done] = rows
        return groups

    def _blame(self, call: str, error: Exception) -> NoReturn:
        """Raise EnvironmentContractError in place of what the environment raised or gymnasium refused."""
        self._broken = True
        self._actions = None
        place = raised_at(error)
        if self._workers and isinstance(error, (EOFError, ConnectionError)):
            self._give_up_workers()
            happened = f"a process of {self._name} died in {call}()"
        elif place:
            happened = f"{self._name} raised {in_words(error)} in {call}() at {place}"
        else:
            happened = (
                f"what {self._name} returned from {call}() was refused with {in_words(error)}; expected observations "
                f"in {self._space}"
            )
        raise EnvironmentContractError(
            f"{happened}; mend the environment, and look at it alone with {self._checker}"
        ) from error

    def _give_up_workers(self) -> None:
        """End the processes, if there are any, without their help; gymnasium need not try."""
        self._kill_workers()
        self._env.closed = True

    def _open(self) -> _Vector:
        if self._env is None:
            raise EnvironmentContractError(
                "the environments are closed; expected an open GymnasiumEnv: build a new one"
            )
        return self._env


@contextmanager
def _stop_signals_held_back() -> Iterator[None]:
    """Start worker processes that hear no SIGINT, SIGTERM or SIGHUP, which a terminal or a scheduler sends to all.

    Only the trainer answers them, with the workers' help: it finishes the step and saves. Workers inherit the mask; a
    signal that reaches the trainer meanwhile is answered as soon as the workers stand.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _kill(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


def _async_vector_env() -> type:
    """gymnasium's ``AsyncVectorEnv``, but a worker's traceback goes with the exception instead of to stderr.

    Where not all workers come to life, the others end at once: at exit they would be waited for, deaf as they are.
    """
    from gymnasium.vector import AsyncVectorEnv
    from gymnasium.vector.async_vector_env import AsyncState

    base: Any = AsyncVectorEnv

    class QuietAsyncVectorEnv(base):  # type: ignore[misc]
        def __init__(self, *arguments: object, **options: object) -> None:
            try:
                super().__init__(*arguments, **options)
            except BaseException:
                _kill([worker for worker in getattr(self, "processes", []) if worker.pid is not None])
                self.closed = True
                raise

        def _raise_if_errors(self, successes: Iterable[bool]) -> None:
            error: BaseException | None = None
            for _ in range(sum(not success for success in successes)):
                index, kind, value, trace = self.error_queue.get()
                self.parent_pipes[index].close()
                self.parent_pipes[index] = None
                error = value if isinstance(value, kind) else kind(value)
                error.add_note(trace)
            if error is not None:
                self._state = AsyncState.DEFAULT
                raise error

    return QuietAsyncVectorEnv


def raised_at(error: BaseException) -> str:
    """``file:line`` where an environment raised ``error``; empty if no code but gymnasium's and ours took part."""
    frames = _FRAME.findall("".join(traceback.format_exception(error)))
    own = [(file, line) for file, line in frames if not _NOT_THE_ENVIRONMENT.search(file)]
    return ":".join(own[-1]) if own else ""


def in_words(error: BaseException) -> str:
    """``ValueError: what it said``, on one line."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def make_env(env_id: str, kwargs: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """One environment, without the warnings that a user of an older version would see for every copy.

    Raises:
        ConfigurationError: unknown id or option, or a package is missing.
        EnvironmentContractError: its constructor raised something else.
    """
    import gymnasium

    try:
        with _without_deprecations(gymnasium.registry.get(env_id)):
            # gymnasium's passive checker costs a call per step; `rlplastic.envs.checker` checks more, once
            return gymnasium.make(env_id, disable_env_checker=True, **kwargs)
    except gymnasium.error.UnregisteredEnv as error:
        raise ConfigurationError(f"gymnasium has no {env_id!r}; {_near_ids(env_id)}") from error
    except (ImportError, gymnasium.error.Error) as error:  # a missing package, or a version that gymnasium dropped
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigurationError(f"{env_id} cannot be made ({reason}); install what it needs or use another") from error
    except Exception as error:
        if isinstance(error, TypeError) and kwargs:
            raise ConfigurationError(f"{env_id} refuses the options {kwargs}: {in_words(error)}") from error
        place = raised_at(error)
        raise EnvironmentContractError(
            f"{env_id} raised {in_words(error)} while it was made" + (f", at {place}" if place else "") + "; mend it"
        ) from error


@contextmanager
def _without_deprecations(spec: gymnasium.envs.registration.EnvSpec | None) -> Iterator[None]:
    """Silence what older environments and their models cause: whoever asks for HalfCheetah-v4 wants it.

    MuJoCo would write its warnings to stderr and to MUJOCO_LOG.TXT in the working directory, for every copy.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is out of date", DeprecationWarning)
        if "mujoco" not in sys.modules and "mujoco" not in str(spec and spec.entry_point):
            yield
            return
        import mujoco

        previous = mujoco.get_mju_user_warning()
        mujoco.set_mju_user_warning(_pass_on)
        try:
            yield
        finally:
            mujoco.set_mju_user_warning(previous)


def _pass_on(warning: str) -> None:
    if "deprecated" not in warning:
        print(f"WARNING: {warning}", file=sys.stderr)


def _near_ids(env_id: str) -> str:
    """A hint; for ``module:Id-v0`` among what that module's package registered."""
    from gymnasium import registry

    module, _, name = env_id.rpartition(":")
    package = module.partition(".")[0]
    own = []
    for known, spec in registry.items():
        entry = spec.entry_point
        home = entry if isinstance(entry, str) else getattr(entry, "__module__", "")
        if re.split("[.:]", home)[0] == package:
            own.append(known)
    return nearest(name, own, prefix=f"{module}:") if module and own else nearest(name, registry)


def _time_limit(env: gymnasium.Env[Any, Any]) -> int | None:
    """Steps after which the environment truncates: its registration's, or that of a TimeLimit wrapper."""
    if env.spec is not None and env.spec.max_episode_steps is not None:
        return int(env.spec.max_episode_steps)
    from gymnasium.wrappers import TimeLimit

    while hasattr(env, "env"):
        if isinstance(env, TimeLimit):
            return int(env._max_episode_steps)
        env = env.env
    return None


def _one_of(key: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ConfigurationError(f"{key}={value} is unknown; {nearest(value, valid)}")
