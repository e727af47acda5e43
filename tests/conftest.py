"""What every test needs: one thread, no screen, interpreted kernels and no CUDA tests where there is no CUDA."""

from __future__ import annotations

import os

import pytest

# Before anything imports numpy or torch: workers of pytest-xdist already fill the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Before anything imports triton: without a GPU its kernels run in the interpreter, on CPU tensors.
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
