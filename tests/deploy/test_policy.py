"""A policy from its file alone: what it refuses, and that it runs where only numpy and onnxruntime can be imported."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import onnx
import pytest
from exports import PENDULUM, original_of, run_of, staged

from rlplastic.deploy import OnnxPolicy, check_golden
from rlplastic.errors import ConfigurationError, NonFiniteError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys, time
started = time.process_time()  # whatever else the machine does
import rlplastic.deploy, onnxruntime
imported = time.process_time() - started
from rlplastic.deploy import OnnxPolicy, check_golden
policy = OnnxPolicy.load(sys.argv[1])
error, rows = check_golden(policy, sys.argv[2])
print(json.dumps([imported, error, rows, sorted(name for name in sys.modules if "." not in name)]))
"""
BLOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("numpy", "onnxruntime", "rlplastic"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    return staged(folder / "export", original_of(run_of(folder / "run", PENDULUM)))


def test_actions_are_those_of_the_golden_file(files: Path) -> None:
    policy = OnnxPolicy.load(files / "policy.onnx")
    golden = np.load(files / "golden.npz")
    np.testing.assert_allclose(policy.act(golden["obs"]), golden["actions"], atol=2e-5)
    assert check_golden(policy, files / "golden.npz")[0] < 1e-5
    assert (policy.observation_dim, policy.action_dim) == (3, 1)
    assert policy.document.to_json() == (files / "policy.json").read_text()


def test_golden_numbers_of_another_policy_are_far_away(files: Path, tmp_path: Path) -> None:
    golden = dict(np.load(files / "golden.npz"))
    np.savez(tmp_path / "golden.npz", **(golden | {"actions": golden["actions"] + np.float32(0.01)}))
    error, _ = check_golden(OnnxPolicy.load(files / "policy.onnx"), tmp_path / "golden.npz")
    assert error == pytest.approx(0.01 / 2, rel=1e-2)  # in parts of half the Box


def test_observations_of_another_width_or_not_finite_are_refused(files: Path) -> None:
    policy = OnnxPolicy.load(files / "policy.onnx")
    with pytest.raises(ConfigurationError, match=r"shape \(1, 4\); expected \(N, 3\)"):
        policy.act(np.zeros((1, 4), np.float32))
    with pytest.raises(NonFiniteError, match=r"observation of rows \[1\] is not finite"):
        policy.act(np.array([[0, 0, 0], [0, np.nan, 0]], np.float32))


def test_what_is_no_policy_is_refused_in_one_sentence(files: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not exist; expected a policy"):
        OnnxPolicy.load(tmp_path / "policy.onnx")
    model = onnx.load(files / "policy.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(ConfigurationError, match="is an ONNX model but no policy of rlplastic"):
        OnnxPolicy.load(tmp_path / "bare.onnx")
    for missing in ("nothing.npz", "bare.onnx"):
        with pytest.raises(ConfigurationError, match=r"expected the golden\.npz of an export"):
            check_golden(OnnxPolicy.load(files / "policy.onnx"), tmp_path / missing)


def outcome(python: str, script: str, files: Path) -> list[object]:
    command = [python, "-c", script, str(files / "policy.onnx"), str(files / "golden.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found: list[object] = json.loads(done.stdout)
    return found


def test_the_runtime_needs_numpy_and_onnxruntime_only_and_is_there_at_once(files: Path) -> None:
    found = [outcome(sys.executable, BLOCK + SCRIPT, files) for _ in range(3)]
    error, rows, modules = found[0][1:]
    assert float(str(error)) < 1e-5 and rows == 64
    assert "torch" not in modules and "mujoco" not in modules  # type: ignore[operator]
    assert min(float(str(one[0])) for one in found) < 0.3


@pytest.mark.slow
def test_the_runtime_works_in_an_environment_that_has_nothing_else(files: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "numpy", "onnxruntime"], check=True)
    error, rows, modules = outcome(python, SCRIPT, files)[1:]
    assert float(str(error)) < 1e-5 and rows == 64 and "torch" not in modules  # type: ignore[operator]
