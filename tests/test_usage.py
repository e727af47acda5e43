from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module

import pytest

from rlplastic import train
from rlplastic.composition import GROUPS, choices_of, compose
from rlplastic.config import VARIANTS, Config
from rlplastic.envs import checker
from rlplastic.train_help import SETTINGS, train_help
from rlplastic.usage import COLUMNS, explained, verb_help

VERBS = ("evaluate", "export", "play", "report", "diagnose", "bench")


def fits_a_screen(text: str) -> bool:
    lines = text.rstrip("\n").splitlines()
    return len(lines) <= 40 and max(map(len, lines)) <= COLUMNS


def test_help_of_train_fits_a_screen_and_says_how_to_see_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    train.main(["env=hopper", "--help"])
    shown = capsys.readouterr().out
    assert shown == train_help() + "\n" and fits_a_screen(shown) and shown.count("\n") >= 24
    last = shown.rstrip("\n").splitlines()[-1]
    assert "--help all" in last and "--cfg job" in last


def test_everything_that_help_of_train_lists_composes() -> None:
    shown = train_help()
    words = set(re.findall(r"[\w.]+", shown.replace("*", "")))
    assert words >= {choice for group in GROUPS for choice in choices_of(group)}
    starred = {name for name in re.findall(r"(\w+)\*", shown)}
    config = compose([f"{group}={choice}" for group in GROUPS for choice in choices_of(group) if choice in starred])
    assert config == compose([])
    defaults = dict(re.findall(r"^  ([\w.]+)=(\S+)", shown, re.MULTILINE))
    assert tuple(defaults) == SETTINGS
    assert compose([f"{key}={value}" for key, value in defaults.items() if value != "open"]) == config
    assert all(value_of(config, key) is None for key, value in defaults.items() if value == "open")
    example = next(line for line in shown.splitlines() if line.endswith("env_steps=100000"))
    assert compose(example.split()[3:]).env_steps == 100_000


def value_of(config: object, key: str) -> object:
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_fits_a_screen_and_explains_every_key(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = import_module(f"rlplastic.{verb}")
    with pytest.raises(SystemExit) as left:
        module.main(["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and fits_a_screen(shown)
    listed = re.findall(r"^  \[?([\w.]+)=\S+\s+\S", shown, re.MULTILINE)
    assert set(listed) >= {entry.name for entry in fields(module.Arguments)} - {"perturb"}


def test_help_of_the_checker_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    checker.main(["--help"])
    shown = capsys.readouterr().out
    assert fits_a_screen(shown) and "python -m rlplastic.envs.checker task=" in shown


@dataclass
class Inner:
    rate: float = 0.5
    """Of it,
    per second."""


@dataclass
class Example:
    """Does it. All of it.

    Well.
    """

    what: str = "???"
    """What."""
    bare: int | None = None
    several: list[str] = field(default_factory=lambda: ["a", "b"])
    """Some."""
    inner: Inner = field(default_factory=Inner)


def test_a_key_is_shown_with_its_default_and_the_docstring_of_its_field() -> None:
    assert verb_help(Example, "do").splitlines() == [
        "usage: python -m rlplastic.do what=… [key=value …]",
        "Does it. All of it. Well.",
        "",
        "  what=…            What.",
        "  [bare=…]",
        "  [several=[a,b]]   Some.",
        "  [inner.rate=0.5]  Of it, per second.",
    ]


def test_every_setting_of_a_training_is_explained() -> None:
    sections = [value for value in vars(Config()).values() if is_dataclass(value)]
    for section in (Config(), *sections, *(schema() for variants in VARIANTS.values() for schema in variants.values())):
        told = {name for base in type(section).__mro__[:-1] for name in explained(base)}
        settings = {name for name, value in vars(section).items() if not is_dataclass(value)}
        assert settings - told <= {"name", "kind"}, section
