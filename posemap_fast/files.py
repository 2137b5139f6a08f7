"""Files that are either whole or absent: atomic writes, and the container of `.map` and `.pmnet` files.

Container layout (little endian):
    8 bytes   magic, which names the kind of file (`PMFMAP01`, `PMFNET01`)
    32 bytes  SHA-256 of everything that follows
    8 bytes   length of the JSON header
    header    UTF-8 JSON (configuration, frame, metrics; no code)
    payload   tensors in the safetensors format (no code is executed when it is read)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from posemap_fast.errors import FileFormatError

__all__ = ["LOCALIZER_MAGIC", "MAP_MAGIC", "atomic_path", "read_container", "write_container", "write_text"]

MAP_MAGIC = b"PMFMAP01"
LOCALIZER_MAGIC = b"PMFNET01"
_KINDS = {MAP_MAGIC: "scene map", LOCALIZER_MAGIC: "localizer"}
_PREFIX = 8 + 32 + 8


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and renamed over `path`, else removed.

    The file gets the permissions of an ordinary new file, not the private ones of a temporary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    """The process's file mode mask; reading it means setting it for a moment."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_container(path: str | Path, magic: bytes, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Write header and tensors as one checksummed file, atomically."""
    head = json.dumps(header, sort_keys=True).encode()
    payload = save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    body = struct.pack("<Q", len(head)) + head + payload
    with atomic_path(path) as temporary:
        temporary.write_bytes(magic + hashlib.sha256(body).digest() + body)


def read_container(path: str | Path, magic: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a file written by `write_container`.

    Raises:
        FileFormatError: missing, wrong kind, truncated or changed since it was written.
    """
    path = Path(path)
    kind = _KINDS[magic]
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileFormatError(f"{path}: cannot read this {kind}: {error.strerror}; check the path") from error
    if data[:8] != magic:
        found = _KINDS.get(data[:8])
        what = f"it is a {found}" if found else f"it starts with {data[:8]!r}, expected {magic!r}"
        raise FileFormatError(f"{path}: not a {kind} file: {what}; give the file that training wrote")
    if len(data) < _PREFIX or hashlib.sha256(data[40:]).digest() != data[8:40]:
        raise FileFormatError(
            f"{path}: {kind} of {len(data)} bytes is truncated or damaged (SHA-256 does not match); "
            "copy it again or train again"
        )
    (length,) = struct.unpack("<Q", data[40:48])
    header = json.loads(data[_PREFIX : _PREFIX + length])
    return header, load_tensors(data[_PREFIX + length :])
