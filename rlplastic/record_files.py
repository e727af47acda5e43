"""Append-only files of whole records: none ever ends in a torn record, and what cannot be written now comes later."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlplastic.errors import LogWriteError
from rlplastic.run_directory import remedy


class RecordFiles:
    """Files that grow by whole records, written by the caller's thread.

    `write` and `sync` raise LogWriteError, in one sentence, when the disk is full or a permission is lost. What is
    missing is kept: it comes first, in its order, whenever something is written again.
    """

    def __init__(self) -> None:
        self._waiting: dict[Path, bytes] = {}
        self._written: set[Path] = set()

    def add(self, path: Path, record: bytes) -> None:
        """Have a record written next; an empty one only has the file synced."""
        self._waiting[path] = self._waiting.get(path, b"") + record

    def write(self) -> None:
        """Append what waits for each file; one that cannot be written holds back no other."""
        failure: LogWriteError | None = None
        for path, content in list(self._waiting.items()):
            try:
                append(path, content)
                del self._waiting[path]
                self._written.add(path)
            except LogWriteError as error:
                failure = error
        if failure is not None:
            raise failure

    def sync(self) -> None:
        """Write, and put everything on the disk."""
        self.write()
        for path in sorted(self._written):
            with writing(path), open(path, "rb") as file:
                os.fsync(file.fileno())


def append(path: Path, content: bytes) -> None:
    """Add it all, or leave the file as it was: a torn record would swallow the next one.

    Raises:
        LogWriteError: the file cannot be written.
    """
    with writing(path), open(path, "ab", buffering=0) as file:  # a buffer would be flushed once more on closing
        size = file.tell()
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says about a file that cannot be written into a LogWriteError."""
    try:
        yield
    except OSError as error:
        raise LogWriteError(f"logs in {path} cannot be written ({error.strerror or error}); {remedy(error)}") from error
