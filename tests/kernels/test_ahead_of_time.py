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

from rlplastic.envs.base import AutoresetMode
from rlplastic.kernels import replay_sample as kernel_of_sample
from rlplastic.kernels.replay_insert import StagedInsertion
from rlplastic.replay import ReplayRing, Sampler

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


G1 = {"policy": 103, "critic": 216}, 29
HUMANOID = {"policy": 348}, 17
"""Observation groups and action width."""


def replay(sizes: tuple[dict[str, int], int], dtype: str, num_envs: int) -> ReplayRing:
    return ReplayRing(10 * num_envs, num_envs, *sizes, AutoresetMode.NEXT_STEP, dtype)


def replay_sample(
    sizes: tuple[dict[str, int], int], dtype: str, n_step: int = 1, half_life: float | None = None, given: bool = False
) -> Request:
    """With the constants that a launch would have; only the number of slots is smaller here."""
    draw = Sampler(replay(sizes, dtype, 1024), 2048, n_step, 0.99, 0, half_life=half_life).buffers
    stored = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int8": "*i8"}[dtype]
    return {
        "module": "rlplastic.kernels.replay_sample",
        "kernel": "_sample",
        "types": {"observation": stored, "action": "*fp32", "reward": "*fp32", "flags": "*u8", "queue": "*i32"}
        | {"index": "*i64", "number": "*i64", "scale": "*fp32", "powers": "*fp32", "ages": "*i64", "given": "*i64"}
        | {"cell": "*fp32", "centre": "*fp32"}
        | {"block": "*fp32", "out_reward": "*fp32", "out_discount": "*fp32", "out_rows": "*i64", "key": "i64"},
        "constants": kernel_of_sample.constants(draw, given),
        "options": kernel_of_sample.options(draw),
        "ptx": QUADS,
    }


def replay_insert(sizes: tuple[dict[str, int], int], dtype: str) -> Request:
    staged = StagedInsertion(replay(sizes, dtype, 1024).tensors)
    stored = "*fp32" if dtype == "float32" else "*i16"
    return {
        "module": "rlplastic.kernels.replay_insert",
        "kernel": "_insert",
        "types": {"integers": "*i64", "observations": stored, "floats": "*fp32", "finals": stored}
        | {"observation": stored, "action": "*fp32", "reward": "*fp32", "flags": "*u8", "queue": "*i32"}
        | {"index": "*i64"},
        "constants": staged.constants(),
        "options": staged.options(),
        "ptx": QUADS,
    }


KERNELS: dict[str, Request] = {
    "replay sample, G1, float32": replay_sample(G1, "float32"),
    "replay sample, Humanoid, float32": replay_sample(HUMANOID, "float32"),
    "replay sample, Humanoid, bfloat16, 3 steps": replay_sample(HUMANOID, "bfloat16", 3),
    "replay insert, Humanoid, float32": replay_insert(HUMANOID, "float32"),
    "replay insert, G1, bfloat16": replay_insert(G1, "bfloat16"),
    "categorical target, 2 members, 101 atoms": categorical_target(2, 101, 128),
    "norm bounds, rows up to 1024": project_norms(1024),
}
"""A request as in aot.py, and under ``ptx`` what its PTX must contain."""
SLOW_KERNELS: dict[str, Request] = {
    "replay sample, Humanoid, by age": replay_sample(HUMANOID, "float32", half_life=1e5),
    "replay sample, Humanoid, rows given": replay_sample(HUMANOID, "float32", given=True),
    "replay sample, G1, float16, 5 steps": replay_sample(G1, "float16", 5),
    "replay sample, Humanoid, int8": replay_sample(HUMANOID, "int8"),
    "replay sample, 2,500 numbers": replay_sample(({"policy": 2500}, 6), "float32"),
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
