"""Hydra's composition of a training configuration, with one-sentence errors.

`compose` is what `python -m rlplastic.train` and the library share; sweeps (`-m`) go through Hydra's own launchers.
Choices are the files of `CONFIG_FOLDER` and of one other folder (`--config-dir`), whose agents may come from anywhere.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlplastic.command_line import first_line, flatten, override_key, reading_yaml, refused
from rlplastic.config import VARIANTS, Config, register
from rlplastic.envs.catalogue import require_task
from rlplastic.errors import ConfigurationError, nearest

CONFIG_FOLDER = Path(__file__).parent / "configs"
INTEGRAL = re.compile(r"\d+(\.\d+)?e\+?\d+", re.IGNORECASE)
"""`1e6`: what people type for a whole number of steps."""
PATH_KEYS = ("init_from", "runs", "name")
"""May hold a `=`."""
LIST_KEYS = ("init_what", "adaptive.signal")
"""Take names separated by commas, which Hydra would read as a sweep."""
FREE_KEYS = ("env.kwargs.",)
"""Mappings whose keys are not known beforehand, so that `+` may be left out."""


def compose(overrides: Sequence[str], config_dir: str | Path | None = None) -> Config:
    """The configuration of a run, typed, with open settings still open.

    Args:
        overrides: ``key=value`` strings.
        config_dir: a folder with more choices, such as ``agent/mine.yaml`` for ``agent=mine``.

    Raises:
        ConfigurationError: not `key=value`, an unknown key or choice, or a value of the wrong type.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    search(config_dir)
    register()
    refuse_unknown(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            elsewhere = [f"hydra.searchpath=['{folder}']" for folder in _searched[1:]]
            composed = hydra_compose("config", overrides=in_hydra_grammar(overrides) + elsewhere)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(explain(error, overrides)) from error
    return typed(composed)


_searched = [CONFIG_FOLDER]
"""Where choices are looked for, in this process."""


def search(config_dir: str | Path | None) -> None:
    """Look for choices in this folder too, and no longer in an earlier one; adopts the agents that it names.

    An agent of another package is ``agent/<name>.yaml`` with ``package: <module>`` (`rlplastic.agents.adopt`).

    Raises:
        ConfigurationError: no such folder, a file of it cannot be read, or a package is not there.
    """
    del _searched[1:]
    if config_dir is None:
        return
    folder = Path(config_dir).resolve()
    if not folder.is_dir():
        raise ConfigurationError(f"config_dir={config_dir} is no folder; expected one with files such as agent/*.yaml")
    _searched.append(folder)
    for file in sorted(folder.glob("agent/*.yaml")):
        with reading_yaml(file, "the settings of an agent"):
            package = OmegaConf.select(OmegaConf.load(file), "package")
        if package is not None:
            from rlplastic.agents import adopt  # and not for `play`, which must not load torch

            adopt(file.stem, package)


def typed(composed: DictConfig) -> Config:
    """A composed configuration as a `Config`.

    Raises:
        ConfigurationError: a required value is missing.
    """
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"the configuration is incomplete: {first_line(error)}") from error
    assert isinstance(config, Config)
    require_task(config.env.family, config.env.task)
    return config


def in_hydra_grammar(overrides: Sequence[str]) -> list[str]:
    """The overrides as Hydra wants them.

    `++` before keys of free mappings; quotes around lists that are one value, and around paths with a `=`, which the
    default names of runs have.
    """
    plain = []
    for override in overrides:
        name, _, value = override.partition("=")
        if override.startswith(FREE_KEYS):
            plain.append(f"++{override}")
        elif INTEGRAL.fullmatch(value) and float(value).is_integer():
            plain.append(f"{name}={int(float(value))}")
        elif name in LIST_KEYS and "," in value and value[:1] not in "'\"":
            plain.append(f"{name}='{value}'")
        elif name in PATH_KEYS and "=" in value and not set(value) & set("'\""):
            plain.append(f"{name}=" + ",".join(f"'{part}'" for part in value.split(",")))
        else:
            plain.append(override)
    return plain


