"""What the README shows runs as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rlplastic.composition import choices_of, compose

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs_in_about_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for _ in range(2):  # whoever runs it again finds the run finished
        exec(compile(block, "README.md", "exec"), names)
    assert names["reward"].shape == (2,)  # type: ignore[attr-defined]
    assert len([line for line in block.splitlines() if line.strip()]) <= 12


def test_every_training_command_composes() -> None:
    commands = re.findall(r"rlplastic\.train (.*)", README) + re.findall(r'ARGS="([^"]*)"', README)
    assert len(commands) >= 4
    for command in commands:
        words = [word for word in shlex.split(command, comments=True) if word != "-m"]
        compose([re.sub(r",.*", "", word) for word in words])


def test_files_that_the_readme_links_exist() -> None:
    root = Path(__file__).parents[1]
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (root / target).exists(), target


def test_short_names_in_the_readme_are_choices() -> None:
    named = set(re.findall(r"env=([a-z0-9_]+)", README)) | {"humanoid", "g1", "go1", "humanoid_run", "dog_run"}
    assert named <= set(choices_of("env"))
