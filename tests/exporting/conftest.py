"""An export of each of two tasks, staged once: Pendulum has an action scale, Hopper a model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from exports import HOPPER, PENDULUM, original_of, run_of, staged

from rlplastic.exporting.verification import Original


@pytest.fixture(scope="session")
def pendulum(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return original_of(run_of(tmp_path_factory.mktemp("runs") / "pendulum", PENDULUM))


@pytest.fixture(scope="session")
def hopper(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return original_of(run_of(tmp_path_factory.mktemp("runs") / "hopper", HOPPER))


@pytest.fixture(scope="session")
def _pendulum_files(pendulum: Original, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return staged(tmp_path_factory.mktemp("staged") / "pendulum", pendulum)


@pytest.fixture(scope="session")
def _hopper_files(hopper: Original, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return staged(tmp_path_factory.mktemp("staged") / "hopper", hopper)


@pytest.fixture
def pendulum_files(_pendulum_files: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(_pendulum_files, tmp_path / "pendulum"))


@pytest.fixture
def hopper_files(_hopper_files: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_hopper_files, tmp_path / "hopper"))
