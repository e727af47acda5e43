"""The files of a checkpoint: safetensors and JSON, hashed while written, and the manifest that vouches for them.

Source of the tensor format: safetensors (github.com/huggingface/safetensors, "Format"). `rlplastic.checkpoint` decides
what goes into which file and when it becomes visible.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rlplastic.errors import CheckpointError

FORMAT_VERSION = 1
"""Version of the layout; every version keeps the manifest's ``format`` field and the way its checksum is made."""

DTYPE_CODES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_CHUNK = 4 * 2**20


class DamagedCheckpointError(CheckpointError):
    """One checkpoint cannot be trusted; the sentence names the file. `CheckpointStore.newest` goes on to the next."""


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, a tensor at a time, so that a large replay segment is never copied whole.

    Format (huggingface/safetensors): length of the header as little-endian u64, JSON header, tensors without gaps. Wide
    elements come first and the header ends on a multiple of 8, so every tensor is aligned.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        if tensor.numel():
            yield tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_hashed(path: Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write, hash on the way, and flush to the disk; returns (size in bytes, SHA-256)."""
    digest = hashlib.sha256()
    size = 0
    with open(path, "xb") as file:
        for piece in pieces:
            for start in range(0, len(piece), _CHUNK):
                chunk = piece[start : start + _CHUNK]
                file.write(chunk)
                digest.update(chunk)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def verify(path: Path, size: int, sha256: str) -> None:
    """Read a file once and raise DamagedCheckpointError unless it has this size in bytes and this SHA-256."""
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise DamagedCheckpointError(f"{path} has {found} bytes, its manifest records {size}")
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DamagedCheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
    if digest != sha256:
        raise DamagedCheckpointError(f"{path} does not have the SHA-256 that its manifest records")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a verified file, on the CPU; CheckpointError when it went away or changed meanwhile."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} was good when the checkpoint was opened and cannot be read now ({error}); "
            "expected it to stay while in use: open the newest checkpoint again"
        ) from error


def render_manifest(body: Mapping[str, Any]) -> bytes:
    """The manifest's only spelling, with a checksum over itself: any altered byte shows."""
    checksum = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "checksum": checksum}, indent=1) + "\n").encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint directory ``path``, its checksum verified.

    Raises:
        DamagedCheckpointError: it is missing or altered.
        CheckpointError: it is intact and of another format version.
    """
    file = path / "manifest.json"
    try:
        content = file.read_bytes()
        manifest: dict[str, Any] = json.loads(content)
        body = {key: value for key, value in manifest.items() if key != "checksum"}
    except OSError as error:
        raise DamagedCheckpointError(f"{file} cannot be read ({error.strerror or error})") from error
    except (ValueError, AttributeError) as error:
        raise DamagedCheckpointError(f"{file} is not the JSON object that was written ({error})") from error
    if render_manifest(body) != content:
        raise DamagedCheckpointError(f"{file} does not have the checksum it records")
    if body.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"checkpoint {path} has format version {body.get('format')} (written by rlplastic {body.get('library')}); "
            f"expected format version {FORMAT_VERSION}: use the version that wrote it, or start anew with fresh=true"
        )
    return body


def fingerprint(path: Path) -> str:
    """SHA-256 of the manifest of the checkpoint directory ``path``, and so of all that it lists; raises as above."""
    return hashlib.sha256(render_manifest(read_manifest(path))).hexdigest()


def library_version() -> str:
    """The installed version of rlplastic, for the manifest."""
    try:
        return importlib.metadata.version("rlplastic")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
