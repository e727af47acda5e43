"""The example of docs/deploy.md runs as it stands, and the page knows every key of the document and every check."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from exports import PENDULUM, original_of, run_of, staged

from rlplastic.deploy import document

PAGE = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text(encoding="utf-8")


def test_the_example_of_a_control_loop_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = staged(tmp_path / "export", original_of(run_of(tmp_path / "run", PENDULUM)))
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(compile(block, "deploy.md", "exec"), names)
    command = names["command"]
    assert command.fault is None and command.command.shape == (1,)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "part", [document.Document, document.Observation, document.Action, document.Joint, document.Timing]
)
def test_every_key_of_the_document_is_on_the_page(part: type) -> None:
    missing = [field.name for field in dataclasses.fields(part) if not re.search(rf"`[^`]*\b{field.name}\b", PAGE)]
    assert missing == [] or (part is document.Joint and missing == ["name"])
