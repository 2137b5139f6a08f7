"""Many images of one size: in memory while they are few, else decoded once into a file of the cache and mapped.

The mapped pages belong to the page cache, which the system takes back when it needs memory; `ImageStack` also gives
them back by itself, so that a process does not grow with the number of its images.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import overload

import numpy as np
import torch

from posemap_fast.errors import DatasetError
from posemap_fast.files import atomic_path
from posemap_fast.progress import ProgressMeter, make_progress
from posemap_fast.resources import cache_dir

__all__ = ["ImageStack", "decode_images"]

IN_MEMORY = 1 << 29  # bytes of decoded images; more than this is mapped
_HEADER = 4096  # bytes before the images, JSON padded with spaces
_STAYS = 5 << 28  # bytes of a file that may be resident as a whole
_RELEASE_AFTER = 1 << 29  # bytes of mapped pages at which those of a larger file are given back
_PIXELS_AT_ONCE = 512  # a touched byte may bring a huge page with it
_PAGES_AROUND = 1 << 16  # bytes that the system maps around a touched byte


class _Mapping:
    """A read-only mapping of an image file; counts what was touched and lets go of it in time."""

    def __init__(self, path: Path):
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self.is_large = len(self._map) > _STAYS
        self._touched = 0

    def tensor(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.frombuffer(self._map, dtype=torch.uint8, offset=_HEADER).view(*shape)

    def touched(self, n_bytes: int) -> None:
        self._touched += n_bytes
        if self.is_large and (_mapped_bytes() or self._touched) > _RELEASE_AFTER:
            self._touched = 0
            self._map.madvise(mmap.MADV_DONTNEED)


def _mapped_bytes() -> int:
    """Bytes of files that are resident in this process; 0 where the system does not say."""
    try:
        shared = int(Path("/proc/self/statm").read_text().split()[2])
    except (OSError, IndexError, ValueError):
        return 0
    return shared * mmap.PAGESIZE


class ImageStack:
    """(n, H, W, 3) uint8 images and a selection of them; an int or index tensor gives a tensor, a slice a stack.

    Args:
        images: all images, in memory or mapped; never written to.
        index: (m,) int64 of the images selected; None = all.
        mapping: what is told of every access to mapped images.
    """

    def __init__(self, images: torch.Tensor, index: torch.Tensor | None = None, mapping: _Mapping | None = None):
        self._images, self._index, self._mapping = images, index, mapping

    @classmethod
    def of(cls, images: torch.Tensor | ImageStack) -> ImageStack:
        """A stack of a plain tensor; a stack as it is."""
        return images if isinstance(images, ImageStack) else cls(images)

    @property
    def shape(self) -> torch.Size:
        """(n, H, W, 3)."""
        return torch.Size((len(self), *self._images.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """uint8."""
        return self._images.dtype

    @property
    def device(self) -> torch.device:
        """Where results are."""
        return self._images.device

    def __len__(self) -> int:
        return self._images.shape[0] if self._index is None else self._index.numel()

    @overload
    def __getitem__(self, key: slice) -> ImageStack: ...

    @overload
    def __getitem__(self, key: int | torch.Tensor) -> torch.Tensor: ...

    def __getitem__(self, key: int | slice | torch.Tensor) -> torch.Tensor | ImageStack:
        if isinstance(key, slice):
            return self.select(torch.arange(len(self))[key])
        if isinstance(key, int):
            return self.batch(torch.tensor([key % max(1, len(self))]))[0]
        return self.batch(key)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for chunk in self.split(16):
            yield from chunk

    def select(self, index: torch.Tensor) -> ImageStack:
        """The images `index` (m,) of this selection, not read yet."""
        return ImageStack(self._images, self._of_all(index), self._mapping)

    def batch(self, index: torch.Tensor) -> torch.Tensor:
        """Copies of the images `index` (b,): (b, H, W, 3)."""
        index = self._of_all(index.to(self.device))
        found = self._images[index]
        self._tell(found.numel() + index.numel() * _PAGES_AROUND)
        return found

    def pixels(self, flat: torch.Tensor) -> torch.Tensor:
        """Colours (p, 3) of pixels numbered through all images of this selection, row by row; `flat` (p,) int64."""
        per_image = self._images.shape[1] * self._images.shape[2]
        if self._index is not None:
            flat = self._of_all(flat // per_image) * per_image + flat % per_image
        colours = self._images.reshape(-1, 3)
        if self._mapping is None or not self._mapping.is_large:
            return colours[flat]
        found = torch.empty(flat.numel(), 3, dtype=torch.uint8)
        for part, into in zip(flat.split(_PIXELS_AT_ONCE), found.split(_PIXELS_AT_ONCE), strict=True):
            torch.index_select(colours, 0, part, out=into)
            self._tell(part.numel() * _PAGES_AROUND)
        return found

    def split(self, size: int) -> Iterator[torch.Tensor]:
        """The images in order, at most `size` at a time."""
        for start in range(0, len(self), size):
            yield self.batch(torch.arange(start, min(start + size, len(self))))

    def tensor(self) -> torch.Tensor:
        """All images of the selection in memory."""
        return self.batch(torch.arange(len(self)))

    def to(self, device: torch.device) -> ImageStack:
        """The selection on `device`; on the CPU nothing is copied."""
        if device.type == self.device.type:
            return self
        images, first = torch.empty(self.shape, dtype=self.dtype, device=device), 0
        for chunk in self.split(64):  # into place: images and a copy of them may not fit a GPU
            images[first : first + len(chunk)] = chunk.to(device)
            first += len(chunk)
        return ImageStack(images)

    def digest(self) -> str:
        """SHA-256 over the images' own, in order."""
        digests = (hashlib.sha256(image.contiguous().numpy().data).digest() for image in self)
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def _of_all(self, index: torch.Tensor) -> torch.Tensor:
        return index if self._index is None else self._index.to(index.device)[index]

    def _tell(self, n_bytes: int) -> None:
        if self._mapping is not None:
            self._mapping.touched(n_bytes)


