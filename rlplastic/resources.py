"""What this process used and will use of the machine: time since it began, and memory."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

LIBRARIES = 75_000_000
"""What learning brings along, measured: scratch space of oneDNN, TensorBoard, an evaluation's environments."""
FIRST_ENVIRONMENT = 60_000_000
"""What the first environment may bring along once, a simulator's libraries above all."""
COMPILER = 50_000_000
"""What compiling brings along, measured."""


def process_age() -> float:
    """Seconds since this process began, interpreter start and imports included; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, ValueError, IndexError):
        return 0.0


def resident_bytes() -> int:
    """Memory that this process holds now; its peak where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return peak_bytes()


def peak_bytes() -> int:
    """The most memory that this process has held."""
    try:
        # And not getrusage, whose figure begins with what the parent held when it started this process.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
