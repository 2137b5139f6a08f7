"""Mutated input of every parser: only `DatasetError`, in time, without memory that a file merely claims.

Each parser has a small valid dataset as its seed (`SEEDS`); the files it reads are damaged: bytes flipped, cut,
repeated or replaced, numbers made huge, NaN or text, lines dropped, doubled or swapped. A new
format adds one seed here.
"""

from __future__ import annotations

import random
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from posemap_fast.data import PARSERS, parse_capture
from posemap_fast.data.image_files import read_image
from posemap_fast.errors import ConfigError, DatasetError

Mutation = Callable[[bytes, random.Random], bytes]
WORST_TOKENS = (
    b"nan", b"inf", b"-inf", b"1e400", b"-1", b"0", b"1000000000000", b"18446744073709551615", b"1e-320", b"x", b"",
    b"../../../etc/passwd", b"/etc/passwd", b"\x00", b"null", b"[]", b"{}", b'"', b"\xff\xfe", b"a" * 5000, b"\xc2\xb2",
)  # fmt: skip
WORST_NUMBERS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 10**12, 2**63 - 1, 2**64 - 1)


def flip(data: bytes, rng: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 30))):
        if found:
            found[rng.randrange(len(found))] = rng.randrange(256)
    return bytes(found)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def remove(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.randrange(1, 40) :]


def repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    piece = data[start : start + rng.randrange(1, 200)]
    return data[:start] + piece * rng.choice((2, 3, 50)) + data[start:]


def swap_lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]
    return b"\n".join(lines)


def drop_or_double_line(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    return b"\n".join(lines[:at] + lines[at : at + 1] * rng.choice((0, 2)) + lines[at + 1 :])


def bad_token(data: bytes, rng: random.Random) -> bytes:
    """One word or number of a text becomes something else."""
    starts = [i for i in range(len(data)) if data[i : i + 1].isalnum() and not data[i - 1 : i].isalnum()]
    if not starts:
        return data
    start = rng.choice(starts)
    end = start
    while end < len(data) and data[end : end + 1] not in (b" ", b",", b"\n", b"]", b"}", b'"', b":"):
        end += 1
    return data[:start] + rng.choice(WORST_TOKENS) + data[end:]


def bad_integer(data: bytes, rng: random.Random) -> bytes:
    """A little-endian count or id of a binary file becomes something else."""
    width = rng.choice((4, 8))
    if len(data) < width:
        return data
    at = rng.randrange(len(data) - width + 1)
    value = rng.choice(WORST_NUMBERS) % (1 << (8 * width))
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


MUTATIONS: tuple[Mutation, ...] = (
    flip, cut, remove, repeat, swap_lines, drop_or_double_line, bad_token, bad_token, bad_integer,
)  # fmt: skip


def transforms_json_seed(folder: Path, capture_maker: Callable[..., Any]) -> list[Path]:
    capture = capture_maker(folder, n_views=4, width=8, height=6)
    capture.split = {"train": ["images/frame_0.jpg"], "test": ["images/frame_1.jpg"]}
    capture.content["frames"][2] |= {"fl_x": 30.0, "k1": 0.01, "camera_model": "OPENCV"}
    capture.content["applied_transform"] = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
    capture.write()
    np.savez(folder / "points.npz", xyz=np.zeros((3, 3)))
    return [folder / "transforms.json", folder / "split.json", folder / "points.npz"]


def _images(folder: Path, names: list[str], size: tuple[int, int] = (32, 24)) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), np.full((size[1], size[0], 3), 90, np.uint8))


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def seven_scenes_seed(folder: Path, _: Callable[..., Any]) -> list[Path]:
    names = [f"seq-0{sequence}/frame-00000{frame}.color.png" for sequence in (1, 2) for frame in (0, 1)]
    _images(folder, names)
    files = [_write(folder / "TrainSplit.txt", "sequence1\n"), _write(folder / "TestSplit.txt", "sequence2\n")]
    for name in names:
        matrix = "".join(f"{row}\n" for row in ("1 0 0 .5", "0 1 0 -2.5e-1", "0 0 1 3", "0 0 0 1"))
        files.append(_write(folder / name.replace("color.png", "pose.txt"), matrix))
    return files


