"""From what a simulator returns to the contract's observation groups: flat float32 ``policy`` and ``critic``.

A simulator returns one array or a dictionary of named terms. All terms go to ``policy``, concatenated in the order in
which the task declares them, except what only the simulator knows: ``privileged_state`` (MuJoCo Playground's name for
it) or ``critic`` (that of simulators in torch), which becomes ``critic``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlplastic.envs.base import Array, Observation
from rlplastic.errors import EnvironmentContractError

PRIVILEGED = ("privileged_state", "critic")


class ObservationLayout:
    """Which columns of which group every term occupies.

    Args:
        terms: (name, shape of one environment's value) in the order of concatenation; a scalar has width 1.

    Attributes:
        terms: per group, the list of (name, slice of columns).
        dims: width of every group, ``policy`` first.

    Raises:
        EnvironmentContractError: no term is left for ``policy``, or a term is empty.
    """

    def __init__(self, terms: Sequence[tuple[str, Sequence[int]]]) -> None:
        self.terms: dict[str, list[tuple[str, slice]]] = {"policy": []}
        self.dims: dict[str, int] = {"policy": 0}
        for name, shape in terms:
            group = "critic" if name in PRIVILEGED else "policy"
            start, width = self.dims.get(group, 0), int(np.prod(shape))
            if width == 0:
                raise EnvironmentContractError(
                    f"the observation term {name!r} has shape {tuple(shape)}; expected one number or more: leave it out"
                )
            self.terms.setdefault(group, []).append((name, slice(start, start + width)))
            self.dims[group] = start + width
        if self.dims["policy"] == 0:
            raise EnvironmentContractError(
                "the observation has only what is for the critic; expected at least one term that the policy may see"
            )

    def __call__(self, observation: Array | Mapping[str, Array]) -> Observation:
        """Fresh float32 groups (N, dim) from one array (N, ...) or a mapping of arrays (N, ...).

        Exactly one cast per number; nothing of the simulator's memory is kept.
        """
        if isinstance(observation, np.ndarray):
            return {"policy": observation.reshape(len(observation), -1).astype(np.float32)}
        groups: Observation = {}
        for group, terms in self.terms.items():
            rows = len(observation[terms[0][0]])
            flat: NDArray[np.float32] = np.empty((rows, self.dims[group]), np.float32)
            for name, columns in terms:
                flat[:, columns] = observation[name].reshape(rows, -1)
            groups[group] = flat
        return groups


def layout_of(space: object, task: str, keep: Sequence[str] | None = None, max_ndim: int = 2) -> ObservationLayout:
    """The layout of a gymnasium observation space: a Box, or a Dict of Boxes.

    Args:
        space: the space of one environment.
        task: named in errors.
        keep: the terms of a Dict to use, in this order; None: all, in the order of the space.
        max_ndim: most axes that a term may have.

    Raises:
        EnvironmentContractError: anything else, integer pixels included.
    """
    from gymnasium import spaces

    boxes: dict[str, Any] = dict(space.spaces) if isinstance(space, spaces.Dict) else {"observation": space}
    for name, box in boxes.items():
        floating = isinstance(box, spaces.Box) and np.issubdtype(box.dtype, np.floating)
        if not floating or len(box.shape) > max_ndim:
            raise EnvironmentContractError(
                f"{task}: the observation {name!r} is {box}; expected a floating-point Box with at most {max_ndim} "
                "axis or a Dict of such Boxes: wrap the environment so that it returns flat float vectors"
            )
    return ObservationLayout([(name, boxes[name].shape) for name in (keep if keep is not None else boxes)])


def action_box(space: object, task: str) -> tuple[Array, Array]:
    """Bounds (action_dim,) of a continuous, one-dimensional action Box.

    Raises:
        EnvironmentContractError: any other action space.
    """
    from gymnasium import spaces

    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating) or len(space.shape) != 1:
        raise EnvironmentContractError(
            f"{task}: the action space is {space}; expected a one-dimensional Box of floating-point numbers: "
            "choose a task with continuous control"
        )
    return space.low, space.high
