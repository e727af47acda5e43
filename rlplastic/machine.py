"""The hardware that a run began on: probed once, saved as ``machine.json``, and asked for again on resume."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass, field
from typing import Any

import torch

from rlplastic.distributed import local_ranks
from rlplastic.errors import ConfigurationError


@dataclass
class Machine:
    """What was probed, once per run: saved as `machine.json`, reused on resume."""

    processor: str
    cores: int
    torch: str
    device: str
    device_name: str
    bf16_hardware: bool
    compiler: str | None
    device_gigabytes: float = 0.0
    """Memory of the GPU."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The values that `resolve` chose from the probe, by dotted key."""

    def differs_from(self, other: Machine) -> list[str]:
        """What would change the bits, as `name: then -> now`; empty when a resume is exact."""
        names = ("processor", "torch", "device_name", "bf16_hardware")
        return [
            f"{n}: {getattr(self, n)} -> {getattr(other, n)}" for n in names if getattr(self, n) != getattr(other, n)
        ]


def processor_name() -> str:
    """The CPU's model as the kernel names it, or the architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def probe_machine(device: str) -> Machine:
    """Look at the hardware.

    Raises:
        ConfigurationError: ``device`` is unknown or not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ConfigurationError(f"device={device!r} is unknown; expected auto, cpu, cuda or cuda:<index>") from error
    if parsed.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"device={device!r} is not supported; expected auto, cpu, cuda or cuda:<index>")
    if parsed.type == "cuda" and (not torch.cuda.is_available() or (parsed.index or 0) >= torch.cuda.device_count()):
        raise ConfigurationError(
            f"device={device!r} is not there (torch {torch.__version__} sees {torch.cuda.device_count()} of them); "
            "use device=cpu, or install a CUDA build of torch as the README says"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    cores = max(1, cores // local_ranks())
    if parsed.type == "cuda":
        with torch.cuda.device(parsed):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        name, gigabytes = (
            torch.cuda.get_device_name(parsed),
            torch.cuda.get_device_properties(parsed).total_memory / 1e9,
        )
    else:
        bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        device, name, gigabytes = "cpu", "cpu", 0.0
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    return Machine(processor_name(), cores, torch.__version__, device, name, bf16, compiler, gigabytes)


def machine_from(document: dict[str, Any]) -> Machine:
    """The inverse of ``asdict``.

    Raises:
        ConfigurationError: the document lacks a field.
    """
    try:
        return Machine(**document)
    except TypeError as error:
        raise ConfigurationError(
            f"machine.json of this run cannot be read ({error}); use fresh=true or another name"
        ) from None
