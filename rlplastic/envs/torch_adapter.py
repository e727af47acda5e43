"""The contract of `rlplastic.envs.base` over simulators that compute in torch, on a GPU or a CPU.

A task is a factory, ``module:function``. It is called as ``make(num_envs=…, device=…, seed=…, **env.kwargs)`` and
returns a `Simulator`: gymnasium's vector environment under SAME_STEP autoreset, but of tensors. docs/gpu_simulators.md
has an example and recipes for others' simulators.

What is a vector per environment never leaves the device: observations, final observations and actions are tensors from
the simulator to the replay. What is a number per environment does, since the host decides by it: rewards and ends, and
whether all numbers are finite, which is looked at on the device. These make one block of five float32 per environment
and step. It is queued right behind the simulation, so that waiting for it does not wait for updates that were queued
later. Observations are copied once, on the device: a simulator may overwrite its tensors in its next step.

Everything is queued on torch's current stream; a simulator with streams of its own has to join it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlplastic import seeding
from rlplastic.envs.base import ActionMap, AutoresetMode, Observation, Step, check_actions, on_host
from rlplastic.envs.gymnasium_adapter import in_words, raised_at
from rlplastic.envs.observations import action_box, layout_of
from rlplastic.errors import ConfigurationError, EnvironmentContractError, RlplasticError, nearest
from rlplastic.kernels.replay_insert import upload


class Simulator(Protocol):
    """What a factory returns.

    Three more attributes are read where they are there: ``max_episode_steps``, the time limit (none otherwise);
    ``step_dt``, the seconds of a step, for playing in real time; and ``deterministic``, whether equal seeds and equal
    actions give equal bits (no otherwise), without which a resumed run starts fresh episodes.
    """

    num_envs: int
    device: torch.device | str
    single_observation_space: Any
    """Of one environment, gymnasium's: a Box, or a Dict of Boxes of which ``critic`` is for the critic alone."""
    single_action_space: Any
    """Of one environment: a bounded one-dimensional Box."""

    def reset(self) -> tuple[Any, dict[str, Any]]:
        """Start an episode everywhere; the observation, (N, ...) or a mapping of terms (N, ...), and anything else."""
        ...

    def step(self, actions: Tensor) -> tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Observation, reward (N,), terminated and truncated (N,) bool, and a dictionary, for actions in the Box.

        Where an episode ended the observation is already the next one's first; ``final_obs`` in the dictionary is like
        an observation and has the last one in these rows.
        """
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class _Flight(NamedTuple):
    """A step that was sent: what the host needs is on its way."""

    observation: dict[str, Tensor]
    final: dict[str, Tensor] | None
    info: dict[str, Any]
    numbers: Tensor
    """(5, N) float32 on the host, or soon: reward, terminated, truncated, finite, largest action."""


class TorchEnv:
    """A `VectorEnv` of tensors, or of arrays, over a simulator in torch.

    Args:
        make: the factory.
        seeds: one construction seed per environment; the factory gets one that depends on all of them.
        device: where it simulates.
        kwargs: options of the factory.
        name: of the task, for messages.
        arrays: return numpy arrays, for those who know nothing else; tensors otherwise. It takes both.

    Attributes:
        simulator: what the factory returned; None once closed.
        terms: per observation group, the list of (term, slice of columns).

    Raises:
        ConfigurationError: there is no such device, or the factory refuses its options.
        EnvironmentContractError: what the factory returned is no `Simulator`, or it raised something; `reset` and
            `send` raise it for the same reason.
    """

    def __init__(
        self,
        make: Callable[..., Simulator],
        seeds: list[int],
        device: torch.device | str = "cpu",
        kwargs: Mapping[str, Any] | None = None,
        name: str = "custom",
        *,
        arrays: bool = False,
    ) -> None:
        self._name, self._arrays = name, arrays
        self.num_envs, self.device = len(seeds), _device(device)
        self.simulator: Simulator | None = None
        simulator = self._made(make, seeding.key("simulator", *seeds, bits=31), dict(kwargs or {}))
        self._study(simulator)
        self.simulator = simulator
        self.autoreset = AutoresetMode.SAME_STEP
        self.max_episode_steps: int | None = getattr(simulator, "max_episode_steps", None)
        self.deterministic = bool(getattr(simulator, "deterministic", False))
        self.description = f"torch {torch.__version__} {name}, {self.num_envs} environments on {self.device}"
        self._flight: _Flight | None = None
        self._actions: Tensor | None = None
        on_gpu = self.device.type == "cuda"
        self._landing = torch.empty(5, self.num_envs, pin_memory=True) if on_gpu else None
        self._landed: Any = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]

    def _made(self, make: Callable[..., Simulator], seed: int, kwargs: dict[str, Any]) -> Simulator:
        try:
            return make(num_envs=self.num_envs, device=self.device, seed=seed, **kwargs)
        except RlplasticError:
            raise
        except Exception as error:
            if isinstance(error, TypeError) and kwargs:
                raise ConfigurationError(f"{self._name} refuses the options {kwargs}: {in_words(error)}") from error
            self._blame("its factory", error)

    def _study(self, simulator: Simulator) -> None:
        """Read the spaces, and refuse what is not as it was asked for."""
        names = (*Simulator.__annotations__, "reset", "step", "close")
        if missing := [name for name in names if not hasattr(simulator, name)]:
            raise EnvironmentContractError(
                f"what {self._name} made, a {type(simulator).__name__}, has no {', '.join(missing)}; expected every "
                "attribute of rlplastic.envs.torch_adapter.Simulator"
            )
        if simulator.num_envs != self.num_envs or not self._is_here(torch.empty(0, device=simulator.device)):
            raise EnvironmentContractError(
                f"{self._name} made {simulator.num_envs} environments on {simulator.device}; expected the "
                f"{self.num_envs} on {self.device} that it was asked for"
            )
        space, box = simulator.single_observation_space, simulator.single_action_space
        self._layout = layout_of(space, self._name)
        boxes = dict(space.spaces) if hasattr(space, "spaces") else {"observation": space}
        self._shapes = {name: (self.num_envs, *one.shape) for name, one in boxes.items()}
        self._map = ActionMap(*action_box(box, self._name))
        self._low, self._high = (torch.from_numpy(bound).to(self.device) for bound in (self._map.low, self._map.high))
        self._action_dtype: torch.dtype = getattr(torch, np.dtype(box.dtype).name)
        self.terms, self.observation_dims = self._layout.terms, self._layout.dims
        self.action_low, self.action_high = self._map.low, self._map.high
        self.action_dim = len(self.action_low)

    @torch.no_grad()
    def reset(self) -> Observation[Any]:
        """Start an episode in every environment; a step in flight is dropped."""
        simulator, self._flight = self._open(), None
        try:
            observation, _ = simulator.reset()
        except Exception as error:
            self._blame("reset()", error)
        return self._out(self._groups("the observation of reset()", observation))

    @torch.no_grad()
    def send(self, actions: NDArray[np.float32] | Tensor) -> None:
        """Queue a step; see `VectorEnv.send`. The values of tensors are looked at on the device, for `receive`."""
        simulator = self._open()
        if self._flight is not None:
            raise EnvironmentContractError("a step is already in flight; expected receive() before the next send()")
        if isinstance(actions, Tensor):
            self._check_tensor(actions)
        else:
            check_actions(actions, self.num_envs, self.action_dim)
        self._actions = upload(actions, self.device)
        try:
            observation, reward, terminated, truncated, info = simulator.step(self._scaled(self._actions))
            last = info.get("final_obs")
        except Exception as error:
            self._blame("step()", error)
        self._expect("the reward", reward, (self.num_envs,), "floating-point")
        self._expect("terminated", terminated, (self.num_envs,), "bool")
        self._expect("truncated", truncated, (self.num_envs,), "bool")
        groups = self._groups("the observation", observation)
        finite = torch.isfinite(reward) & _finite(groups)
        final = None
        if last is not None:
            final = self._groups("final_obs", last)
            finite &= _finite(final) | ~(terminated | truncated)
        numbers = [reward, terminated, truncated, finite, self._actions.abs().amax(1)]
        block = self._to_host(torch.stack([row.to(torch.float32) for row in numbers]))
        self._flight = _Flight(groups, final, info, block)

    def receive(self) -> Step[Any]:
        """Wait for the step that ``send`` started, but for nothing that was queued after it.

        Raises:
            EnvironmentContractError: an action was beyond [-1, 1], or an episode ended without ``final_obs``.
            NonFiniteError: an action was not finite.
        """
        if self._flight is None:
            raise EnvironmentContractError("no step is in flight; expected send(actions) before receive()")
        flight, self._flight = self._flight, None
        if self._landed is not None:
            self._landed.synchronize()
        numbers = flight.numbers.numpy().copy()
        reward, (terminated, truncated, finite) = numbers[0], numbers[1:4] != 0
        if not (numbers[4] <= 1).all():
            assert self._actions is not None
            check_actions(self._actions.cpu().numpy(), self.num_envs, self.action_dim)
        info = dict(flight.info) if self._arrays else {**flight.info, "finite": finite}
        if (terminated | truncated).any():
            if flight.final is None:
                raise EnvironmentContractError(
                    f"an episode of {self._name} ended but info has no 'final_obs'; expected there, for all "
                    "environments, the observations from before the reset: without them no value of a truncated "
                    "episode's last state can be learned"
                )
            info["final_observation"] = self._out(flight.final)
        return Step(self._out(flight.observation), reward, terminated, truncated, info)

    def close(self) -> None:
        """Close the simulator; calling it twice is harmless."""
        simulator, self.simulator, self._flight = self.simulator, None, None
        if simulator is not None:
            try:
                simulator.close()
            except Exception as error:
                self._blame("close()", error)

    def _scaled(self, actions: Tensor) -> Tensor:
        """`ActionMap` on the device."""
        scaled = (self._low + self._high) / 2 + (self._high - self._low) / 2 * actions.double()
        return scaled.clamp(self._low, self._high).to(self._action_dtype)

    def _groups(self, what: str, observation: Any) -> dict[str, Tensor]:  # noqa: ANN401 - whatever it returned
        """Fresh float32 groups (N, dim)."""
        terms = observation if isinstance(observation, Mapping) else {"observation": observation}
        for name, shape in self._shapes.items():
            self._expect(f"{what}, {name!r}," if name != "observation" else what, terms.get(name), shape)
        flat = {name: terms[name].reshape(self.num_envs, -1).to(torch.float32) for name in self._shapes}
        return {group: torch.cat([flat[name] for name, _ in parts], 1) for group, parts in self.terms.items()}

    def _expect(self, what: str, found: object, shape: tuple[int, ...], kind: str = "floating-point") -> None:
        told = f"a {type(found).__name__}"
        if isinstance(found, Tensor):
            right = found.dtype == torch.bool if kind == "bool" else found.is_floating_point()
            if right and found.shape == shape and self._is_here(found):
                return
            told = f"{found.dtype} {tuple(found.shape)} on {found.device}"
        raise EnvironmentContractError(
            f"{self._name}: {what} is {told}; expected a {kind} tensor {shape} on {self.device}, so mend the simulator"
        )

    def _check_tensor(self, actions: Tensor) -> None:
        """All of an action but its values."""
        shape = (self.num_envs, self.action_dim)
        if actions.shape != shape or actions.dtype != torch.float32 or not self._is_here(actions):
            raise EnvironmentContractError(
                f"actions are {actions.dtype} {tuple(actions.shape)} on {actions.device}; expected a float32 tensor "
                f"{shape} on {self.device} with values in [-1, 1]"
            )

    def _is_here(self, tensor: Tensor) -> bool:
        there, here = tensor.device, self.device
        return there.type == here.type and here.index in (None, there.index)

    def _to_host(self, block: Tensor) -> Tensor:
        if self._landing is None or self._landed is None:
            return block
        self._landing.copy_(block, non_blocking=True)
        self._landed.record(torch.cuda.current_stream(self.device))
        return self._landing

    def _out(self, groups: dict[str, Tensor]) -> Observation[Any]:
        return on_host(groups) if self._arrays else groups

    def _blame(self, call: str, error: Exception) -> NoReturn:
        """Raise EnvironmentContractError in place of what the simulator raised."""
        place = raised_at(error)
        raise EnvironmentContractError(
            f"{self._name} raised {in_words(error)} in {call}" + (f" at {place}" if place else "") + "; mend it"
        ) from error

    def _open(self) -> Simulator:
        if self.simulator is None:
            raise EnvironmentContractError("the environments are closed; expected an open TorchEnv: build a new one")
        return self.simulator


def find_factory(task: str) -> Callable[..., Simulator]:
    """The function that ``module:function`` names.

    Raises:
        ConfigurationError: there is no such module or function.
        EnvironmentContractError: the module raised something.
    """
    module, _, name = task.partition(":")
    if not module or not name:
        raise ConfigurationError(
            f"env.task={task} names no factory; expected module:function, such as examples.torch_pendulum:make"
        )
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigurationError(
            f"the module of env.task={task} cannot be imported ({in_words(error)}); expected it in the working "
            "directory or on PYTHONPATH, and what it needs installed"
        ) from error
    except Exception as error:
        place = raised_at(error)
        raise EnvironmentContractError(
            f"the module of env.task={task} raised {in_words(error)}" + (f" at {place}" if place else "") + "; mend it"
        ) from error
    make = getattr(found, name, None)
    if not callable(make):
        functions = [other for other, value in vars(found).items() if callable(value) and not other.startswith("_")]
        raise ConfigurationError(f"the module {module} has no function {name!r}; {nearest(name, functions)}")
    factory: Callable[..., Simulator] = make
    return factory


def _device(device: torch.device | str) -> torch.device:
    try:
        parsed = torch.device(device)
        torch.empty(0, device=parsed)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigurationError(
            f"env.device={device} is not there ({in_words(error)}); expected cpu, or cuda where torch finds a GPU"
        ) from error
    return parsed


def _finite(groups: Mapping[str, Tensor]) -> Tensor:
    """(N,) bool: whether all numbers of a row are."""
    return torch.stack([torch.isfinite(rows).all(1) for rows in groups.values()]).all(0)
