"""Triton is optional: without it every kernel file imports, and says that nothing can be launched."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rlplastic.kernels._triton import interpreted
from rlplastic.kernels.norm_bounds import project_norms_kernel

WITHOUT_TRITON = """
import importlib, pkgutil, sys
sys.modules["triton"] = None  # makes `import triton` fail
import rlplastic.kernels
names = [name for _, name, _ in pkgutil.iter_modules(rlplastic.kernels.__path__)]
modules = [importlib.import_module(f"rlplastic.kernels.{name}") for name in names]
from rlplastic.kernels import _triton
from rlplastic.kernels.norm_bounds import project_norms_kernel
assert not _triton.AVAILABLE and not _triton.interpreted()
assert project_norms_kernel.__name__ == "project_norms_kernel"
print(*names)
"""


def test_every_kernel_file_imports_without_triton() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert {"categorical", "norm_bounds"} < set(result.stdout.split())


def test_the_environment_decides_whether_kernels_are_interpreted() -> None:
    pytest.importorskip("triton")
    code = """
from rlplastic.kernels import _triton, norm_bounds
print(_triton.AVAILABLE, _triton.interpreted(), type(norm_bounds.project_norms_kernel).__name__)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert output.stdout.split() == ["True", "False", "JITFunction"]
    here = os.environ["TRITON_INTERPRET"] == "1"
    assert interpreted() is here
    assert type(project_norms_kernel).__name__ == ("InterpretedFunction" if here else "JITFunction")
