"""The policies under `examples/policies` are whole, mean what their documents say, and play."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from rlplastic import play
from rlplastic.deploy import OnnxPolicy
from rlplastic.deploy.document import METADATA_KEY

FOLDER = Path(__file__).parents[1] / "examples" / "policies"
POLICIES = sorted(path for path in FOLDER.iterdir() if path.is_dir())
MOST_BYTES = 500_000


def test_humanoid_and_go1_are_there() -> None:
    assert [path.name for path in POLICIES] == ["go1", "humanoid"]


@pytest.mark.parametrize("folder", POLICIES, ids=lambda path: path.name)
def test_a_shipped_policy_gives_its_golden_numbers(folder: Path) -> None:
    golden = np.load(folder / "golden.npz")
    session = onnxruntime.InferenceSession(folder / "policy.onnx", providers=["CPUExecutionProvider"])
    names = ["actions", "raw_actions"]
    found = dict(zip(names, session.run(names, {"obs": golden["obs"]}), strict=True))
    document = OnnxPolicy.load(folder / "policy.onnx").document
    half = np.array(document.action.box.scale)
    np.testing.assert_allclose(found["raw_actions"], golden["raw_actions"], atol=1e-5)
    np.testing.assert_allclose(found["actions"] / half, golden["actions"] / half, atol=1e-5)
    assert np.ptp(golden["raw_actions"]) > 0.5, "golden numbers that are all alike would prove nothing"


@pytest.mark.parametrize("folder", POLICIES, ids=lambda path: path.name)
def test_a_shipped_policy_carries_its_document_and_nothing_of_the_machine_it_came_from(folder: Path) -> None:
    written = (folder / "policy.json").read_text()
    metadata = {entry.key: entry.value for entry in onnx.load(folder / "policy.onnx").metadata_props}
    assert json.loads(metadata[METADATA_KEY]) == json.loads(written)
    files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    assert set(files) == {"golden.npz", "policy.json", "policy.onnx"} and sum(files.values()) < MOST_BYTES
    for text in (written, *metadata.values()):
        assert not re.search(r"(?<![\w.])/(?:work|root|home|tmp|farm|Users)/", text)


@pytest.mark.parametrize("folder", POLICIES, ids=lambda path: path.name)
def test_the_page_tells_the_numbers_of_the_document(folder: Path) -> None:
    provenance = json.loads((folder / "policy.json").read_text())["provenance"]
    (row,) = [line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith(f"| [{folder.name}]")]
    low, high = provenance["evaluation"]["ci95"]
    assert f"{provenance['training_steps']:,}" in row and provenance["environment"] in row
    assert f"{provenance['evaluation']['mean']:,.4g} [{low:,.4g}, {high:,.4g}]".replace(",", "") in row.replace(",", "")


@pytest.mark.parametrize("folder", POLICIES, ids=lambda path: path.name)
def test_a_shipped_policy_plays_its_task(folder: Path, tmp_path: Path) -> None:
    play.main([f"policy={folder / 'policy.onnx'}", "episodes=1", "env.kwargs.max_episode_steps=30", f"out={tmp_path}"])
    (file,) = tmp_path.glob("*.json")
    played = json.loads(file.read_text())
    assert played["lengths"] == [30], "it did not fall within the first steps"
    assert np.isfinite(played["returns"]).all() and not (folder / "play").exists()
