"""Stacks of images: in memory or mapped from the cache, the same to whoever reads them; selections copy nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from posemap_fast.data.image_stack import ImageStack, decode_images
from posemap_fast.errors import DatasetError
from posemap_fast.progress import NoProgress

SIZE, COUNT = (20, 15), 37


def image(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (SIZE[1], SIZE[0], 3), np.uint8)


@pytest.fixture(params=["memory", "mapped"])
def stack(request: pytest.FixtureRequest, tmp_path, monkeypatch) -> ImageStack:
    monkeypatch.setenv("PMF_CACHE_DIR", str(tmp_path))
    limit = 1 << 30 if request.param == "memory" else 0
    return decode_images(COUNT, SIZE, image, "key", NoProgress(), in_memory=limit)[0]


@pytest.fixture
def plain() -> torch.Tensor:
    return torch.from_numpy(np.stack([image(i) for i in range(COUNT)]))


def test_every_way_of_reading_gives_the_images(stack, plain):
    assert (stack.shape, stack.dtype, len(stack)) == (plain.shape, torch.uint8, COUNT)
    index = torch.tensor([5, 0, 36, 5])
    assert torch.equal(stack[index], plain[index]) and torch.equal(stack[3], plain[3])
    assert torch.equal(stack[-1], plain[-1]) and torch.equal(stack.tensor(), plain)
    assert torch.equal(torch.cat(list(stack.split(8))), plain) and torch.equal(torch.stack(list(stack)), plain)
    flat = torch.randint(COUNT * 300, (500,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(stack.pixels(flat), plain.reshape(-1, 3)[flat])


def test_selections_of_selections_read_the_same(stack, plain):
    chosen = torch.tensor([30, 2, 2, 17, 9])
    part, reference = stack.select(chosen), plain[chosen]
    assert torch.equal(part.tensor(), reference) and torch.equal(part[1:4].tensor(), reference[1:4])
    assert torch.equal(part.select(torch.tensor([4, 0]))[torch.tensor([1])], reference[[0]])
    flat = torch.tensor([0, 299, 300, 5 * 300 - 1])
    assert torch.equal(part.pixels(flat), reference.reshape(-1, 3)[flat])
    assert len(stack[:0]) == 0 and stack[:0].tensor().shape == (0, 15, 20, 3)


def test_mapped_and_decoded_images_have_one_digest(tmp_path, monkeypatch, plain):
    monkeypatch.setenv("PMF_CACHE_DIR", str(tmp_path))
    found = [decode_images(COUNT, SIZE, image, "k", NoProgress(), in_memory=limit) for limit in (1 << 30, 0, 0)]
    assert len({digest for _, digest in found} | {stack.digest() for stack, _ in found}) == 1
    assert found[0][1] != ImageStack(plain.flip(0)).digest()


def test_second_call_reads_the_cache_and_a_damaged_file_is_made_again(tmp_path, monkeypatch, plain):
    monkeypatch.setenv("PMF_CACHE_DIR", str(tmp_path))
    calls = []

    def counting(index: int) -> np.ndarray:
        calls.append(index)
        return image(index)

    for _ in range(2):
        decode_images(COUNT, SIZE, counting, "k", NoProgress(), in_memory=0)
    assert sorted(calls) == list(range(COUNT))
    (path,) = tmp_path.rglob("*.images")
    for damaged in (path.read_bytes()[:-1], b"{}", b""):
        path.write_bytes(damaged)
        assert torch.equal(decode_images(COUNT, SIZE, image, "k", NoProgress(), in_memory=0)[0].tensor(), plain)


def test_an_error_while_decoding_passes_through_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("PMF_CACHE_DIR", str(tmp_path))

    def failing(index: int) -> np.ndarray:
        if index in (7, 20):
            raise DatasetError(f"image {index} is damaged; copy it again")
        return image(index)

    for limit in (0, 1 << 30):
        with pytest.raises(DatasetError, match="image 7 is damaged"):
            decode_images(COUNT, SIZE, failing, "k", NoProgress(), in_memory=limit)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_pages_are_given_back_while_reading(tmp_path, monkeypatch):
    monkeypatch.setenv("PMF_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("posemap_fast.data.image_stack._STAYS", 1 << 20)
    monkeypatch.setattr("posemap_fast.data.image_stack._RELEASE_AFTER", 1 << 20)
    size = (512, 512)
    whole = np.zeros((512, 512, 3), np.uint8)
    stack, _ = decode_images(64, size, lambda i: whole + np.uint8(i), "k", NoProgress(), in_memory=0)

    def resident() -> int:
        lines = Path("/proc/self/smaps").read_text().split("\n")
        at = next(i for i, line in enumerate(lines) if line.endswith(".images"))
        return int(next(line for line in lines[at:] if line.startswith("Rss:")).split()[1]) << 10

    most = 0
    for index in range(64):
        assert int(stack[index][0, 0, 0]) == index
        assert int(stack.pixels(torch.tensor([index * 512 * 512 + 7]))[0, 1]) == index
        most = max(most, resident())
    assert most < 8 << 20  # of 48 MiB


def test_no_room_on_the_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PMF_CACHE_DIR", str(tmp_path))
    with pytest.raises(DatasetError, match=r"images do not fit.*PMF_CACHE_DIR"):
        decode_images(1 << 40, (1000, 1000), image, "k", NoProgress(), in_memory=0)
