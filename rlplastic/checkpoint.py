"""Checkpoints that are either whole or not there: directories of safetensors and JSON under a hashed manifest.

Layout of one store (design: "Randomness and resume")::

    <directory>/step_000000012000/<group>.safetensors      one file per group of tensors
                                  <document>.json          everything that is not a tensor
                                  manifest.json            sizes and SHA-256 of all files, segments in order
    <directory>/segments/<hash>.safetensors                immutable, shared by every checkpoint that lists them

A checkpoint is staged under a hidden name in the same directory, every file is flushed to the disk, the manifest comes
last, and one rename makes it visible: a process killed at any instant leaves the previous checkpoint or the new one. No
pickle is ever written or read, and nothing here knows what a group or a document means. One process writes to a store
(the run directory's lock sees to it); any number may read.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlplastic.checkpoint_format import (
    DTYPE_CODES,
    FORMAT_VERSION,
    DamagedCheckpointError,
    library_version,
    read_manifest,
    read_tensors,
    render_manifest,
    safetensors_pieces,
    verify,
    write_hashed,
)
from rlplastic.errors import (
    CheckpointError,
    CheckpointWriteError,
    ConfigurationError,
    NonFiniteError,
    SegmentMissingError,
    nearest,
)
from rlplastic.run_directory import remedy, sync_directory

COMPILER_PREFIX = "_orig_mod"
"""The component that ``torch.compile`` puts into parameter names; stripped, so that checkpoints fit any build."""

_DIRECTORY_NAME = re.compile(r"step_(\d{12,})(\.replaced)?")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class SegmentReference:
    """A segment by content: file name inside ``segments``, size in bytes, SHA-256 in hexadecimal digits."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Checkpoint:
    """What `CheckpointStore.save` made: pass ``segments`` to the next save as ``kept_segments`` to share them."""

    step: int
    path: Path
    segments: tuple[SegmentReference, ...]
    bytes_written: int


@dataclass(frozen=True)
class Loaded:
    """A verified checkpoint. Documents are in memory; tensors and segments are read when asked for."""

    step: int
    path: Path
    groups: tuple[str, ...]
    documents: dict[str, Any]
    segment_references: tuple[SegmentReference, ...]
    library: str
    """Version of rlplastic that wrote it."""
    redealt: bool = False
    """Put together from the shards of another number of ranks: see `rlplastic.sharding`."""

    def tensors(self, group: str) -> dict[str, Tensor]:
        """The tensors of one group, on the CPU, bit for bit as saved.

        Raises:
            CheckpointError: the checkpoint has no such group, or its file went away since it was verified.
        """
        if group not in self.groups:
            hint = nearest(group, self.groups)
            raise CheckpointError(f"checkpoint {self.path} has no group of tensors called '{group}'; {hint}")
        return read_tensors(self.path / f"{group}.safetensors")

    def segments(self) -> Iterator[dict[str, Tensor]]:
        """The segments in the order they were given to ``save``, one in memory at a time; raises as `tensors` does."""
        for reference in self.segment_references:
            yield read_tensors(self.path.parent / "segments" / reference.name)