def refuse_unknown(overrides: Sequence[str]) -> None:
    """Refuse what Hydra takes without a word: keys that no schema has behind a `+`, parts left out, odd choices.

    What is not `key=value` at all is refused here too: in a sweep Hydra has words of its own for it.

    Raises:
        ConfigurationError: naming the nearest known key, or the choices.
    """
    known = list(flatten(OmegaConf.to_container(OmegaConf.structured(Config)))) + list(GROUPS)
    for group, schemas in VARIANTS.items():
        known += [f"{group}.{key}" for schema in schemas.values() for key in names(schema)]
    for override in overrides:
        name = override_key(override)
        if override.startswith("~"):
            raise ConfigurationError(
                f"{override!r} would leave out a part that every run needs; expected key=value, which sets it"
            )
        if "=" not in override:
            raise ConfigurationError(f"{override!r} is not of the form key=value; for example env=hopper")
        if name not in known and not name.startswith((*FREE_KEYS, "hydra")) and not _is_section(name, known):
            raise ConfigurationError(f"unknown key {name!r}; {nearest(name, known)}")
        if name in GROUPS:
            _refuse_odd_choice(name, override.partition("=")[2])


def names(schema: type) -> list[str]:
    """The settings of a dataclass."""
    return [field.name for field in dataclasses.fields(schema)]


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """One sentence for what Hydra refused: the override, the reason, the nearest valid name."""
    text = str(error)
    malformed = getattr(error, "override", None)
    if malformed:
        return f"{malformed!r} cannot be read as an override ({first_line(error)}); expected key=value"
    missing = re.search(r"Could not find '([^']+)/([^'/]*)'", text)
    if missing:
        group, choice = missing.groups()
        if group in GROUPS:
            return _no_choice(group, choice)
        hint = nearest(choice, re.findall(r"^\t(\w+)$", text, re.MULTILINE))  # what is installed of Hydra's own plugins
        return f"{group}={choice} is not a choice of {group}; {hint}; for others pip install 'rlplastic[sweeps]'"
    elsewhere = _of_another_choice(f"{text}\n{error.__cause__}", overrides)
    if elsewhere:
        return elsewhere
    several = [o for o in overrides if "," in o.partition("=")[2]]
    if several and "Ambiguous value" in text:
        return f"{several[0]} lists several values; put -m before it to sweep over them, one run each"
    cause = error.__cause__ or error
    culprit = re.search(r"full_key: (\S+)", str(cause)) or re.search(r"full_key: (\S+)", text)
    given = [o for o in overrides if culprit and override_key(o) == culprit[1]] or _quoted(text, overrides)
    return refused(given[0] if given else "the configuration", cause)


def _of_another_choice(text: str, overrides: Sequence[str]) -> str | None:
    """The sentence for a setting that another choice of its group has, such as `agent.layer_norm` of agent=sac."""
    found = re.search(r"Key '(\w+)' not in '(\w+)'\s+full_key: (\w+)\.\w+", text)
    if not found or found[3] not in VARIANTS:
        return None
    key, name, group = found.groups()
    schemas = VARIANTS[group]
    here = next(choice for choice, schema in schemas.items() if schema.__name__ == name)
    owners = " or ".join(f"{group}={c}" for c, schema in schemas.items() if key in names(schema))
    given = [f"{o} is" for o in overrides if override_key(o) == f"{group}.{key}"]
    given += [f"{o} sets {group}.{key}, which is" for o in overrides if override_key(o) == "preset"]
    subject = given[0] if given else f"{group}.{key} is"
    return f"{subject} a setting of {owners}, but this run has {group}={here}; leave the one out or change the other"


def _refuse_odd_choice(group: str, value: str) -> None:
    """Choices that Hydra takes but nobody means: types without values, none, several laid over each other."""
    several = [value] if value.startswith("[") else value.split(",")  # the latter is a sweep
    for choice in several:
        if choice == "null" or choice.startswith("[") or choice.endswith("_schema"):
            raise ConfigurationError(_no_choice(group, choice))


def _no_choice(group: str, choice: str) -> str:
    return f"{group}={choice} is not a choice of {group}; {nearest(choice, choices_of(group), count=4)}"


def _is_section(name: str, known: Sequence[str]) -> bool:
    return any(key.startswith(f"{name}.") for key in known)


def _quoted(text: str, overrides: Sequence[str]) -> list[str]:
    return [override for override in overrides if override in text]


GROUPS = ("agent", "critic", "env", "monitor", "preset", "schedule")


def choices_of(group: str) -> list[str]:
    """The names that a configuration group accepts."""
    return sorted({path.stem for folder in _searched for path in (folder / group).glob("*.yaml")})


# for `--help` (configs/config.yaml): Hydra's own listing shows the schemas too
OmegaConf.register_new_resolver("choices_of", lambda group: ", ".join(choices_of(group)), replace=True)
