"""Files of whitespace-separated numbers, one pose per line or one 4x4 matrix per file: what 7-Scenes, Cambridge
Landmarks and TUM RGB-D have in common.

A table may be gzipped (`.gz`); `#` starts a comment line. Every defect is one line that names the file, the line, the
value and the mend.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from posemap_fast.data.capture import inside, natural_order
from posemap_fast.errors import DatasetError
from posemap_fast.geometry import matrix_from_quaternion, nearest_rotation, rigid_defect

__all__ = [
    "NO_POSE",
    "PoseTable",
    "Row",
    "check_focal",
    "existing_file",
    "list_files",
    "parse_numbers",
    "read_matrix",
    "read_pose_table",
    "read_rows",
    "rotations",
    "unique_names",
    "valid_pose",
]

MAX_BYTES = 1 << 25  # of one table, unpacked; the largest known one (TUM ground truth, minutes at 100 Hz) has 3 MB
NORM_RANGE = (0.5, 2.0)  # published quaternions have norms up to 1.05; far outside, the columns are no quaternion
FOCAL_RANGE = (1.0, 1e6)  # pixels
MAX_VALUE = 1e15  # of a number in a table; GreatCourt has a camera at 3.1e9 m
NO_POSE = "no valid pose (NaN, infinite or not rigid: tracking was lost)"


@dataclass(frozen=True)
class Row:
    """One line with content."""

    where: str  # "file: line 7", for errors
    number: int  # from 1
    columns: list[str]


@dataclass(frozen=True)
class PoseTable:
    """Lines of one name and finite numbers."""

    where: list[str]  # "file: line 7" for each
    names: list[str]  # the first column
    values: torch.Tensor  # (n, columns - 1) float64


def existing_file(root: Path, name: str, where: str) -> Path:
    """`root / name`, an ordinary file that does not lie outside `root`.

    Raises:
        DatasetError: it is missing, no file, or outside; the message starts with `where`.
    """
    path = inside(root, name, where)
    if not _is_file(path):
        raise DatasetError(f"{where}: {path} does not exist; restore the file or remove the frame")
    return path


def list_files(root: Path, folder: str, suffix: str | tuple[str, ...]) -> list[str]:
    """Names below `root` ("folder/file") of what ends in `suffix` in `root / folder`, in natural order.

    Raises:
        DatasetError: the folder cannot be read.
    """
    path = inside(root, folder, str(root))
    try:
        found = [f"{folder}/{entry.name}" for entry in path.iterdir() if entry.name.endswith(suffix)]
    except OSError as error:
        raise DatasetError(f"{path}: cannot list this folder: {error.strerror}; unpack or restore it") from error
    return sorted(found, key=natural_order)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name longer than the system allows
        return False


def _unpacked(path: Path) -> bytes:
    """At most MAX_BYTES + 1 bytes of content."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def read_rows(path: Path) -> list[Row]:
    """The lines of a text file, split at white space, without empty and comment lines.

    Raises:
        DatasetError: missing, not a file, damaged, not text, or larger than any such table.
    """
    if not _is_file(path):
        raise DatasetError(f"{path}: does not exist or is no file; restore it")
    try:
        data = _unpacked(path)
        if len(data) > MAX_BYTES:
            raise DatasetError(f"{path}: holds more than {MAX_BYTES >> 20} MiB, no table of poses does; name another")
        lines = data.decode("utf-8-sig").split("\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DatasetError(f"{path}: this gzip file is damaged ({error}); copy it again") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot read: {error.strerror}; check the file") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not a text file ({error.reason} at byte {error.start}); copy it again") from error
    rows = (Row(f"{path}: line {n}", n, line.split()) for n, line in enumerate(lines, start=1))
    return [row for row in rows if row.columns and not row.columns[0].startswith("#")]