class CheckpointStore:
    """The checkpoints of one run, of which the newest ``keep`` are kept.

    Args:
        directory: made by the first save.
        keep: checkpoints left after a save, at least 1.
        warn: called with each sentence about something skipped or left behind; such a thing never stops a run.

    Raises:
        ConfigurationError: ``keep`` is below 1.
    """

    def __init__(self, directory: Path, keep: int, warn: Callable[[str], None] = lambda sentence: None) -> None:
        if keep < 1:
            raise ConfigurationError(f"checkpoint.keep is {keep}; expected at least 1, from which a run can resume")
        self.directory = Path(directory)
        self.keep = keep
        self.warn = warn
        self.skipped: list[str] = []
        """One sentence for each damaged checkpoint that the last `good` or `newest` passed over."""
        self._damaged: set[Path] = set()

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        documents: Mapping[str, Any],
        new_segments: Sequence[Mapping[str, Tensor]] = (),
        kept_segments: Sequence[SegmentReference] = (),
        check_finite: Collection[str] = (),
        rotate: bool = True,
    ) -> Checkpoint:
        """Write a checkpoint, make it visible at once, then rotate.

        The new checkpoint lists ``kept_segments`` first, then ``new_segments``. Saving a step again replaces it.
        Tensors are only read; they may live on any device, be views, scalars, or share memory.

        Args:
            step: environment transitions so far.
            tensors: group -> name -> tensor of a boolean, integer or real type.
            documents: name -> anything JSON can hold, with string keys and finite numbers (tuples come back as lists).
            new_segments: tensors that later checkpoints will share.
            kept_segments: segments of earlier checkpoints, from `Checkpoint.segments` or `Loaded.segment_references`.
            check_finite: groups whose floating tensors must be finite.
            rotate: remove what it made superfluous; False leaves that to `rotate`.

        Raises:
            NonFiniteError: a checked tensor or a document holds NaN or infinity; nothing was written.
            SegmentMissingError: a kept segment is gone or cut short; its tensors have to be passed as a new segment.
            CheckpointWriteError: the disk is full, a permission is lost, or something cannot be represented; what
                existed before is untouched.
        """
        groups = {group: _plain_names(group, values) for group, values in tensors.items()}
        segments = [_plain_names("segment", values) for values in new_segments]
        texts = {name: _document_text(name, document) for name, document in documents.items()}
        for name in (*groups, *texts):
            if not _FILE_NAME.fullmatch(name) or name == "manifest":
                raise CheckpointWriteError(f"'{name}' cannot name a file of a checkpoint; use letters, digits and '_'")
        for group in check_finite:
            _refuse_non_finite(group, groups[group])
        final = self.directory / f"step_{step:012d}"
        staging = self.directory / f".staging_{final.name}"
        try:
            self._check_kept(kept_segments)
            self._restore_replaced()
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            checkpoint = self._stage(staging, final, step, groups, texts, segments, kept_segments)
            self._publish(staging, final, checkpoint.segments[len(kept_segments) :])
        except OSError as error:
            raise CheckpointWriteError(
                f"checkpoint {final} could not be written ({error.strerror or error}); earlier checkpoints are "
                # A run goes on after this, unless it was its last checkpoint.
                f"untouched: {remedy(error)} before the next save, or before rerunning the command"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        if rotate:
            self.rotate(checkpoint)
        return checkpoint

    def newest(self, segments: bool = True) -> Loaded | None:
        """The newest checkpoint whose every file and segment has its recorded size and hash; None without any.

        Args:
            segments: verify them, too; a reader that wants the networks alone need not have the replay.

        Raises:
            CheckpointError: checkpoints exist but all are damaged (each is named), or one has another format version.
        """
        for loaded in self.good(segments):
            return loaded
        self.require_one()
        return None

    def good(self, segments: bool = True) -> Iterator[Loaded]:
        """All checkpoints that `newest` chooses from, verified one by one, newest first; arguments as there."""
        self.skipped = []
        for path in self._candidates():
            try:
                yield self.load(path, segments)
            except DamagedCheckpointError as error:
                self.skip(path, error)

    def skip(self, path: Path, error: DamagedCheckpointError) -> None:
        """Pass over a checkpoint that turned out to be damaged, and count it no more among those to keep."""
        self._damaged.add(path)
        self.skipped.append(str(error))
        self.warn(f"skipped a damaged checkpoint: {error}")

    def require_one(self) -> None:
        """Raise CheckpointError if the last `good` found checkpoints and passed over them all."""
        if self.skipped:
            raise CheckpointError(
                f"no checkpoint in {self.directory} is good ({'; '.join(self.skipped)}); "
                "restore one from a copy, or train anew (fresh=true)"
            )

    @staticmethod
    def load(path: Path, segments: bool = True) -> Loaded:
        """Verify and open the checkpoint directory ``path``; its segments lie in ``path/../segments``.

        Raises:
            DamagedCheckpointError: a file or segment is missing, cut short or altered.
            CheckpointError: the checkpoint has another format version.
        """
        manifest = read_manifest(path)
        documents: dict[str, Any] = {}
        for name, record in manifest["files"].items():
            verify(path / name, record["size"], record["sha256"])
            if name.endswith(".json"):
                documents[name.removesuffix(".json")] = json.loads((path / name).read_text(encoding="utf-8"))
        references = _references(manifest)
        for reference in set(references) if segments else ():
            verify(path.parent / "segments" / reference.name, reference.size, reference.sha256)
        groups = tuple(name.removesuffix(".safetensors") for name in manifest["files"] if name.endswith(".safetensors"))
        return Loaded(manifest["step"], path, groups, documents, references, manifest["library"])

    def _candidates(self) -> list[Path]:
        """Checkpoint directories, newest first; one that was set aside while being replaced follows its replacement."""
        if not self.directory.is_dir():
            return []
        found = [(match, path) for path in self.directory.iterdir() if (match := _DIRECTORY_NAME.fullmatch(path.name))]
        found.sort(key=lambda item: (int(item[0][1]), item[0][2] is None), reverse=True)
        return [path for _, path in found]

    def _restore_replaced(self) -> None:
        """Give back its name to a checkpoint whose replacement was killed between two renames."""
        for aside in self.directory.glob("step_*.replaced"):
            final = aside.with_suffix("")
            if not final.exists():
                aside.rename(final)

    def _check_kept(self, kept: Sequence[SegmentReference]) -> None:
        for reference in kept:
            path = self.directory / "segments" / reference.name
            if not path.is_file() or path.stat().st_size != reference.size:
                raise SegmentMissingError(
                    f"segment {path} is missing or not {reference.size} bytes long, as an earlier checkpoint wrote it; "
                    "a new checkpoint cannot share it: pass its tensors as a new segment"
                )

    def _stage(
        self,
        staging: Path,
        final: Path,
        step: int,
        groups: Mapping[str, Mapping[str, Tensor]],
        texts: Mapping[str, str],
        segments: Sequence[Mapping[str, Tensor]],
        kept: Sequence[SegmentReference],
    ) -> Checkpoint:
        """Write every file of the checkpoint into ``staging``, new segments among them, the manifest last."""
        fresh = []
        for values in segments:
            unnamed = staging / "segment"
            size, sha256 = write_hashed(unnamed, safetensors_pieces(values))
            fresh.append(SegmentReference(f"{sha256[:32]}.safetensors", size, sha256))
            unnamed.rename(staging / f".{fresh[-1].name}")
        files = {}
        for group, values in groups.items():
            files[f"{group}.safetensors"] = write_hashed(staging / f"{group}.safetensors", safetensors_pieces(values))
        for name, text in texts.items():
            files[f"{name}.json"] = write_hashed(staging / f"{name}.json", [text.encode()])
        references = (*kept, *fresh)
        manifest = render_manifest(
            {
                "format": FORMAT_VERSION,
                "library": library_version(),
                "step": step,
                "files": {name: {"size": size, "sha256": sha256} for name, (size, sha256) in files.items()},
                "segments": [asdict(reference) for reference in references],
            }
        )
        size, _ = write_hashed(staging / "manifest.json", [manifest])
        sync_directory(staging)
        total = size + sum(size for size, _ in files.values()) + sum(reference.size for reference in fresh)
        return Checkpoint(step, final, references, total)

    def _publish(self, staging: Path, final: Path, fresh: Sequence[SegmentReference]) -> None:
        """Move new segments and the staged directory into place, or undo it all.

        Renames only. While a step is replaced, its old directory is a checkpoint under another name.
        """
        folder = self.directory / "segments"
        aside = final.with_name(f"{final.name}.replaced")
        added: list[Path] = []
        published = False
        try:
            folder.mkdir(exist_ok=True)
            for reference in dict.fromkeys(fresh):
                target = folder / reference.name
                if not target.exists():
                    added.append(target)
                # An existing file has the same content or is damaged: either way the new one may take its place.
                (staging / f".{reference.name}").replace(target)
            sync_directory(folder)
            sync_directory(staging)
            if final.exists():
                if aside.exists():
                    self._discard(aside)
                final.rename(aside)
            staging.rename(final)
            published = True
            sync_directory(self.directory)
        except BaseException:
            if published:
                final.rename(staging)
            if aside.exists() and not final.exists():
                aside.rename(final)
            for target in added:
                target.unlink(missing_ok=True)
            raise

    def rotate(self, newest: Checkpoint) -> None:
        """Remove what the new checkpoint made superfluous; a failure leaves waste, never a damaged checkpoint.

        A damaged later step does not count among the kept ones: it would push out the good checkpoint it lost to.
        """
        final = newest.path
        self._damaged.discard(final)
        try:
            candidates = self._candidates()
            good = [path for path in candidates if path not in self._damaged and not path.name.endswith(".replaced")]
            past = [path for path in good if _step_of(path) <= _step_of(final)]
            for path in candidates:
                if path not in good or path in past[self.keep :]:
                    self._discard(path)
            for pattern in (".staging_*", ".trash_*"):
                for path in self.directory.glob(pattern):
                    shutil.rmtree(path)
            sync_directory(self.directory)
            self._collect_segments()
        except OSError as error:
            self.warn(f"old checkpoints in {self.directory} could not be removed ({error}); the new one is complete")

    def _discard(self, path: Path) -> None:
        """Remove a checkpoint; it stops being one before its first file goes."""
        trash = path.with_name(f".trash_{path.name}")
        shutil.rmtree(trash, ignore_errors=True)
        path.rename(trash)
        shutil.rmtree(trash)
        self._damaged.discard(path)

    def _collect_segments(self) -> None:
        """Delete segments that no checkpoint lists; with an unreadable manifest around, nobody knows, so none."""
        try:
            manifests = [read_manifest(path) for path in self._candidates()]
        except CheckpointError:
            return
        used = {reference.name for manifest in manifests for reference in _references(manifest)}
        for path in (self.directory / "segments").glob("*.safetensors"):
            if path.name not in used:
                path.unlink()


def _step_of(path: Path) -> int:
    return int(path.name.split("_")[1].split(".")[0])


def _plain_names(group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without compiler prefixes; names that would collide and types that have no code are refused."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part != COMPILER_PREFIX)
        if not short or short == "__metadata__" or short in plain:
            raise CheckpointWriteError(
                f"tensor '{name}' of '{group}' would be stored as '{short}', which is reserved or taken; rename it"
            )
        if tensor.dtype not in DTYPE_CODES or tensor.layout is not torch.strided:
            raise CheckpointWriteError(
                f"tensor '{name}' of '{group}' is {tensor.dtype} ({tensor.layout}); expected a dense tensor of "
                "booleans, integers or real numbers: convert it before saving"
            )
        plain[short] = tensor.detach()
    return plain


def _refuse_non_finite(group: str, tensors: Mapping[str, Tensor]) -> None:
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floating:
        return
    # One transfer for the whole group: on an accelerator every separate question would wait for the device.
    device = next(iter(floating.values())).device
    finite = torch.stack([torch.isfinite(tensor).all().to(device) for tensor in floating.values()]).tolist()
    bad = [name for name, good in zip(floating, finite, strict=True) if not good]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise NonFiniteError(
            f"tensor '{bad[0]}'{more} of '{group}' holds NaN or infinity, and such a state is never saved; expected "
            "finite numbers: resume from the previous checkpoint with a lower learning rate"
        )


def _document_text(name: str, document: Any) -> str:  # noqa: ANN401 - whatever JSON can hold
    if not _has_string_keys(document):
        raise CheckpointWriteError(
            f"document '{name}' has a key that is not a string, which JSON would turn into one; use string keys"
        )
    try:
        return json.dumps(document, allow_nan=False, indent=1)
    except ValueError as error:
        raise NonFiniteError(
            f"document '{name}' holds NaN or infinity, and such a state is never saved; use None for 'no value'"
        ) from error
    except TypeError as error:
        raise CheckpointWriteError(
            f"document '{name}' is not JSON ({error}); expected dictionaries, lists, strings, numbers, booleans, None"
        ) from error


def _has_string_keys(value: Any) -> bool:  # noqa: ANN401 - whatever JSON can hold
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _has_string_keys(item) for key, item in value.items())
    return all(map(_has_string_keys, value)) if isinstance(value, list | tuple) else True


def _references(manifest: Mapping[str, Any]) -> tuple[SegmentReference, ...]:
    return tuple(SegmentReference(**segment) for segment in manifest["segments"])
