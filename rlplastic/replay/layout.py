"""How one row of the replay lies in memory: observations and action packed side by side, so that a batch is one gather.

Every part of a row starts at a multiple of 16 bytes and so does every row, which lets a GPU move it in 128-bit words.
The observation groups follow one another in the storage dtype, the action in float32 comes last. A batch is a block of
float32 rows with the same parts at the same element offsets: what a kernel copies is one contiguous run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlplastic.errors import ConfigurationError, nearest

OBSERVATION_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
"""int8: see `rlplastic.replay.quantiser`."""
ALIGNMENT = 16
"""Bytes; the widest load of a GPU."""


@dataclass(frozen=True)
class RowLayout:
    """Offsets of the parts of a row.

    Args:
        observation_dims: width of each observation group.
        action_dim: width of the action.
        observation_dtype: a name in `OBSERVATION_DTYPES`.

    Raises:
        ConfigurationError: the dtype is unknown.
    """

    observation_dims: Mapping[str, int]
    action_dim: int
    observation_dtype: str
    dtype: torch.dtype = field(init=False)
    groups: dict[str, slice] = field(init=False)
    """Elements of each observation group, in a stored row and in a batch row alike."""
    observation_size: int = field(init=False)
    """Elements of all groups with their padding."""
    action_size: int = field(init=False)
    """Elements of the action with its padding."""
    row_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Lay the parts out one after the other."""
        if self.observation_dtype not in OBSERVATION_DTYPES:
            raise ConfigurationError(
                f"replay.observation_dtype is {self.observation_dtype!r}; "
                f"{nearest(self.observation_dtype, OBSERVATION_DTYPES)}"
            )
        dtype, groups, at = OBSERVATION_DTYPES[self.observation_dtype], {}, 0
        for group, dim in self.observation_dims.items():
            groups[group] = slice(at, at + dim)
            at += _padded(dim, ALIGNMENT // dtype.itemsize)
        action_size = _padded(self.action_dim, ALIGNMENT // 4)
        for name, value in {
            "dtype": dtype,
            "groups": groups,
            "observation_size": at,
            "action_size": action_size,
            "row_bytes": at * dtype.itemsize + 4 * action_size,
        }.items():
            object.__setattr__(self, name, value)

    @property
    def batch_width(self) -> int:
        """float32 elements of a batch row: observations, then the action."""
        return self.observation_size + self.action_size

    def stored(self, storage: Tensor) -> tuple[Tensor, Tensor]:
        """Views of ``storage`` (R, row_bytes) uint8: observations (R, observation_size), actions (R, action_size)."""
        observations = storage.view(self.dtype)[:, : self.observation_size]
        actions = storage.view(torch.float32)[:, -self.action_size :]
        return observations, actions


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
