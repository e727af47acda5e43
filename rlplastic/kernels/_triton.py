"""Triton, where it is installed, and otherwise enough of its name for kernel files to be imported.

Kernel files take ``triton`` and ``tl`` from here, decorate with ``@triton.jit`` and annotate with ``tl.constexpr`` as
usual; only launching a kernel needs ``AVAILABLE``. Triton decides when a kernel is decorated whether it is compiled for
the GPU or run by the interpreter on the CPU (``TRITON_INTERPRET=1``, for tests), so that variable has to be set before
the first kernel file is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["AVAILABLE", "interpreted", "tl", "triton"]


class _Missing:
    """Stands in for both modules: decorators give back the function they decorate, other names give a stand-in."""

    def __getattr__(self, name: str) -> _Missing:
        if name.startswith("__"):  # inspect and copy ask for these
            raise AttributeError(name)
        return self

    def __call__(self, *args: object, **options: object) -> object:
        return args[0] if args else self


if TYPE_CHECKING:
    import triton
    import triton.language as tl

    AVAILABLE: bool
else:
    try:
        import triton
        import triton.language as tl

        AVAILABLE = True
    except ImportError:
        triton = tl = _Missing()
        AVAILABLE = False

_INTERPRETED = AVAILABLE and bool(triton.knobs.runtime.interpret)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, and so on CPU tensors."""
    return _INTERPRETED
