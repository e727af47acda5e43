"""What every verb shares: reading `key=value` arguments, one-sentence errors, exit codes.

Training is configured by Hydra (groups, sweeps); the smaller verbs take the same `key=value` syntax straight into a
dataclass. Either way an unknown key, a wrong type or an unknown choice becomes a `ConfigurationError` with the nearest
valid name.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from rlplastic.errors import ConfigurationError, Interrupted, RlplasticError, nearest, telling_of_memory
from rlplastic.usage import verb_help

T = TypeVar("T")


_asked = threading.Event()
"""Whether a signal asked this process to end and was answered with a KeyboardInterrupt."""


def stop_was_asked() -> bool:
    """Whether a signal asked to end while a verb did not listen itself.

    The KeyboardInterrupt that it raised may have been lost on its way: a callback of the import system or a destructor
    swallows it, and a library that is cut short while it is imported may fail in another way.
    """
    return _asked.is_set()


def _interrupt(_number: int, _frame: FrameType | None) -> NoReturn:
    _asked.set()
    raise KeyboardInterrupt


def run_verb(
    verb: Callable[[Sequence[str]], None],
    arguments: Sequence[str],
    interrupted: str = "interrupted before the end; rerun the command",
) -> int:
    """Call a verb and turn foreseen failures into one sentence on stderr and the documented exit code.

    SIGTERM, and SIGHUP unless `nohup` has it ignored, act like Ctrl-C wherever a verb does not listen itself, so that a
    run that is stopped while it still sets up, or just after its last save, ends with the documented code too.

    Args:
        verb: takes the arguments.
        arguments: as typed.
        interrupted: what to say then, for verbs that leave something behind.
    """
    _asked.clear()
    signal.signal(signal.SIGTERM, _interrupt)
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)
    try:
        with telling_of_memory("end what else takes it, or ask for less"):
            verb(arguments)
    except Interrupted as error:
        _complain(f"error: {error}")
        return error.exit_code
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) or stop_was_asked():
            _complain(f"error: {interrupted}")
            return Interrupted.exit_code
        if not isinstance(error, RlplasticError):
            raise
        _complain(f"error: {error}")
        return error.exit_code
    finally:
        _finish_output()
    return 0


def leave(code: int) -> NoReturn:
    """End the process with an exit code of `run_verb`.

    After an interruption the interpreter is not taken down: libraries whose import was cut short may not survive that,
    and the exit code would be that of their death.
    """
    if code != Interrupted.exit_code:
        sys.exit(code)
    try:
        atexit._run_exitfuncs()
        _finish_output()
    finally:
        os._exit(code)


def _complain(sentence: str) -> None:
    with suppress(OSError):  # the terminal may be gone, and the exit code says it, too
        print(sentence, file=sys.stderr)


def _finish_output() -> None:
    """Write out what is still buffered, or give it up: left to the interpreter, a failure changes the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if stream is sys.stdout and not isinstance(error, BrokenPipeError):
                _complain(f"warning: standard output is incomplete ({error.strerror or error})")


def parse(arguments: Sequence[str], schema: type[T], verb: str) -> T:
    """`key=value` arguments as an instance of the dataclass ``schema``; a field's own fields are `key.field=value`.

    Raises:
        ConfigurationError: unknown key, value of the wrong type, missing required key, or not `key=value` at all.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if any(argument in ("-h", "--help") for argument in arguments):
        print(verb_help(schema, verb))
        raise SystemExit(0)
    config = OmegaConf.structured(schema)
    fields = flatten(OmegaConf.to_container(config))
    listed = f"(python -m rlplastic.{verb} --help lists the keys)"
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            raise ConfigurationError(f"{argument!r} is not of the form key=value {listed}")
        if name not in fields:
            raise ConfigurationError(f"unknown key {name!r}; {nearest(name, fields)} {listed}")
        try:
            OmegaConf.update(config, name, OmegaConf.select(OmegaConf.from_dotlist([f"{name}={value}"]), name))
        except OmegaConfBaseException as error:
            raise ConfigurationError(f"{refused(argument, error)} {listed}") from error
    missing = [name for name in fields if OmegaConf.is_missing(config, name)]
    if missing:
        raise ConfigurationError(f"missing {', '.join(f'{name}=…' for name in missing)} {listed}")
    instance: T = OmegaConf.to_object(config)  # type: ignore[assignment]
    return instance


_EXPECTED = {
    "converted to Integer": "a whole number",
    "converted to Float": "a number",
    "not a valid bool": "true or false",
    "not a ListConfig": "a list in brackets, such as [a,b]",
    "to Dict": "keys of its own, such as key.name=value",
}
"""What OmegaConf's complaints about a value come to."""


def refused(given: str, error: BaseException) -> str:
    """The sentence for `key=value` whose value OmegaConf refused."""
    reason = first_line(error)
    for words, expected in _EXPECTED.items():
        if words in reason:
            return f"{given} was refused; expected {expected}"
    return f"{given} was refused: {reason}; give a value of the right type"


def first_line(error: BaseException) -> str:
    """An exception's own first sentence, without the key dump that OmegaConf appends."""
    return str(error).strip().split("\n")[0].rstrip(".")


@contextmanager
def reading_yaml(file: Path, expected: str) -> Iterator[None]:
    """What reading a YAML file raises becomes a `ConfigurationError` that says what was ``expected`` in it."""
    try:
        yield
    except Exception as error:  # the YAML reader's own exceptions have no common base with OmegaConf's
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{file} cannot be read ({reason}); expected {expected}") from error


def flatten(config: object, prefix: str = "") -> dict[str, Any]:
    """A nested mapping as {dotted key: leaf}."""
    if not isinstance(config, dict) or not config:
        return {prefix: config}
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}.{name}" if prefix else str(name))
    return flat


def within(key: str, sections: Collection[str]) -> bool:
    """Whether a dotted key is one of ``sections`` or lies in one of them."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def override_key(override: str) -> str:
    """The dotted key of a Hydra override, without its leading `+` or `~` and without `@package`."""
    return re.sub(r"@.*$", "", override.partition("=")[0].lstrip("+~"))
