"""One directory per run: whose it is, what was asked for, and logs that never run ahead of the checkpoint.

``runs/<name>/`` holds ``lock``, ``config.yaml``, ``checkpoints/``, the logs, ``videos/`` and ``export/`` (design: "Run
directory"). Rerunning a command finds its directory by name; the stored configuration says whether it is the same run.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import tempfile
from collections.abc import Collection, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from omegaconf import OmegaConf

from rlplastic.command_line import flatten, within
from rlplastic.errors import ConfigurationError

LOG_PATTERNS = ("eval.csv", "*.jsonl", "*tfevents*")
"""Append-only logs that are cut back on resume; ``timing.csv`` is not: it keeps the wall times of all attempts."""

MAX_NAME = 60
"""Characters of a default name; a longer one ends in a hash."""

_BEGINNINGS = frozenset({"lock", "config.yaml", "machine.json"})
"""What a run writes before it knows whether it can be carried out."""

_NAMELESS = frozenset({"env", "agent", "seed", "name", "fresh", "runs"})
"""Overrides that `default_name` leaves out: the first three open the name, the others do not describe the run."""


class RunDirectory:
    """A run's directory, locked until `close`; made by `open`, usable as a context manager.

    Attributes:
        path: the directory.
        moved_to: where an earlier run of this name went; None unless ``fresh`` found one.
    """

    def __init__(self, path: Path, lock: IO[bytes], made: Collection[Path], moved_to: Path | None = None) -> None:
        self.path = path
        self.moved_to = moved_to
        self._lock = lock
        self._made = made
        # A forked worker that outlives a killed trainer must not keep the lock alive.
        os.register_at_fork(after_in_child=lock.close)

    @classmethod
    def open(
        cls,
        root: Path | str,
        name: str,
        config: Mapping[str, Any],
        fresh: bool = False,
        ignore: Collection[str] = (),
    ) -> RunDirectory:
        """Lock ``root/name`` and record the resolved configuration in its ``config.yaml``.

        Args:
            root: the folder of run directories.
            name: the run's name, a relative path.
            config: the resolved configuration, nested dictionaries of plain values.
            fresh: move an existing directory aside, to ``<name>.old-<n>``, and start anew; nothing is deleted.
            ignore: dotted keys, or sections, that may differ from the stored configuration.

        Raises:
            ConfigurationError: another process uses the directory, it holds checkpoints of another configuration or
                of one that is lost, the name leaves ``root``, or the directory cannot be written.
        """
        if not str(root):
            raise ConfigurationError(
                "runs= is empty, so the run would lie among the files of the working directory; expected a folder: "
                "leave it out for runs=runs"
            )
        relative = Path(name)
        if relative.is_absolute() or ".." in relative.parts or not relative.parts:
            raise ConfigurationError(
                f"name={name!r} is not a name inside the folder {root}; use one such as 'humanoid-1'"
            )
        path = Path(root) / relative
        made: list[Path] = []
        try:
            made += [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            lock = _acquire(path)
        except OSError as error:
            _unmake(path, made)
            raise _unwritable(path, error) from error
        moved_to = None
        try:
            if fresh and any(entry.name != "lock" for entry in path.iterdir()):
                moved_to = path.rename(_free_name(path))
                path.mkdir()
                moved, lock = lock, _acquire(path)
                moved.close()
                made = [path]
            _refuse_other_run(path, config, ignore)
            write_atomically(path / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))
        except BaseException as error:
            _unmake(path, made, moved_to)
            lock.close()
            if isinstance(error, OSError):
                raise _unwritable(path, error) from error
            raise
        return cls(path, lock, made, moved_to)

    def close(self) -> None:
        """Release the lock; calling it twice is harmless."""
        self._lock.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ConfigurationError):
            _unmake(self.path, self._made, self.moved_to)
        self.close()

    def write(self, name: str, text: str) -> None:
        """Write a file of the directory, atomically.

        Raises:
            ConfigurationError: the directory cannot be written; an old file of that name is untouched.
        """
        try:
            write_atomically(self.path / name, text)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def log_lengths(self) -> dict[str, int]:
        """Size in bytes of every append-only log, by path relative to the directory; flush the writers first."""
        return {log.name: log.stat().st_size for log in self._logs()}

    def cut_back(self, lengths: Mapping[str, int]) -> list[str]:
        """Bring the logs back to ``lengths``, as `log_lengths` gave them when a checkpoint was saved.

        Logs that did not exist then are removed; with ``{}`` (no checkpoint yet) that is all of them.

        Returns:
            One sentence for each log that is missing or shorter than it was, whose rows are lost.

        Raises:
            ConfigurationError: a log cannot be written.
        """
        warnings = []
        try:
            for log in self._logs():
                size, recorded = log.stat().st_size, lengths.get(log.name)
                if recorded is None:
                    log.unlink()
                elif size > recorded:
                    with open(log, "r+b") as file:
                        file.truncate(recorded)
                        os.fsync(file.fileno())
                elif size < recorded:
                    warnings.append(f"{log} has {size} bytes where the checkpoint recorded {recorded}: rows are lost")
            sync_directory(self.path)
        except OSError as error:
            raise _unwritable(self.path, error) from error
        present = {log.name for log in self._logs()}
        return warnings + [f"{self.path / name} is gone: its rows are lost" for name in lengths if name not in present]

    def _logs(self) -> list[Path]:
        return sorted({log for pattern in LOG_PATTERNS for log in self.path.glob(pattern) if log.is_file()})


def default_name(env: str, agent: str, seed: int, overrides: Collection[str]) -> str:
    """A run's name from its command line: environment, agent, seed, then every override, sorted by key.

    At most `MAX_NAME` characters of ``A-Z a-z 0-9 . _ = -``. When that loses something (a longer text, other
    characters), the name ends in 8 hexadecimal digits of a hash of the whole: different commands, different names.

    Args:
        env: short name of the environment, such as ``humanoid``.
        agent: name of the agent.
        seed: the run's seed.
        overrides: ``key=value`` as on the command line, without those that do not make a run different (stop
            conditions, cadences, logging); ``env agent seed name fresh runs`` are left out here.
    """
    chosen = {}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key not in _NAMELESS:
            chosen[key] = value
    whole = "_".join([env, agent, f"seed{seed}", *(f"{key}={value}" for key, value in sorted(chosen.items()))])
    clean = re.sub(r"[^A-Za-z0-9._=-]+", "-", whole).lstrip(".-")
    if clean == whole and len(clean) <= MAX_NAME:
        return clean
    return f"{clean[: MAX_NAME - 9]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file by ``content`` (text as UTF-8), flushed to the disk: readers see the old or the new one, whole.

    Raises:
        OSError: the disk is full or a permission is missing; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_report(path: Path, document: Mapping[str, Any], again: str) -> None:
    """Write what a verb found as JSON.

    Raises:
        ConfigurationError: the file cannot be written; the sentence says what to do and then to ``again``.
    """
    try:
        write_atomically(path, json.dumps(document, indent=1) + "\n")
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written ({error.strerror or error}); {remedy(error)} and {again}"
        ) from error


def require_writable(path: Path) -> None:
    """Refuse a file that could not be written, before the work that is to fill it; an old one is untouched.

    Raises:
        ConfigurationError: its folder is missing or takes no files, or there is a folder in its place.
    """
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written ({error.strerror or error}); {remedy(error)}, or name another file"
        ) from error


def sync_directory(path: Path) -> None:
    """Make renames and new names in a directory survive a power failure; raises OSError as `os.fsync` does."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _acquire(path: Path) -> IO[bytes]:
    """The open lock file of ``path``, held exclusively until it is closed or the process ends, however it ends."""
    lock = open(path / "lock", "a+b", buffering=0)  # noqa: SIM115 - open for as long as the directory is in use
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (path / "lock").stat().st_ino != os.fstat(lock.fileno()).st_ino:
            raise BlockingIOError  # the directory was moved aside between opening and locking
        lock.truncate(0)
        started = datetime.now().astimezone().isoformat(timespec="seconds")
        lock.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started}).encode() + b"\n")
    except (BlockingIOError, FileNotFoundError):
        lock.seek(0)
        holder = _describe_holder(lock.read())
        lock.close()
        raise ConfigurationError(
            f"run directory {path} is in use by {holder}; wait for it to end, or choose another with name=…"
        ) from None
    except BaseException:
        lock.close()
        raise
    return lock


