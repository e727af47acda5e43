"""What `python -m rlplastic.train --help` says, on one screen: choices, tasks, and the settings that people change."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from rlplastic.composition import CONFIG_FOLDER, GROUPS, choices_of
from rlplastic.config import AgentConfig, Config, EnvConfig, ReplayConfig, TrackingConfig
from rlplastic.usage import aligned, explained, spelled

SETTINGS = (
    *("env_steps", "max_minutes", "seed", "name", "device", "replay_ratio"),
    *("env.num_envs", "agent.critic_width", "replay.capacity", "tracking.writers"),
)
"""The settings that are listed."""
_SECTIONS = {"": Config, "env": EnvConfig, "agent": AgentConfig, "replay": ReplayConfig, "tracking": TrackingConfig}


def train_help() -> str:
    """The whole screen."""
    chosen = _chosen()
    others = ("others", f"env=<family> env.task=<its name>; families are {' '.join(_families())}")
    groups = [(group, _starred(choices_of(group), chosen[group])) for group in GROUPS if group != "env"]
    return "\n".join(
        [
            "usage: python -m rlplastic.train [key=value …]",
            "Trains a run; the same command again resumes it. With -m, lists of values are a sweep:",
            "  python -m rlplastic.train env=hopper env_steps=100000",
            "  python -m rlplastic.train -m env=hopper,ant seed=0,1,2",
            "",
            "env=, a task by its short name:",
            *aligned([*((family, _starred(names, chosen["env"])) for family, names in _tasks().items()), others]),
            "",
            "Choices (* is the default):",
            *aligned(groups),
            "",
            "Settings that people change, and their defaults (open: chosen at the start, with the reason):",
            *aligned([(f"{key}={_default(key)}", _meaning(key)) for key in SETTINGS]),
            "",
            "--help all: every setting; --cfg job: those of a command; rlplastic/*config.py explain each.",
        ]
    )


def _starred(names: list[str], default: str) -> str:
    return " ".join(f"{name}*" if name == default else name for name in names)


def _chosen() -> dict[str, str]:
    """The choices of a run that names none."""
    entries = _read("config")["defaults"]
    return {group: choice for entry in entries if isinstance(entry, dict) for group, choice in entry.items()}


def _read(name: str) -> dict[str, Any]:
    content = OmegaConf.to_container(OmegaConf.load(CONFIG_FOLDER / f"{name}.yaml"), resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


@cache
def _environments() -> dict[str, dict[str, Any]]:
    return {name: _read(f"env/{name}") for name in choices_of("env")}


def _tasks() -> dict[str, list[str]]:
    """Short names by family."""
    grouped: dict[str, list[str]] = {}
    for name, settings in _environments().items():
        if settings["task"]:
            grouped.setdefault(settings["family"], []).append(name)
    return dict(sorted(grouped.items(), key=lambda entry: -len(entry[1])))


def _families() -> list[str]:
    return [name for name, settings in _environments().items() if not settings["task"]]


def _default(key: str) -> str:
    node: object = Config()
    for name in key.split("."):
        node = getattr(node, name)
    return "open" if node is None else spelled(node)


def _meaning(key: str) -> str:
    """The first sentence of a setting's own docstring, or the part before its first semicolon."""
    section, _, name = key.rpartition(".")
    return re.split(r"[.;](?:\s|$)", explained(_SECTIONS[section])[name])[0]
