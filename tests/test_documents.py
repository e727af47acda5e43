"""Every code block of README.md and docs/ runs, or at least would be accepted; what is not run is listed with why."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import yaml
from documents import PAGES, ROOT, Block, Command, blocks, commands, made_cheap, run
from exports import PENDULUM, original_of, run_of, staged
from hydra.core.override_parser.overrides_parser import OverridesParser

from rlplastic.command_line import parse
from rlplastic.composition import choices_of, compose, in_hydra_grammar
from rlplastic.deploy import document
from rlplastic.envs import checker

ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
ENVIRONMENT["OMP_NUM_THREADS"] = "1"

PROGRAM = re.compile(r"(?:[A-Z]+=\S+ )*(?:\S+/)?(?:make|python|torchrun|tensorboard) ")
"""How a block of commands begins."""

NOT_COMMANDS = {
    "runs/<name>/checkpoints/": "paths",
    "t(S, W) =": "a formula",
    "noise     z_0": "formulas",
}
"""Indented blocks that show something else, by how they begin."""

COMPILED_ONLY = {"gpu_simulators.md": "needs simulators that need a GPU"}
"""Pages whose indented blocks may be Python that nothing here can run; it has to compile."""

NOT_RUN = {
    "make install": "takes minutes, and the gate does it",
    "make test": "this is it",
    "make train  ": "ten minutes of Humanoid",
    "pip install": "needs the network",
    "tensorboard": "a server, which does not end",
    "torchrun": "tests/test_torchrun.py does it",
    "wandb": "needs a package that the gate does not install",
    "env.task=my_module:make": "needs a simulator of the reader's own",
    "'runs=runs/pendulum_*'": "of a sweep that needs a launcher",
    "python benchmarks/": "experiments, which take hours",
    "hydra/": "needs launchers and sweepers that the gate does not install",
    "test_ahead_of_time": "a test of its own",
    "test_gpu_runs": "needs a GPU",
    "test_graphs": "the gate runs it",
    "what=": "tests/benchmarking runs every subject",
    "state=model": "tests/test_diagnose.py does it with a network of its own",
    "mjcf=": "needs the model of a robot; tests/playing does it",
    "robustness=true": "a sweep of 28 settings; tests/test_play.py does it",
}
"""Commands that are only checked, by a part of their line, with the reason."""

TRAINING = ("own_environment.md", "own_intervention.md", "reading_the_monitor.md")
"""Pages whose Python trains, which takes more than a few seconds; so does the README's, which is always run."""

TAKEN_FOR_GRANTED = {"report.md": ("runs/hopper", "runs/walker2d")}
"""Runs that the commands of a page take for granted without naming them in full."""

PREAMBLES: dict[str, Callable[[Path, dict[str, object]], None]] = {}
"""What the reader of a page is assumed to have: files in the working directory, names in Python."""


def prepare(page: str) -> Callable[[Callable[[Path, dict[str, object]], None]], None]:
    def kept(preamble: Callable[[Path, dict[str, object]], None]) -> None:
        PREAMBLES[page] = preamble

    return kept


@prepare("deploy.md")
def an_export(folder: Path, _names: dict[str, object]) -> None:
    for file in staged(folder / "export", original_of(run_of(folder / "run", PENDULUM))).iterdir():
        file.rename(folder / file.name)


@prepare("plasticity.md")
def networks_of_others(_folder: Path, names: dict[str, object]) -> None:
    import torch
    from patient_networks import agent_of, mlp

    class Twins(torch.nn.Module):  # as Stable-Baselines3's, which the gate does not install
        def __init__(self) -> None:
            super().__init__()
            self.qf0, self.qf1 = mlp(0, inputs=5), mlp(1, inputs=5)

        def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
            both = torch.cat((observations, actions), 1)
            return self.qf0(both), self.qf1(both)

    net = mlp(0)
    names["model"] = type("Model", (), {"policy": type("Policy", (), {"critic": Twins()})})
    names |= {"observations": torch.randn(64, 3), "actions": torch.randn(64, 2), "agent": agent_of("flashsac")}
    names |= {"net": net, "inputs": torch.randn(256, 3), "make_net": lambda seed: mlp(seed)}
    names["optimizer"] = torch.optim.Adam(net.parameters(), 1e-3)


