"""`python -m rlplastic.diagnose run=runs/humanoid`: can its networks still learn? Beside fresh ones, on its own states.

Prints a table, writes `diagnosis.json` with every layer, `diagnosis.png` and `critic.png`. For a network of any
library: `python -m rlplastic.diagnose state=model.safetensors factory=package.module:function states=states.npz`.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlplastic.command_line import leave, parse, run_verb
from rlplastic.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlplastic.diagnosis import Report

TARGET = "target"
"""The array of ``states=`` that outputs are compared with."""


@dataclass
class Arguments:
    """Measure whether networks can still learn; prints a table, writes diagnosis.json and diagnosis.png.

    Of a run (run=), or of a network of any library (state=, factory= and states=); of a run also what its critic's
    values and features are worth: critic.png.
    """

    run: str | None = None
    """Run directory, whose newest checkpoint is diagnosed on states of its replay."""
    state: str | None = None
    """A network's state dict, as safetensors or from torch.save, which is loaded without unpickling code."""
    factory: str | None = None
    """A function module:name that returns a new network."""
    states: str | None = None
    """An npz file with the network's inputs in their order, and perhaps `target`, what its outputs should be."""
    profile: str = "plain"
    """plain, or bounded for unit rows and a batch norm before every ReLU."""
    rows: int = 1024
    """Transitions that are drawn from the replay."""
    probe_steps: int = 300
    """Of the trainability probe, and of copies of a run's critic; 0 for none."""
    seed: int = 0
    """Of draws, fresh networks and the probe."""
    out: str | None = None
    """Folder of the files; the run's own, or the working directory, if left out."""


def main(arguments: Sequence[str]) -> None:
    """Measure, print, write.

    Raises:
        ConfigurationError: wrong arguments, no such run or file, no checkpoint, or an unwritable folder.
        CheckpointError: every checkpoint is damaged.
    """
    options = parse(arguments, Arguments, "diagnose")
    _check(options)

    from rlplastic import diagnosis
    from rlplastic.diagnosis_views import draw, draw_critic, show
    from rlplastic.run_directory import require_writable, write_report
    from rlplastic.terminal import View, standard_console

    console = standard_console()
    view = View(live=False, console=console)
    out = Path(options.out or options.run or ".")
    if options.out is not None or out.is_dir():  # else there is no such run, which is told below
        require_writable(out / "diagnosis.json")
    with console.status("measuring"):
        if options.run is not None:
            report = diagnosis.diagnose_run(
                options.run, rows=options.rows, probe_steps=options.probe_steps, seed=options.seed, warn=view.warn
            )
        else:
            report = _of_network(options)
    show(report, console)
    write_report(out / "diagnosis.json", report.document(), "diagnose again")
    draw(report, out / "diagnosis.png")
    drawn = draw_critic(report, out / "critic.png")
    files = [out / name for name in ("diagnosis.json", "diagnosis.png", *(["critic.png"] if drawn else []))]
    view.note(f"written to {', '.join(map(str, files[:-1]))} and {files[-1]}")


def _check(options: Arguments) -> None:
    """Refuse what cannot be carried out before anything slow is imported.

    Raises:
        ConfigurationError: neither or both kinds of subject, or a number out of range.
    """
    named = [name for name in ("state", "factory", "states") if getattr(options, name) is not None]
    if (options.run is None) == (not named) or 0 < len(named) < 3:
        given = ", ".join([*(["run"] if options.run is not None else []), *named]) or "nothing"
        raise ConfigurationError(
            f"{given} was given; expected run=… for a run, or state=…, factory=… and states=… for another network"
        )
    for name, least in {"rows": 16, "probe_steps": 0, "seed": 0}.items():
        if getattr(options, name) < least:
            raise ConfigurationError(
                f"{name}={getattr(options, name)} is out of range; expected a number of {least} or more"
            )
    if options.profile not in ("plain", "bounded"):
        raise ConfigurationError(
            f"profile={options.profile} is not a choice; {nearest(options.profile, ('plain', 'bounded'))}"
        )


def _of_network(options: Arguments) -> Report:
    from rlplastic.diagnosis import diagnose_network
    from rlplastic.plasticity import BOUNDED, PLAIN

    assert options.state is not None and options.factory is not None and options.states is not None, "checked"
    make = _factory(options.factory)
    states, target = _states(options.states)
    module = make()
    try:
        module.load_state_dict(_state(options.state))
    except RuntimeError as error:
        raise ConfigurationError(
            f"state={options.state} does not fit what factory={options.factory} makes "
            f"({' '.join(str(error).split())[:200]}); expected the same names and shapes"
        ) from error
    try:
        return diagnose_network(
            module,
            make,
            states,
            target=target,
            profile=BOUNDED if options.profile == "bounded" else PLAIN,
            probe_steps=options.probe_steps,
            seed=options.seed,
            subject=f"{options.state} on {len(states[0]):,} states of {options.states}",
        )
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(
            f"the network cannot be measured on states={options.states} ({' '.join(str(error).split())[:200]}); "
            "expected its inputs as arrays in their order, rows first"
        ) from error


def _factory(name: str) -> Any:  # noqa: ANN401 - whatever the user's module defines
    """The function of ``module:function``, which may lie in the working directory."""
    module, colon, function = name.partition(":")
    if not colon:
        raise ConfigurationError(
            f"factory={name} is not of the form module:function; for example factory=networks:critic"
        )
    sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the user's own module raises
        raise ConfigurationError(
            f"factory={name} cannot be imported ({type(error).__name__}: {error}); expected a module on the path"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    make = getattr(found, function, None)
    if not callable(make):
        hint = nearest(function, [known for known in vars(found) if not known.startswith("_")])
        raise ConfigurationError(f"factory={name}: {module} has no function {function!r}; {hint}")

    def checked() -> nn.Module:
        from torch import nn

        network = make()
        if not isinstance(network, nn.Module):
            raise ConfigurationError(f"factory={name} returned a {type(network).__name__}; expected a torch.nn.Module")
        return network

    return checked


def _states(file: str) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The inputs of an npz file in their order, and its target if it has one; float32, nothing is unpickled."""
    import numpy as np
    import torch

    try:
        with np.load(file, allow_pickle=False) as arrays:
            if not hasattr(arrays, "files"):
                raise ValueError("it is a single array")
            found = {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in arrays.files}
    except (OSError, ValueError, EOFError, TypeError) as error:
        raise ConfigurationError(
            f"states={file} cannot be read ({' '.join(str(error).split())}); expected an npz file of numbers, as "
            "numpy.savez writes it"
        ) from error
    target = found.pop(TARGET, None)
    lengths = {name: len(array) if array.dim() else 0 for name, array in found.items()}
    if not found or len({*lengths.values(), *([] if target is None else [len(target)])}) != 1:
        raise ConfigurationError(
            f"states={file} holds arrays of {lengths} rows; expected inputs with equal rows, and perhaps '{TARGET}'"
        )
    return tuple(found.values()), target


def _state(file: str) -> dict[str, Tensor]:
    """A state dict; of pickles only plain tensors are loaded."""
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if file.endswith(".safetensors"):
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise ConfigurationError(
            f"state={file} cannot be read ({reason}); expected safetensors, or a state dict of tensors from torch.save"
        ) from error
    if not isinstance(state, dict):
        raise ConfigurationError(f"state={file} holds a {type(state).__name__}; expected a state dict of tensors")
    return state


if __name__ == "__main__":
    leave(run_verb(main, sys.argv[1:]))
