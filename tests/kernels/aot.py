"""Compile Triton kernels for GPUs that are not here, and read from the machine code what they need.

A script of its own, because kernels are decorated either for the interpreter or for the compiler, and the tests'
process takes the interpreter. JSON goes in and out::

    echo '[{"module": "rlplastic.kernels.categorical", "kernel": "categorical_target_kernel", ...}]' \
        | python tests/kernels/aot.py 80 90 100

Each request names a ``module``, its ``kernel``, the ``types`` of its run-time arguments (``"*fp32"``, ``"i32"``,
``"fp32"``, ...), its ``constants`` (``tl.constexpr`` arguments, and arguments that are always 1), and optionally which
arguments are ``aligned`` to 16 (every pointer and no number unless listed: so are torch's allocations) and compile
``options`` such as ``num_warps``. The answer has, in the same order, one object per request, keyed by architecture.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(request: dict[str, Any], capability: int) -> Any:
    """The kernel of a request, compiled for one architecture."""
    kernel = getattr(import_module(request["module"]), request["kernel"])
    types, constants = request["types"], request["constants"]
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    missing = {name for name, kind in signature.items() if kind == "constexpr"} ^ set(constants)
    if missing:
        raise SystemExit(f"{request['kernel']}: give a type or a constant for each argument, check {sorted(missing)}")
    aligned = request.get("aligned", [name for name, kind in types.items() if kind.startswith("*")])
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=request.get("options", {}))


def needs(kernel: Any) -> dict[str, Any]:
    """Registers per thread, what was spilled to local memory, shared memory per program, and the PTX."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], check=True, capture_output=True, text=True).stdout
    number = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": number["REG"],
        "stack_bytes": number["STACK"] + number["LOCAL"],
        "local_loads": len(re.findall(r"\bLDL\b", code)),
        "local_stores": len(re.findall(r"\bSTL\b", code)),
        "shared_bytes": kernel.metadata.shared,
        "ptx": kernel.asm["ptx"],
    }


def main() -> None:
    requests, capabilities = json.load(sys.stdin), [int(text) for text in sys.argv[1:]]
    json.dump([{c: needs(compiled(request, c)) for c in capabilities} for request in requests], sys.stdout)


if __name__ == "__main__":
    main()
