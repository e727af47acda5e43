"""A device's work must not be waited for: makes whatever would wait fail, on a CPU too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class NoSynchronisation(TorchDispatchMode):
    """Refuses the operators that make the host wait for a device, whatever Python method reaches them."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_to_cpu", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.waiting, f"aten::{name} waits for the device"
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        assert not any(index is not None and index.dtype == torch.bool for index in indices), "a mask as an index waits"
        return func(*args, **(kwargs or {}))


def no_synchronisation(monkeypatch: pytest.MonkeyPatch) -> NoSynchronisation:
    """A context in which tensors are not read either; the latter lasts until the test ends."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("this call makes the host wait for the device")

    names = ("item", "cpu", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__")
    for name in names:
        monkeypatch.setattr(torch.Tensor, name, refuse)
    return NoSynchronisation()