def seven_scenes_sfm_seed(folder: Path, _: Callable[..., Any]) -> list[Path]:
    files = seven_scenes_seed(folder, _)[:2]
    for part, sequence in (("train", 1), ("test", 2)):
        lines = [f"seq-0{sequence}/frame-00000{frame}.color.png .8 0 .6 0 1 -2 3.25 525.5\n" for frame in (0, 1)]
        files.append(_write(folder / f"{folder.name}_{part}.txt", "".join(lines)))
    return files


def cambridge_seed(folder: Path, _: Callable[..., Any]) -> list[Path]:
    parts = {"train": ["seq1/frame00001.png", "seq1/frame00002.png"], "test": ["seq2/frame00003.png"]}
    files = []
    for part, names in parts.items():
        _images(folder, names, (64, 36))
        lines = [f"{name} 10.5 -2 1.5 .8 0 .6 0\n" for name in names]
        header = "Visual Landmark Dataset V1\nImageFile, Camera Position [X Y Z W P Q R]\n\n"
        files.append(_write(folder / f"dataset_{part}.txt", header + "".join(lines)))
    cameras = [f"{n.replace('png', 'jpg')}\t1670.5 1 0 0 0 9 9 9 -0.05 0\n" for names in parts.values() for n in names]
    nvm = f"NVM_V3 \n\n{len(cameras)}\n{''.join(cameras)}\n1\n1 2 3 0 0 0 1 0 0 5 5\n"
    return [*files, _write(folder / "reconstruction.nvm", nvm)]


def cambridge_converted_seed(folder: Path, _: Callable[..., Any]) -> list[Path]:
    files = []
    for part in ("train", "test"):
        _images(folder / part / "rgb", ["seq1_frame00001.png"], (64, 36))
        for kind, text in (("poses", "1 0 0 1\n0 1 0 2\n0 0 1 3\n0 0 0 1\n"), ("calibration", "744.5\n")):
            (folder / part / kind).mkdir()
            files.append(_write(folder / part / kind / "seq1_frame00001.txt", text))
    return files


def tum_seed(folder: Path, _: Callable[..., Any]) -> list[Path]:
    times = [1305031102.175304, 1305031102.211214, 1305031102.243211]
    _images(folder / "rgb", [f"{time:.6f}.png" for time in times])
    return [
        _write(folder / "rgb.txt", "# images\n" + "".join(f"{t:.6f} rgb/{t:.6f}.png\n" for t in times)),
        _write(folder / "groundtruth.txt", "# poses\n" + "".join(f"{t:.4f} 1 .5 -2 0 .6 0 .8\n" for t in times)),
        _write(folder / "calibration.txt", "525.0 525.5 16 12 .1 -.2 .001 0\n"),
    ]


def colmap_text_seed(folder: Path, _: Callable[..., Any]) -> list[Path]:
    _images(folder / "images", ["a.png", "b.png"])
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True)
    images = "# list\n1 .8 0 .6 0 1 2 3 1 a.png\n1.5 2.5 1 3 4 -1\n2 1 0 0 0 .5 0 0 2 b.png\n\n"
    return [
        _write(
            sparse / "cameras.txt",
            "# list\n1 OPENCV 32 24 30 31 16 12 .1 .01 0 0\n2 SIMPLE_RADIAL 32 24 30 16 12 .05\n",
        ),
        _write(sparse / "images.txt", images),
        _write(sparse / "points3D.txt", "# list\n1 .5 -1 4 200 100 50 .7 1 0\n2 1 1 5 1 2 3 .5 1 0 2 1\n"),
    ]


def colmap_binary_seed(folder: Path, _: Callable[..., Any]) -> list[Path]:
    _images(folder / "images", ["a.png", "b.png"])
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True)
    camera = struct.pack("<QiiQQ4d", 1, 1, 1, 32, 24, 30.0, 31.0, 16.0, 12.0)  # one PINHOLE
    images = struct.pack("<Q", 2)
    for number, name in ((1, b"a.png"), (2, b"b.png")):
        images += struct.pack("<i7di", number, 0.8, 0.0, 0.6, 0.0, 1.0, 2.0, 3.0, 1) + name + b"\0"
        images += struct.pack("<Qddq", 1, 1.5, 2.5, 1)
    points = struct.pack("<QQ3d3BdQii", 1, 1, 0.5, -1.0, 4.0, 200, 100, 50, 0.7, 1, 1, 0)
    files = []
    for name, content in (("cameras", camera), ("images", images), ("points3D", points)):
        files.append(sparse / f"{name}.bin")
        files[-1].write_bytes(content)
    return files


