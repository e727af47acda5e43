"""`python -m rlplastic.train agent=flashsac env=humanoid`: train, or resume, one run; `-m` sweeps over several."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rlplastic.command_line import run_verb
from rlplastic.errors import ConfigurationError, Interrupted


def main(arguments: Sequence[str]) -> None:
    """Train as the arguments say; see `rlplastic.training.train_agent` for the errors."""
    if any(argument.startswith("-") for argument in arguments):
        _through_hydra(arguments)
        return
    from rlplastic.resources import process_age
    from rlplastic.training import train_agent

    train_agent(arguments, spent=process_age())


def _through_hydra(arguments: Sequence[str]) -> None:
    """Sweeps, help and printing the configuration are Hydra's own; every job of a sweep is an ordinary run."""
    # Hydra would print a foreseen error in its own way and leave with its own exit code.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import DictConfig
    from omegaconf.errors import OmegaConfBaseException

    from rlplastic.composition import explain, in_hydra_grammar, refuse_unknown
    from rlplastic.config import register
    from rlplastic.training import train_agent

    register()
    refuse_unknown([a for a in arguments if "=" in a and not a.startswith("-")])

    @hydra.main(config_path="configs", config_name="config", version_base="1.3")
    def job(composed: DictConfig) -> float | None:
        try:
            result = train_agent(list(HydraConfig.get().overrides.task))
        except Interrupted as error:  # as a foreseen error of one job it would let the sweep go on with the next
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        return result.evaluation.mean if result.evaluation else None

    # Hydra's parser does not take overrides on both sides of its flags.
    plain = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
    flags = [argument for argument in arguments if argument not in plain]
    sys.argv = [sys.argv[0], *in_hydra_grammar(plain), *flags]
    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(explain(error, [a for a in arguments if "=" in a])) from error


if __name__ == "__main__":
    told = "interrupted at once; the last checkpoint, if any, is in place: rerun without fresh=true"
    sys.exit(run_verb(main, sys.argv[1:], interrupted=told))
