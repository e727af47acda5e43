"""What the compiler makes of each kernel for GPUs that need not be here: no spills, and 128-bit accesses where due.

``pytest tests/kernels/test_ahead_of_time.py -s`` prints registers and shared memory, the numbers of docs/kernels.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ARCHITECTURES = ("80", "90", "100")
"""Compute capabilities: A100, H100 and H200, B200."""
MAX_SHARED_BYTES = 48 * 1024
"""What a program gets without asking for more."""
QUADS = ("ld.global.v4.b32", "st.global.v4.b32")
"""Accesses of four 32-bit numbers at once."""

Request = dict[str, Any]


def pointers(names: str) -> dict[str, str]:
    return {f"{name}_ptr": "*fp32" for name in names.split()}


def categorical_target(members: int, atoms: int, block: int) -> Request:
    inputs = ["logits_ptr", "member_stride", "reward_ptr", "discount_ptr", "bonus_ptr", "target_ptr", "mean_ptr"]
    return {
        "module": "rlplastic.kernels.categorical",
        "kernel": "categorical_target_kernel",
        "types": pointers("logits reward discount bonus atoms target mean")
        | {"member_stride": "i32", "row_stride": "i32", "support": "fp32", "scale": "fp32"},
        "constants": {"MEMBERS": members, "ATOMS": atoms, "BLOCK": block},
        "aligned": inputs,
        "options": {"num_warps": 1, "enable_fp_fusion": False},
    }


def project_norms(longest_row: int) -> Request:
    return {
        "module": "rlplastic.kernels.norm_bounds",
        "kernel": "project_norms_kernel",
        "types": {"table_ptr": "*i64"},
        "constants": {"SHORTEST": 1e-12, "EPS": 1e-8, "BLOCK": longest_row},
        "options": {"num_warps": min(max(longest_row // 256, 1), 8)},
        "ptx": QUADS,
    }


KERNELS: dict[str, Request] = {
    "categorical target, 2 members, 101 atoms": categorical_target(2, 101, 128),
    "norm bounds, rows up to 1024": project_norms(1024),
}
"""A request as in aot.py, and under ``ptx`` what its PTX must contain."""
SLOW_KERNELS: dict[str, Request] = {
    "categorical target, 1 member, 51 atoms": categorical_target(1, 51, 64),
    "categorical target, 3 members, 251 atoms": categorical_target(3, 251, 256),
    "norm bounds, rows up to 256": project_norms(256),
    "norm bounds, rows up to 4096": project_norms(4096),
}
CASES = [*KERNELS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_KERNELS)]

Needs = dict[str, Any]


class Compiler:
    """Runs aot.py, which Triton's own cache makes cheap from the second time on."""

    def __init__(self, cache: Path) -> None:
        self.environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
        self.tables: dict[tuple[str, ...], list[dict[str, Needs]]] = {}

    def __call__(self, requests: list[Request], *architectures: str) -> list[dict[str, Needs]]:
        command = [sys.executable, str(Path(__file__).with_name("aot.py")), *architectures]
        run = subprocess.run(
            command, input=json.dumps(requests), capture_output=True, text=True, check=False, env=self.environment
        )
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    def of(self, name: str) -> dict[str, Needs]:
        """One kernel of the tables on every architecture; its whole table is compiled in one go."""
        table = KERNELS if name in KERNELS else SLOW_KERNELS
        names = tuple(table)
        if names not in self.tables:
            self.tables[names] = self(list(table.values()), *ARCHITECTURES)
        return self.tables[names][names.index(name)]


@pytest.fixture(scope="module")
def compiler(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Compiler:
    pytest.importorskip("triton.backends.nvidia")
    cache = pytestconfig.cache
    return Compiler(cache.mkdir("triton") if cache is not None else tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CASES)
def test_kernel_spills_nothing_and_moves_memory_as_wide_as_it_should(
    name: str, architecture: str, compiler: Compiler, record_property: Callable[[str, object], None]
) -> None:
    needs = dict(compiler.of(name)[architecture])
    ptx = needs.pop("ptx")
    print(f"\n{name}, sm_{architecture}: {needs}")
    for key, value in needs.items():
        record_property(key, value)
    assert needs["stack_bytes"] == needs["local_loads"] == needs["local_stores"] == 0
    assert needs["shared_bytes"] <= MAX_SHARED_BYTES
    for expected in (KERNELS | SLOW_KERNELS)[name].get("ptx", ()):
        assert expected in ptx


def test_spills_would_be_seen(compiler: Compiler) -> None:
    starved = project_norms(4096) | {"options": {"num_warps": 1, "maxnreg": 32}}
    ((needs,),) = (result.values() for result in compiler([starved], "90"))
    assert needs["stack_bytes"] > 0 and needs["local_loads"] > 0 and needs["local_stores"] > 0
