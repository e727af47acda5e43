"""`python -m rlplastic.train agent=flashsac env=humanoid`: train, or resume, one run; `-m` sweeps over several.

`--config-dir=folder` adds choices of one's own, such as `folder/agent/mine.yaml` for `agent=mine`.
"""

from __future__ import annotations

import io
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import redirect_stderr

from rlplastic.command_line import leave, run_verb
from rlplastic.errors import ConfigurationError, Interrupted


def main(arguments: Sequence[str]) -> None:
    """Train as the arguments say; see `rlplastic.training.train_agent` for the errors."""
    config_dir = None
    if any(argument.startswith("-") for argument in arguments):
        given = _parsed(arguments)
        if given.help and "all" not in given.overrides:
            from rlplastic.composition import search
            from rlplastic.train_help import train_help

            search(given.config_dir)
            print(train_help())
            return
        if given.help:  # every setting: Hydra's own
            arguments = [argument for argument in arguments if argument != "all"]
            given.overrides.remove("all")
        if any(vars(given)[name] for name in HYDRAS_OWN):
            _through_hydra(arguments, given)
            return
        arguments, config_dir = given.overrides, given.config_dir
    from rlplastic.resources import process_age
    from rlplastic.training import train_agent

    train_agent(arguments, config_dir=config_dir, spent=process_age())


HYDRAS_OWN = ("multirun", "cfg", "help", "hydra_help", "info")


def _through_hydra(arguments: Sequence[str], given: Namespace) -> None:
    """Sweeps, help and printing the configuration are Hydra's own; every job of a sweep is an ordinary run."""
    # Hydra would print a foreseen error in its own way and leave with its own exit code.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from rlplastic.composition import CONFIG_FOLDER, explain, in_hydra_grammar, refuse_unknown, search
    from rlplastic.config import register
    from rlplastic.training import train_agent

    search(given.config_dir)
    register()
    # Hydra's parser does not take overrides on both sides of its flags.
    plain = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    flags = [argument for argument in arguments if argument not in plain]
    refuse_unknown(given.overrides)

    @hydra.main(config_path=str(CONFIG_FOLDER), config_name="config", version_base="1.3")
    def job(composed: DictConfig) -> float | None:
        try:
            result = train_agent(list(HydraConfig.get().overrides.task), config_dir=given.config_dir)
        except Interrupted as error:  # as a foreseen error of one job it would let the sweep go on with the next
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        return result.evaluation.mean if result.evaluation else None

    sys.argv = [sys.argv[0], *in_hydra_grammar(plain), *flags]
    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(explain(error, plain)) from error


def _parsed(arguments: Sequence[str]) -> Namespace:
    """The arguments as Hydra's command line reads them.

    Raises:
        ConfigurationError: a flag that Hydra does not know, uses otherwise, or that a run would not follow.
    """
    from hydra._internal.utils import get_args_parser

    expected = "expected key=value, -m (a sweep), --config-dir=folder, --cfg job (the configuration, printed) or --help"
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            given = get_args_parser().parse_intermixed_args(arguments)
    except SystemExit as end:
        if not end.code:  # --version
            raise
        reason = said.getvalue().strip().rpartition("error: ")[2]
        raise ConfigurationError(f"{reason}; {expected}") from None
    for name in ("config_path", "config_name", "experimental_rerun", "shell_completion"):
        if getattr(given, name):
            raise ConfigurationError(
                f"--{name.replace('_', '-')} does not go with rlplastic's own configuration; {expected}"
            )
    if given.resolve and not (given.cfg or given.help):
        raise ConfigurationError(f"--resolve only changes what --cfg prints; {expected}")
    return given


if __name__ == "__main__":
    told = "interrupted at once; the last checkpoint, if any, is in place: rerun without fresh=true"
    leave(run_verb(main, sys.argv[1:], interrupted=told))
