"""Arrays of .npz files that nobody vouches for: what a header claims is compared with what is there."""

from __future__ import annotations

import io
import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np

from posemap_fast.errors import DatasetError

__all__ = ["read_npz_array"]

_LARGEST, _PIECE = 1 << 30, 1 << 20  # bytes of one array, and read at once
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError),
    *(OSError, EOFError, ValueError, KeyError, TypeError, SyntaxError, IndexError),
    *(NotImplementedError, RuntimeError, OverflowError, MemoryError),
)  # what zipfile and numpy raise for damaged files


def read_npz_array(path: Path, name: str) -> np.ndarray:
    """The array `name` of an .npz file; objects are refused, and so is more than its bytes hold.

    Raises:
        DatasetError: no such array, or a damaged file.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as member:
            data = bytearray()
            while piece := member.read(_PIECE):  # a larger request would be allocated whatever the file holds
                data += piece
                if len(data) > _LARGEST:
                    raise ValueError(f"more than {_LARGEST} bytes")
        return _array(bytes(data))
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:100]
        raise DatasetError(f"{path}: {name}: cannot read the points ({reason}); write it again or remove it") from error


def _array(data: bytes) -> np.ndarray:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, by_column, dtype = read_header[version](stream)
    payload = data[stream.tell() :]
    if dtype.hasobject or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(payload):
        raise ValueError(f"shape {shape} of {dtype} does not fit {len(payload)} bytes")
    return np.frombuffer(payload, dtype).reshape(shape, order="F" if by_column else "C")