def decode_images(
    count: int,
    size: tuple[int, int],
    decode: Callable[[int], np.ndarray],
    key: str,
    meter: ProgressMeter | None = None,
    in_memory: int = IN_MEMORY,
) -> tuple[ImageStack, str]:
    """Decode `count` images on a pool of threads, or open what an earlier call left in the cache.

    Args:
        count: number of images.
        size: (width, height) of each.
        decode: index -> (height, width, 3) uint8; its errors pass through, the first in the order of the images.
        key: names the content (files, their sizes and times, what is done to them); part of the file's name.
        meter: shows the work; None = a bar of its own for many images.
        in_memory: bytes up to which the images are kept in memory and nothing is written.
    Returns:
        The stack and its `digest`.
    Raises:
        DatasetError: no room on the disk for the file.
    """
    shape = (count, size[1], size[0], 3)
    if np.prod(shape, dtype=np.int64) <= in_memory:
        images = np.empty(shape, np.uint8)
        digests = _decode(count, decode, lambda i, image: images.__setitem__(i, image), meter)
        return ImageStack(torch.from_numpy(images)), _joined(digests)
    path = cache_dir() / "images" / f"{key}.images"
    found = _open(path, shape)
    if found is None:
        _write(path, shape, decode, meter)
        found = _open(path, shape)
        assert found is not None
    return found


def _joined(digests: list[bytes]) -> str:
    return hashlib.sha256(b"".join(digests)).hexdigest()


def _decode(
    count: int,
    decode: Callable[[int], np.ndarray],
    store: Callable[[int, np.ndarray], None],
    meter: ProgressMeter | None,
) -> list[bytes]:
    """Decode and store every image; SHA-256 of each, in order."""

    def one(index: int) -> bytes:
        image = np.ascontiguousarray(decode(index))
        store(index, image)
        return hashlib.sha256(image.data).digest()

    meter = meter or make_progress(quiet=count < 500)
    digests = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool, meter.task("images", total=count) as task:
        for number, digest in enumerate(pool.map(one, range(count)), start=1):
            digests.append(digest)
            task.update(number)
    return digests


def _write(
    path: Path, shape: tuple[int, ...], decode: Callable[[int], np.ndarray], meter: ProgressMeter | None
) -> None:
    each, total = int(np.prod(shape[1:])), int(np.prod(shape, dtype=np.int64)) + _HEADER
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < total:
        raise DatasetError(
            f"{path.parent}: {total / 1e9:.1f} GB of decoded images do not fit, {free / 1e9:.1f} GB are free; "
            "make room, set PMF_CACHE_DIR to another disk, or reduce data.max_side"
        )
    with atomic_path(path) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            digests = _decode(
                shape[0],
                decode,
                lambda i, image: _write_all(descriptor, image.tobytes(), _HEADER + i * each),
                meter,
            )
            header = json.dumps({"shape": shape, "digest": _joined(digests)}).encode()
            _write_all(descriptor, header.ljust(_HEADER), 0)
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def _open(path: Path, shape: tuple[int, ...]) -> tuple[ImageStack, str] | None:
    """The stack in `path`; None without a whole file of this shape."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(_HEADER))
        whole = path.stat().st_size == int(np.prod(shape, dtype=np.int64)) + _HEADER
    except (OSError, ValueError):
        return None
    if not whole or tuple(header.get("shape", ())) != shape:
        return None
    mapping = _Mapping(path)
    return ImageStack(mapping.tensor(shape), mapping=mapping), str(header["digest"])