def _describe_holder(content: bytes) -> str:
    with suppress(ValueError, KeyError, TypeError):
        holder = json.loads(content)
        return f"process {holder['pid']} on {holder['host']}, started {holder['started']}"
    return "another process that has just started"


def remedy(error: OSError) -> str:
    """What to do about a file that cannot be written, by the error's number; ``free space on the disk``, say."""
    return _REMEDIES.get(error.errno or 0, "mend that")


_REMEDIES = {
    errno.ENOSPC: "free space on the disk",
    errno.EDQUOT: "free space: the user's quota is used up",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EACCES: "mend the permission",
    errno.EPERM: "mend the permission",
    errno.EROFS: "mount the disk for writing",
    errno.ENOENT: "make the folder",
    errno.ENOTDIR: "move the file away that lies where a folder should",
    errno.EEXIST: "move the file away that lies where a folder should",
    errno.EISDIR: "move the folder away that lies where a file should",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EIO: "look after the disk, which reports a fault",
}


def _unwritable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"run directory {path} cannot be written ({error.strerror or error}); {remedy(error)}, "
        "or choose another place with runs=<folder>"
    )


def _unmake(path: Path, made: Collection[Path], moved_to: Path | None = None) -> None:
    """Leave no trace of a run that was refused before it saved or logged anything; the caller holds its lock.

    Args:
        path: the run's directory.
        made: the folders that were made for it, innermost first; without any, nothing is done.
        moved_to: where an earlier run went that was in its place, and comes back.
    """
    with suppress(OSError):
        if made and _BEGINNINGS.issuperset(entry.name for entry in path.iterdir()):
            for name in _BEGINNINGS:
                (path / name).unlink(missing_ok=True)
            for folder in made:
                folder.rmdir()  # ends here where another run lies beside
    if moved_to is not None and not path.exists():
        with suppress(OSError):
            moved_to.rename(path)


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}.old-{number}")).exists():
        number += 1
    return candidate