@prepare("flow_critic.md")
def a_flow_critic(_folder: Path, names: dict[str, object]) -> None:
    import torch
    from patient_networks import ACTIONS, DIMS, agent_of

    names["critic"] = agent_of("flashsac_flow").modules["critic"]
    names |= {"observation": torch.randn(16, DIMS["critic"]), "action": torch.randn(16, ACTIONS).tanh()}
    names["returns"] = torch.randn(16)


@prepare("reading_the_monitor.md")
def a_run_with_readings(folder: Path, _names: dict[str, object]) -> None:
    words = ["rlplastic.train", *made_cheap(["env=pendulum", "monitor=full", "name=treated"])]
    done = run([*words, "monitor.forward_every=10"], folder, ENVIRONMENT)
    assert done.returncode == 0, done.stderr


def shown(language: str) -> list[Block]:
    return [block for page in PAGES for block in blocks(page) if block.language == language]


def python_pages() -> list[object]:
    pages = sorted({block.page for block in shown("python")})
    return [pytest.param(page, marks=[pytest.mark.slow] if page in TRAINING else []) for page in pages]


@cache
def all_commands() -> list[Command]:
    lines = [block for block in shown("") if PROGRAM.match(block.text)]
    return [command for block in lines for command in commands(block, ENVIRONMENT)]


def why_not(command: Command) -> str | None:
    return next((reason for part, reason in NOT_RUN.items() if part in command.line), None)


@pytest.mark.parametrize("page", python_pages())
def test_python_of_a_page_runs_in_its_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    PREAMBLES.get(page, lambda _folder, _names: None)(tmp_path, names)
    for block in [block for block in blocks(page) if block.language == "python"]:
        exec(compile("\n" * block.line + block.text, page, "exec"), names)
    if page == "deploy.md":
        assert names["command"].fault is None and names["command"].command.shape == (1,)  # type: ignore[attr-defined]


def test_every_block_is_one_that_something_here_runs_or_reads() -> None:
    assert {block.language for page in PAGES for block in blocks(page)} <= {"", "python", "yaml", "cpp"}
    assert len(shown("cpp")) == 1  # the C++ of deploy.md: ONNX Runtime's headers come with no package of ours
    for block in shown("yaml"):
        yaml.safe_load(block.text)
    for block in shown(""):
        if not PROGRAM.match(block.text) and not block.text.startswith(tuple(NOT_COMMANDS)):
            assert block.page in COMPILED_ONLY, f"{block.page}, line {block.line}, is no command: expected ```python"
            compile(block.text, block.page, "exec")


@pytest.mark.parametrize("command", all_commands(), ids=lambda command: f"{command.page}: {command.line[:60]}")
def test_command_of_a_page_is_accepted(command: Command) -> None:
    program, arguments = Path(command.words[0]).name, command.arguments
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{command.words[1]}:.*##", makefile, re.MULTILINE)
        for word in command.words[2:]:
            assert re.search(rf"^{word.partition('=')[0]} \?=", makefile, re.MULTILINE)
            if word.startswith("ARGS="):
                composed(word.removeprefix("ARGS=").split())
    elif command.module is None or command.module == "pytest":
        scripts = [word.partition("::")[0] for word in command.words if word.endswith(".py")]
        assert scripts or program == "tensorboard"
        assert [script for script in scripts if not (ROOT / script).is_file()] == []
    elif command.module == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert command.words[-1].strip(".[]") in project["optional-dependencies"]
    elif command.module == "rlplastic.train":
        composed(arguments)
    elif command.module == "rlplastic.envs.checker":
        checker._configuration(arguments)
    else:
        verb = command.module.removeprefix("rlplastic.")
        of_env = [word for word in arguments if word.startswith(("env=", "env."))] if verb == "play" else []
        compose(of_env)
        words = [word for word in arguments if word not in of_env]
        parse(words, importlib.import_module(command.module).Arguments, verb)


