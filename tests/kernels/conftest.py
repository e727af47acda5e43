"""Where kernels run in this process."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def kernel_device() -> str:
    """The device whose tensors kernels take: a GPU's, or with the interpreter the CPU's."""
    import torch

    from rlplastic.kernels._triton import AVAILABLE, interpreted

    if not AVAILABLE:
        pytest.skip("needs triton")
    if interpreted():
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device")
    return "cuda"