Seed = Callable[[Path, Callable[..., Any]], list[Path]]  # makes the dataset, returns the files to damage
SEEDS: dict[tuple[str, str], Seed] = {
    ("transforms_json", "folder"): transforms_json_seed,
    ("7scenes", "dslam"): seven_scenes_seed,
    ("7scenes", "sfm"): seven_scenes_sfm_seed,
    ("cambridge", "official"): cambridge_seed,
    ("cambridge", "converted"): cambridge_converted_seed,
    ("colmap", "text"): colmap_text_seed,
    ("colmap", "binary"): colmap_binary_seed,
    ("tum_rgbd", "folder"): tum_seed,
}
CASES_PER_SEED = 2500
LONGEST_S, MOST_BYTES, TRACE_EVERY = 2.0, 64 << 20, 8


def mutants(files: list[Path], cases: int, seed: str) -> Iterator[tuple[Path, bytes, bytes]]:
    """(file, its content, a mutant), `cases` times, the same on every call."""
    rng = random.Random(seed)
    contents = {path: path.read_bytes() for path in files}
    for _ in range(cases):
        path = rng.choice(files)
        data = contents[path]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            data = rng.choice(MUTATIONS)(data, rng)
        yield path, contents[path], data


def test_every_parser_has_a_seed() -> None:
    assert {parser for parser, _ in SEEDS} == set(PARSERS)
    assert len(SEEDS) * CASES_PER_SEED >= 20_000


def is_refused(root: Path, name: str, what: str) -> bool:
    """Whether the parser refuses the dataset at `root`; every other way than a good capture or a good error fails."""
    begin = time.monotonic()
    refused = False
    try:
        capture = parse_capture(root, name)
        assert all(frame.path.is_relative_to(root.resolve()) for frame in capture.frames)
        assert all(bool(frame.c2w.isfinite().all()) for frame in capture.frames)
    except DatasetError as error:
        refused = True
        assert "\n" not in str(error) and str(root.parent) in str(error), str(error)
    except ConfigError as error:
        pytest.fail(f"{what}: a damaged file is no wrong configuration: {error}")
    assert time.monotonic() - begin < LONGEST_S, what
    return refused


@pytest.mark.parametrize(("name", "kind"), sorted(SEEDS))
def test_mutated_datasets_load_or_are_refused_in_one_line(
    name: str, kind: str, tmp_path: Path, capture_maker: Callable[..., Any]
) -> None:
    root = tmp_path / "scene"
    files = SEEDS[name, kind](root, capture_maker)
    assert len(parse_capture(root, name).frames) > 0  # the seed itself is sound
    refused = 0
    for number, (path, original, mutant) in enumerate(mutants(files, CASES_PER_SEED, name + kind)):
        path.write_bytes(mutant)
        what = f"{path.name}: {mutant[:200]!r}"
        if number % TRACE_EVERY == 0:  # tracing allocations makes everything three times as slow
            tracemalloc.start()
        refused += is_refused(root, name, what)
        if tracemalloc.is_tracing():
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < MOST_BYTES, what
        path.write_bytes(original)
    assert refused > CASES_PER_SEED / 10
    shutil.rmtree(root)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_mutated_images_are_read_whole_or_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"image{suffix}"
    picture = cv2.resize(np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8), (32, 24))
    cv2.imwrite(str(path), picture)
    for _, _, mutant in mutants([path], CASES_PER_SEED // 2, suffix):
        path.write_bytes(mutant)
        begin = time.monotonic()
        try:
            image = read_image(path)
            assert image.dtype == np.uint8 and image.ndim == 3 and image.nbytes < MOST_BYTES
        except DatasetError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        assert time.monotonic() - begin < LONGEST_S