def _refuse_other_run(path: Path, config: Mapping[str, Any], ignore: Collection[str]) -> None:
    """Raise ConfigurationError if ``path`` has checkpoints of another configuration, or of one that is lost.

    A run that never saved a checkpoint has nothing to lose: a mistyped command does not occupy its name.
    """
    if not any((path / "checkpoints").glob("step_*")):
        return
    offer = "choose another name with name=…, or move this run aside with fresh=true"
    file = path / "config.yaml"
    if not file.exists():
        raise ConfigurationError(f"{path} has checkpoints but no config.yaml, so it cannot be resumed; {offer}")
    try:
        stored = OmegaConf.to_container(OmegaConf.load(file))
        if not isinstance(stored, dict):
            raise ValueError("not a mapping")
    except Exception as error:  # the YAML reader's own exceptions have no common base with OmegaConf's
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"{file} cannot be read ({reason}), so the run cannot be resumed; {offer}") from error
    # Through YAML and back: what is compared is what is stored.
    wanted = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(dict(config)))))
    old, new = flatten(stored), flatten(wanted)
    missing = "(absent)"
    different = [
        f"{key}: {old.get(key, missing)} -> {new.get(key, missing)}"
        for key in sorted({*old, *new})
        if old.get(key, missing) != new.get(key, missing) and not within(key, ignore)
    ]
    if different:
        raise ConfigurationError(f"{path} holds a run of another configuration ({'; '.join(different)}); {offer}")
