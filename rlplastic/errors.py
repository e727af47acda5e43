"""Every foreseeable failure as one exception class, and the exit code the command line gives it.

A message is one sentence: what was wrong, what was expected, what to do. The verbs print that sentence and leave
with `exit_code`; anything that is not an `RlplasticError` is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class RlplasticError(Exception):
    """Base of all errors that rlplastic foresees; exit code 1."""

    exit_code = 1


class ConfigurationError(RlplasticError):
    """The request itself cannot be carried out: unknown name, wrong type, value out of range; exit code 2."""

    exit_code = 2


class EnvironmentContractError(ConfigurationError):
    """An environment breaks the contract of `rlplastic.envs.base`; exit code 2."""


class OutOfMemoryError(ConfigurationError):
    """What was asked for does not fit into the memory of this machine or its GPU; exit code 2."""


class NonFiniteError(RlplasticError):
    """A NaN or infinity appeared in an observation, reward, action, loss or parameter; exit code 3."""

    exit_code = 3


class CheckpointError(RlplasticError):
    """A checkpoint is damaged, incomplete, or of another format version; exit code 4."""

    exit_code = 4


class CheckpointWriteError(RlplasticError):
    """A checkpoint could not be written (full disk, lost permission); exit code 1. The previous one is untouched."""


class SegmentMissingError(CheckpointWriteError):
    """A segment that a new checkpoint was to share is gone or cut short; saving everything anew helps; exit code 1."""


class LogWriteError(RlplasticError):
    """A log could not be written (full disk, lost permission); exit code 1."""


class ExportError(RlplasticError):
    """An exported policy does not do what the trained one does, or says what is not so; exit code 5."""

    exit_code = 5


class DistributedError(RlplasticError):
    """A rank is gone, does not answer, or computed something else than the others; exit code 1."""


class Interrupted(RlplasticError):
    """SIGINT, SIGTERM or SIGHUP arrived; the step was finished and the run saved; exit code 130."""

    exit_code = 130


_NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory|_STATUS_ALLOC_FAILED", re.IGNORECASE)
_WANTED = re.compile(r"(?:tried|unable) to allocate ([\d.,]+ \w+)", re.IGNORECASE)


@contextmanager
def telling_of_memory(remedy: str) -> Iterator[None]:
    """Turn what Python, numpy, torch and the system raise when memory runs out into one sentence.

    torch's CPU allocator raises a plain RuntimeError, which only its words tell from others; so torch is not imported.

    Args:
        remedy: what to do, as the end of the sentence.

    Raises:
        OutOfMemoryError: memory ran out within the block; anything else passes as it is.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENOMEM:
            raise
        if isinstance(error, RuntimeError) and not _NO_MEMORY.search(str(error)):
            raise
        place = "the GPU" if re.search("CUDA|CUBLAS|CUDNN|HIP", str(error)) else "this machine"
        wanted = _WANTED.search(str(error))
        more = f"another {wanted[1]}" if wanted else "more"
        raise OutOfMemoryError(f"{place} is out of memory; expected room for {more}: {remedy}") from error


def nearest(name: str, valid: Iterable[str], count: int = 3, prefix: str = "") -> str:
    """A hint: the nearest valid names, all of them where they are few; empty without any.

    Matching ignores case, since most wrong names are right names with the wrong capitals. A name that begins the other
    one is near: ``enviroment`` means ``env``, ``paper`` one of ``paper_cpu`` and ``paper_gpu``.

    Args:
        name: what was given.
        valid: what would have been understood.
        count: most names in ``did you mean 'hopper' or 'humanoid'?``.
        prefix: shown before every name, such as the folder that holds them.
    """
    names = sorted(set(valid))
    if not names:
        return ""
    wanted = name.lower()
    matcher = difflib.SequenceMatcher(b=wanted)
    likeness = {}
    for candidate in names:
        folded = candidate.lower()
        matcher.set_seq1(folded)
        short, long = sorted((wanted, folded), key=len)
        begins = len(short) >= 3 and long.startswith(short)
        likeness[candidate] = max(matcher.ratio(), 0.75 if begins else 0.0)
    near = [candidate for candidate in sorted(names, key=lambda c: -likeness[c]) if likeness[candidate] >= 0.5][:count]
    question = "did you mean " + " or ".join(repr(prefix + candidate) for candidate in near) + "?"
    shown = ", ".join(prefix + candidate for candidate in names[:12])
    listing = f"valid names: {shown}" + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    if not near:
        return listing
    return question if len(names) > 6 or len(near) == len(names) else f"{question} {listing}"