def composed(words: list[str]) -> None:
    """Compose a training's configuration; with `-m` that of a sweep's first run."""
    sweep = "-m" in words
    plain = []
    for word in [word for word in words if word != "-m" and not word.startswith("hydra")]:
        (override,) = OverridesParser.create().parse_overrides(in_hydra_grammar([word]))
        if sweep and override.is_sweep_override():
            first = next(iter(override.sweep_string_iterator())) if override.is_discrete_sweep() else "1"
            word = f"{override.key_or_group}={first}"
        plain.append(word)
    compose(plain)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({command.page for command in all_commands() if not why_not(command)}))
def test_commands_of_a_page_run_in_their_order(page: str, tmp_path: Path) -> None:
    """Trainings in seconds, with the page's own settings; runs that it takes for granted are trained first."""
    policy = ""
    for module in [block for block in shown("python") if block.text.startswith("# my_module.py")]:
        (tmp_path / "my_module.py").write_text(module.text)
    variables = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    take_for_granted([f"run={path}" for path in TAKEN_FOR_GRANTED.get(page, ())], tmp_path, variables)
    for command in [command for command in all_commands() if command.page == page and not why_not(command)]:
        words = list(command.arguments)
        if command.words[0] == "make":
            words = command.words[2].removeprefix("ARGS=").split()
        policy = next((word for word in words if word.startswith("policy=runs")), policy)
        words = [policy if word == "policy=…" else word for word in words]
        module = command.module or "rlplastic.train"
        take_for_granted(words, tmp_path, variables)
        asked = made_cheap(words) if module == "rlplastic.train" else [*words, *cheap_episodes(module)]
        done = run([module, *asked], tmp_path, variables)
        assert done.returncode == 0, f"{command.line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def cheap_episodes(module: str) -> list[str]:
    few = {"evaluate": ["episodes=2"], "export": ["episodes=2"], "play": ["episodes=2"], "diagnose": ["probe_steps=5"]}
    return few.get(module.removeprefix("rlplastic."), [])


def take_for_granted(words: list[str], folder: Path, variables: dict[str, str]) -> None:
    """Train the runs, named after their task, and export the policies that a command speaks of."""
    for word in words:
        if found := re.match(
            r"(?:run|policy|init_from|runs)=(runs/(\w+?)(?:_flashsac\w*)?)(/export/policy.onnx)?$", word
        ):
            path, env, exported = found.groups()
            if not (folder / path).exists():
                make = ["rlplastic.train", *made_cheap([f"env={env}", f"name={path.removeprefix('runs/')}"])]
                assert run(make, folder, variables).returncode == 0
            if exported and not (folder / path / "export").exists():
                assert run(["rlplastic.export", f"run={path}", "episodes=2"], folder, variables).returncode == 0


def test_every_exception_is_of_a_command_or_block_that_is_there() -> None:
    lines = [command.line for command in all_commands()]
    assert [part for part in NOT_RUN if not any(part in line for line in lines)] == []
    texts = [block.text for block in shown("")]
    assert [part for part in NOT_COMMANDS if not any(text.startswith(part) for text in texts)] == []


def test_links_between_pages_lead_somewhere() -> None:
    lost = [
        f"{page}: {target}"
        for page, text in PAGES.items()
        for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text)
        if not ((ROOT if page == "README.md" else ROOT / "docs") / target).exists()
    ]
    assert lost == []


def test_short_names_in_the_readme_are_choices() -> None:
    named = set(re.findall(r"env=([a-z0-9_]+)", PAGES["README.md"])) | {"humanoid", "g1", "go1", "humanoid_run"}
    assert named <= set(choices_of("env"))


def test_the_example_of_the_readme_is_about_ten_lines() -> None:
    (block,) = [block for block in blocks("README.md") if block.language == "python"]
    assert len([line for line in block.text.splitlines() if line.strip()]) <= 12


@pytest.mark.parametrize(
    "part", [document.Document, document.Observation, document.Action, document.Joint, document.Timing]
)
def test_every_key_of_the_document_is_on_the_page(part: type) -> None:
    page = PAGES["deploy.md"]
    missing = [field.name for field in dataclasses.fields(part) if not re.search(rf"`[^`]*\b{field.name}\b", page)]
    assert missing == [] or (part is document.Joint and missing == ["name"])
