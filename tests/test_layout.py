"""The tree is what the design says: links, packaging, direction of imports, sizes."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlplastic"
LINKS = ("agents", "envs", "kernels", "configs")
MAX_LINES = 500
Archives = tuple[list[str], list[str]]
"""Names in the sdist and in the wheel built from it."""

LAYERS = (
    {"errors", "seeding", "config", "plasticity_config", "distributed", "command_line", "usage", "deploy"},
    {"kernels"},
    {"agents", "envs", "replay", "plasticity"},
    set(),  # the services around the loop: every module that is named nowhere else
    {"loop"},
    {
        "train",
        "evaluate",
        "export",
        "play",
        "report",
        "diagnose",
        "bench",
        "analysis",
        "exporting",
        "playing",
        "benchmarking",
        "training",
        "rlplastic",
    },
)
"""Lowest first; a module imports from its own layer and those below. `training` is what the verb `train` calls."""
SERVICES = 3


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if "runs" not in path.parts]


def imports(path: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, inside functions too; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(path.relative_to(ROOT).with_suffix("").parts)[: -node.level] if node.level else []
            parts = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def part(module: str) -> str:
    """`rlplastic.replay.ring` belongs to `replay`."""
    return module.split(".")[1] if "." in module else module


def layer(name: str) -> int:
    return next((number for number, names in enumerate(LAYERS) if name in names), SERVICES)


def repository_files() -> list[Path]:
    """Files that are tracked or would be; links are left out."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


@pytest.mark.parametrize("name", LINKS)
def test_root_name_is_a_relative_link_into_the_package(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert os.readlink(link) == f"rlplastic/{name}"
    assert link.resolve() == PACKAGE / name
    assert (PACKAGE / name).is_dir()


def test_nothing_imports_through_the_links() -> None:
    guilty = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources("rlplastic", "tests", "benchmarks", "examples")
        for name in imports(path)
        if name.split(".")[0] in LINKS
    ]
    assert not guilty


def test_imports_point_from_verbs_to_kernels() -> None:
    guilty = []
    for path in sources("rlplastic"):
        importer = part(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
        ours = [name for name in imports(path) if name.split(".")[0] == "rlplastic"]
        guilty += [f"{importer}: {path.name} imports {name}" for name in ours if layer(part(name)) > layer(importer)]
    assert not guilty


@pytest.mark.parametrize("package", ["plasticity", "deploy"])
def test_what_is_used_alone_knows_no_other_module_but_errors(package: str) -> None:
    guilty = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(f"rlplastic/{package}")
        for name in imports(path)
        if name.split(".")[0] == "rlplastic" and part(name) not in (package, "errors")
    ]
    assert not guilty


def test_no_source_file_is_longer_than_five_hundred_lines() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources("rlplastic", "tests", "benchmarks", "examples")
    }
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_every_folder_with_modules_is_a_package() -> None:
    assert [
        folder for folder in {path.parent for path in sources("rlplastic")} if not (folder / "__init__.py").exists()
    ] == []


def test_no_file_names_a_folder_of_somebodys_machine() -> None:
    pattern = re.compile(rb"(?<![A-Za-z0-9_.])/(?:" + b"|".join([b"work", b"root", b"farm", b"home"]) + rb")/\w")
    guilty = []
    for path in repository_files():
        content = path.read_bytes()
        if b"\0" not in content[:8192] and (match := pattern.search(content)):
            guilty.append(f"{path.relative_to(ROOT)}: {match.group().decode()}")
    assert not guilty


def test_no_installed_distribution_provides_a_name_of_the_root_links() -> None:
    provided = importlib.metadata.packages_distributions()
    assert {name: provided[name] for name in LINKS if name in provided} == {}


def test_no_dependency_imports_a_name_of_the_root_links() -> None:
    """In the repository's root, `python -m` would hand such a dependency our folders instead of what it looked for."""
    needles = [f"{verb} {name}".encode() for verb in ("import", "from") for name in LINKS]
    statement = re.compile(rb"^[ \t]*(?:import|from) (?:%s)\b(?!/)" % "|".join(LINKS).encode(), re.MULTILINE)
    guilty = []
    for path in sorted(dependency_files()):
        content = path.read_bytes()
        if any(needle in content for needle in needles) and (match := statement.search(content)):
            guilty.append(f"{path}: {match.group().decode()}")
    assert not guilty


def dependency_files() -> set[Path]:
    """Python files of the installed closure of what a wheel of ours requires."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    waiting = [re.split(r"[^\w.-]", requirement)[0] for requirement in project["dependencies"]]
    files: set[Path] = set()
    seen: set[str] = set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # required on another platform
        files |= {Path(str(file.locate())) for file in distribution.files or () if file.suffix == ".py"}
        waiting += [re.split(r"[^\w.-]", text)[0] for text in distribution.requires or () if "extra ==" not in text]
    return {path for path in files if path.is_file()}


@pytest.fixture(scope="module")
def wheel_from_sdist(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """Built without isolation, and so without network, from a copy of the tree."""
    folder = tmp_path_factory.mktemp("build")
    left_out = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "multirun", "outputs")
    shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=left_out)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder / "tree")]
    built = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    with tarfile.open(next((folder / "dist").glob("*.tar.gz"))) as archive:
        sdist = [name.partition("/")[2] for name in archive.getnames()]
    with zipfile.ZipFile(next((folder / "dist").glob("*.whl"))) as archive:
        return sdist, archive.namelist()


def test_wheel_contains_the_package_and_nothing_beside_it(wheel_from_sdist: Archives) -> None:
    _, wheel = wheel_from_sdist
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not re.fullmatch(r"rlplastic-[\w.]+\.dist-info", top)} == {"rlplastic"}


def test_wheel_contains_every_module_every_yaml_and_the_type_marker(
    wheel_from_sdist: Archives,
) -> None:
    _, wheel = wheel_from_sdist
    expected = {str(path.relative_to(ROOT)) for kind in ("*.py", "*.yaml") for path in PACKAGE.rglob(kind)}
    assert expected | {"rlplastic/py.typed"} == {name for name in wheel if name.startswith("rlplastic/")}
    assert any(name.endswith(".yaml") for name in expected)


def test_sdist_carries_no_root_link(wheel_from_sdist: Archives) -> None:
    sdist, _ = wheel_from_sdist
    assert {"pyproject.toml", "README.md", "LICENSE"} <= set(sdist)
    assert not {name.split("/")[0] for name in sdist} & set(LINKS)
