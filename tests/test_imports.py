"""What imports bring along, and what they cost: a robot has no torch, and a mistyped command should not wait for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import json, sys, time
{before}
start = time.process_time()
{statement}
seconds = time.process_time() - start
found = ((name.split(".")[0], str(getattr(module, "__file__", ""))) for name, module in sys.modules.items())
packages = {{name for name, file in found if "site-packages" in file and name != "rlplastic"}}
print(json.dumps([seconds, sorted(packages)]))
"""
COMMAND_LINE = {"omegaconf", "yaml", "antlr4", "attr", "attrs"}
"""What reading `key=value` arguments takes."""


def imported(statement: str, before: str = "") -> tuple[float, set[str]]:
    """Processor time of a statement in a new process, and the installed packages that are loaded after it."""
    program = PROGRAM.format(statement=statement, before=before)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True)
    seconds, packages = json.loads(done.stdout)
    # What an editable installation or coverage load at every start of Python is not of our doing.
    return seconds, {name for name in packages if not name.startswith(("_", "coverage", "distutils"))}


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import rlplastic", set()),
        ("import rlplastic.train", set()),
        ("import rlplastic.deploy", {"numpy"}),
        ("import rlplastic.play", {"numpy", "typing_extensions", *COMMAND_LINE}),
        ("import rlplastic.evaluate, rlplastic.export, rlplastic.report, rlplastic.bench", COMMAND_LINE),
        ("import rlplastic.diagnose", COMMAND_LINE),
        ("from rlplastic.train_help import train_help; train_help()", {"numpy", "typing_extensions", *COMMAND_LINE}),
    ],
)
def test_an_import_brings_along_no_more_than_it_uses(statement: str, allowed: set[str]) -> None:
    _, packages = imported(statement)
    assert packages <= allowed


@pytest.mark.slow
def test_training_imports_nothing_that_this_run_may_not_use() -> None:
    _, packages = imported("from rlplastic import train_agent", before="import torch, triton")
    optional = {"hydra", "tensorboard", "matplotlib", "mujoco", "envpool", "gymnasium", "scipy", "onnx", "onnxruntime"}
    assert not packages & (optional | {"PIL", "imageio", "wandb", "mlflow", "dm_control"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "before", "most"),
    [
        ("import rlplastic", "", 0.1),
        ("import rlplastic.deploy", "", 0.3),
        ("from rlplastic import train_agent", "import torch, triton", 1.5),
    ],
)
def test_an_import_is_quick(statement: str, before: str, most: float) -> None:
    assert min(imported(statement, before)[0] for _ in range(3)) < most
