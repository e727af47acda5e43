"""What a replay costs in memory, and what is there: asked before anything is allocated."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from rlplastic.errors import ConfigurationError
from rlplastic.replay.layout import RowLayout
from rlplastic.replay.priority import SumTree

USABLE = 0.9
"""The share of the available memory that replay may take; the learner needs the rest."""


def slots_for(capacity: int, num_envs: int) -> int:
    """T: enough for ``capacity`` transitions, and one slot for the head."""
    return -(-capacity // num_envs) + 1


def bytes_per_transition(layout: RowLayout, queues: int = 1) -> int:
    """Bytes of one row: observations and action as packed, reward, one byte of flags, four in every queue."""
    return layout.row_bytes + 4 + 1 + 4 * queues


def memory_bytes(capacity: int, num_envs: int, layout: RowLayout, queues: int = 1, prioritised: bool = False) -> int:
    """Bytes of all tensors that a ring of these sizes puts on its device."""
    rows = slots_for(capacity, num_envs) * num_envs
    tree = SumTree.memory_bytes(rows) if prioritised else 0
    return rows * bytes_per_transition(layout, queues) + _fixed_bytes(num_envs, layout, queues) + tree


def _fixed_bytes(num_envs: int, layout: RowLayout, queues: int) -> int:
    """The index, and the cells of 8-bit observations."""
    return 16 * num_envs * queues + (8 * layout.observation_size if layout.dtype == torch.int8 else 0)


def check_memory(
    capacity: int,
    num_envs: int,
    layout: RowLayout,
    queues: int = 1,
    prioritised: bool = False,
    device: torch.device | str = "cpu",
) -> int:
    """`memory_bytes`, after checking that it is at most nine tenths of what is available on ``device``.

    Raises:
        ConfigurationError: it does not fit; the message names the largest capacity that does.
    """
    sizes = {"capacity": capacity, "num_envs": num_envs, "action_dim": layout.action_dim, **layout.observation_dims}
    for name, size in sizes.items():
        if size < 1:
            raise ConfigurationError(f"the replay's {name} is {size}; expected at least 1, so set a larger one")
    if slots_for(capacity, num_envs) * num_envs >= 2**31:
        raise ConfigurationError(
            f"a replay of {capacity:,} transitions is beyond what the index counts; set replay.capacity below 2**31"
        )
    needed = memory_bytes(capacity, num_envs, layout, queues, prioritised)
    available = available_memory(torch.device(device))
    usable = int(USABLE * available)
    if needed > usable:
        # A tree takes at most 16 bytes for each row, and 4.
        row = (bytes_per_transition(layout, queues) + 16 * prioritised) * num_envs
        largest = max(0, (usable - _fixed_bytes(num_envs, layout, queues) - 4 * prioritised) // row - 1) * num_envs
        raise ConfigurationError(
            f"a replay of {capacity:,} transitions needs {needed / 1e9:.2f} GB but {device} has "
            f"{available / 1e9:.2f} GB available, of which a tenth is left to the learner; set replay.capacity to "
            f"at most {largest} or store observations as float16 or int8"
        )
    return needed


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on ``device``: free GPU memory, or the kernel's estimate for the host.

    A container's limit counts where it is lower. Where the kernel gives no estimate, the physical memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, _container_memory())
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_memory() -> int:
    """What a control group (v2) leaves to this process; practically unlimited without one."""
    group = Path("/sys/fs/cgroup")
    try:
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return 2**62