def parse_numbers(where: str, columns: Sequence[str]) -> list[float]:
    """Numbers of some columns; the Windows spellings `-1.#IND`, `1.#INF` and their like are NaN.

    Raises:
        DatasetError: one is no number; the message starts with `where`.
    """
    values = []
    for text in columns:
        try:
            values.append(math.nan if ".#" in text else float(text))
        except ValueError:
            raise DatasetError(f"{where}: {text[:40]!r} is not a number; correct or remove it") from None
    return values


def read_matrix(path: Path) -> torch.Tensor:
    """The 4x4 matrix (float64) of a file with 16 numbers, row by row, as it is: maybe NaN or not rigid.

    Raises:
        DatasetError: unreadable, or not 16 numbers.
    """
    values = [value for row in read_rows(path) for value in parse_numbers(row.where, row.columns)]
    if len(values) != 16:
        raise DatasetError(f"{path}: must hold 4 rows of 4 numbers; got {len(values)}; restore the file")
    return torch.tensor(values, dtype=torch.float64).reshape(4, 4)


def valid_pose(c2w: torch.Tensor) -> torch.Tensor | None:
    """The pose with its nearest rotation; None for what no camera can have (see NO_POSE)."""
    if not bool((c2w.abs() <= MAX_VALUE).all()) or rigid_defect(c2w) is not None:
        return None
    c2w = c2w.clone()
    c2w[:3, :3] = nearest_rotation(c2w[:3, :3])
    c2w[3] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    return c2w


def read_pose_table(path: Path, layout: str, is_header: Callable[[Row], bool] = lambda row: False) -> PoseTable:
    """Read lines of one name and numbers.

    Args:
        path: text or gzipped text.
        layout: names of the columns, for counting and for messages.
        is_header: which lines to pass over.
    Raises:
        DatasetError: unreadable, no line, a wrong number of columns, a value that cannot be.
    """
    rows = [row for row in read_rows(path) if not is_header(row)]
    if not rows:
        raise DatasetError(f"{path}: holds no pose; expected lines '{layout}'")
    n_columns = len(layout.split())
    values = []
    for row in rows:
        if len(row.columns) != n_columns:
            raise DatasetError(
                f"{row.where}: must have the {n_columns} columns '{layout}'; got {len(row.columns)}; correct the line"
            )
        numbers = parse_numbers(row.where, row.columns[1:])
        if not all(abs(value) <= MAX_VALUE for value in numbers):
            raise DatasetError(f"{row.where}: has NaN, infinite or absurd values; correct or remove the line")
        values.append(numbers)
    return PoseTable(
        [row.where for row in rows], [row.columns[0] for row in rows], torch.tensor(values, dtype=torch.float64)
    )


def rotations(table: PoseTable, quaternions: torch.Tensor) -> torch.Tensor:
    """Rotation matrices (n, 3, 3) of the (w, x, y, z) quaternions of a table, normalised first.

    Raises:
        DatasetError: a norm far from 1, with file and line.
    """
    norms = quaternions.norm(dim=1)
    wrong = ((norms < NORM_RANGE[0]) | (norms > NORM_RANGE[1])).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise DatasetError(
            f"{table.where[first]}: quaternion has norm {norms[first]:.4g}, expected 1; check the order of the columns"
        )
    return matrix_from_quaternion(quaternions)


def check_focal(where: str, value: float) -> float:
    """`value`, a focal length in pixels.

    Raises:
        DatasetError: it cannot be one.
    """
    if not FOCAL_RANGE[0] <= value <= FOCAL_RANGE[1]:
        raise DatasetError(f"{where}: focal length must lie in {FOCAL_RANGE} pixels; got {value:.6g}; correct it")
    return value


def unique_names(table: PoseTable) -> list[str]:
    """The first column as paths in their shortest spelling ("./a" is "a").

    Raises:
        DatasetError: one is there twice.
    """
    seen: dict[str, str] = {}
    for where, text in zip(table.where, table.names, strict=True):
        name = PurePosixPath(text).as_posix()
        if name in seen:
            line = seen[name].rpartition(" ")[2]
            raise DatasetError(f"{where}: '{name}' was given before, in line {line}; keep one of them")
        seen[name] = where
    return list(seen)
