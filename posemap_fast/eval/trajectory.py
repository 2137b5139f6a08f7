"""Pose files: TUM lines and named lines; matching a prediction with the truth and scoring it.

Formats (one pose per line, camera-to-world, metres; `#` starts a comment; a `.gz` file is read as it is):
    TUM    timestamp tx ty tz qx qy qz qw     the scalar part of the quaternion is LAST
    named  name      x  y  z  qw qx qy qz     the scalar part is FIRST
A file whose first columns are all numbers is TUM, otherwise named.
"""

from __future__ import annotations

import dataclasses
import difflib
import gzip
import logging
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from posemap_fast.checks import expect_shape
from posemap_fast.errors import DatasetError
from posemap_fast.eval.metrics import pose_errors, summarize
from posemap_fast.files import write_text
from posemap_fast.geometry import make_c2w, matrix_from_quaternion, quaternion_from_matrix

__all__ = ["Trajectory", "evaluate_files", "evaluate_folders", "read_trajectory", "write_named", "write_tum"]

_N_COLUMNS = 8
_NORM_RANGE = (0.5, 2.0)  # published files have norms up to 1.05; far outside, the columns are not a quaternion
_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Poses as read from a file.

    Attributes:
        path: where they were read.
        layout: "tum" or "named".
        keys: n names, or timestamps in a normal form (seconds to the microsecond).
        lines: n line numbers, from 1.
        c2w: (n, 4, 4) float64; NaN entries where the file says so (a missing answer).
    """

    path: Path
    layout: Literal["tum", "named"]
    keys: tuple[str, ...]
    lines: tuple[int, ...]
    c2w: torch.Tensor


def write_tum(path: str | Path, c2w: torch.Tensor, timestamps: Sequence[float] | None = None) -> None:
    """Write poses (n, 4, 4) as TUM lines, atomically; a timestamp is the index unless given. NaN poses stay NaN."""
    expect_shape("write_tum", "c2w", c2w, (None, 4, 4))
    stamps = range(c2w.shape[0]) if timestamps is None else timestamps
    rows = zip(stamps, *_centres_and_quaternions(c2w), strict=True)
    lines = [f"{stamp:.6f} {_numbers(centre)} {_numbers([*q[1:], q[0]])}\n" for stamp, centre, q in rows]
    write_text(path, "# timestamp tx ty tz qx qy qz qw\n" + "".join(lines))


def write_named(path: str | Path, names: Sequence[str], c2w: torch.Tensor) -> None:
    """Write poses (n, 4, 4) as lines "name x y z qw qx qy qz", atomically."""
    expect_shape("write_named", "c2w", c2w, (len(names), 4, 4))
    for name in names:
        if len(name.split()) != 1:
            raise DatasetError(f"{path}: the name {name!r} is empty or has spaces, which a line cannot hold; rename it")
    rows = zip(names, *_centres_and_quaternions(c2w), strict=True)
    write_text(path, "".join(f"{name} {_numbers(centre)} {_numbers(q)}\n" for name, centre, q in rows))


def read_trajectory(path: str | Path) -> Trajectory:
    """Read a TUM or named pose file; quaternions are normalised.

    Raises:
        DatasetError: missing or empty file, wrong number of columns, not a number, zero or absurd quaternion,
            the same name or timestamp twice; with file and line.
    """
    path = Path(path)
    rows = [(number, line.split()) for number, line in enumerate(_read_lines(path), 1) if _has_content(line)]
    if not rows:
        raise DatasetError(f"{path}: holds no pose; expected lines 'timestamp tx ty tz qx qy qz qw'")
    for number, columns in rows:
        if len(columns) != _N_COLUMNS:
            raise DatasetError(
                f"{path}:{number}: must have {_N_COLUMNS} columns (timestamp tx ty tz qx qy qz qw, or "
                f"name x y z qw qx qy qz); got {len(columns)}"
            )
    is_tum = all(_is_number(columns[0]) for _, columns in rows)
    keys = [f"{float(columns[0]):.6f}" if is_tum else columns[0] for _, columns in rows]
    _check_unique(path, keys, [number for number, _ in rows])
    values = torch.tensor([_parse_pose(path, number, columns, is_tum) for number, columns in rows], dtype=torch.float64)
    c2w = make_c2w(matrix_from_quaternion(values[:, 3:]), values[:, :3])
    c2w[~torch.isfinite(values).all(dim=1)] = math.nan
    layout: Literal["tum", "named"] = "tum" if is_tum else "named"
    return Trajectory(path, layout, tuple(keys), tuple(number for number, _ in rows), c2w)


def evaluate_files(pred: str | Path, gt: str | Path) -> dict[str, Any]:
    """Score the poses of one file against the truth in another, matched by name or timestamp.

    A view that the prediction lacks, or answers with NaN, counts as infinitely wrong. Predictions for views that
    are not in the truth cannot be scored: they are left out, with a warning and the count `n_unmatched`.

    Returns:
        `summarize`'s keys, and "n_missing", "n_unmatched".
    Raises:
        DatasetError: a file is damaged, the truth has a NaN pose, or nothing matches.
    """
    answers, truth = read_trajectory(pred), read_trajectory(gt)
    for number, pose in zip(truth.lines, truth.c2w, strict=True):
        if not bool(torch.isfinite(pose).all()):
            raise DatasetError(f"{truth.path}:{number}: the true pose has NaN or infinite values; remove the line")
    index = {key: i for i, key in enumerate(answers.keys)}
    unmatched = sorted(set(answers.keys) - set(truth.keys), key=index.__getitem__)
    if len(unmatched) == len(answers.keys):
        raise DatasetError(_no_match_message(answers, truth))
    if unmatched:
        first = index[unmatched[0]]
        _LOG.warning(
            "%s:%d: '%s' is not in %s; %d predictions without truth are left out",
            *(answers.path, answers.lines[first], unmatched[0], truth.path, len(unmatched)),
        )
    nowhere = torch.full((4, 4), math.nan, dtype=torch.float64)
    matched = torch.stack([answers.c2w[index[key]] if key in index else nowhere for key in truth.keys])
    t_err, r_err = pose_errors(matched, truth.c2w)
    return {**summarize(t_err, r_err), "n_missing": int(torch.isinf(t_err).sum()), "n_unmatched": len(unmatched)}


def evaluate_folders(pred: str | Path, gt: str | Path) -> list[dict[str, Any]]:
    """Score every file of a folder of predictions against the file of the same name in a folder of truths.

    A final `.gz` does not count as part of the name. Predictions of which there is no truth are left out, with a
    warning.

    Returns:
        One dict per scene in the order of the names: "scene" (the name without suffixes) and `evaluate_files`'s keys.
    Raises:
        DatasetError: a folder without files, a truth without predictions, or what `evaluate_files` raises.
    """
    answers, truths = _pose_files(Path(pred)), _pose_files(Path(gt))
    missing = [name for name in truths if name not in answers]
    if missing:
        near = difflib.get_close_matches(missing[0], answers, n=1)
        hint = f"rename '{near[0]}'" if near else "add it, or remove the truth"
        raise DatasetError(f"{pred}: has no '{missing[0]}' for {truths[missing[0]]}; {hint}")
    for name in sorted(set(answers) - set(truths)):
        _LOG.warning("%s: is left out, there is no such file in %s", answers[name], gt)
    return [{"scene": Path(name).stem, **evaluate_files(answers[name], path)} for name, path in sorted(truths.items())]


def _pose_files(folder: Path) -> dict[str, Path]:
    """Name without `.gz` -> file, of the visible files of a folder."""
    try:
        found = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise DatasetError(f"{folder}: cannot list this folder: {error.strerror}; check the path") from error
    if not found:
        raise DatasetError(f"{folder}: holds no file; expected one file of poses per scene")
    files: dict[str, Path] = {}
    for path in found:
        name = path.name.removesuffix(".gz")
        if name in files:
            raise DatasetError(f"{path}: is there a second time as {files[name].name}; keep one of them")
        files[name] = path
    return files


def _read_lines(path: Path) -> list[str]:
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8").splitlines()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DatasetError(f"{path}: this gzip file is damaged: {error}; copy it again") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot read this pose file: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: not a text file (byte {error.start}); expected lines of poses") from error


def _has_content(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _check_unique(path: Path, keys: Sequence[str], lines: Sequence[int]) -> None:
    seen: dict[str, int] = {}
    for key, number in zip(keys, lines, strict=True):
        if key in seen:
            raise DatasetError(f"{path}:{number}: '{key}' was given before, in line {seen[key]}; keep one of them")
        seen[key] = number


def _parse_pose(path: Path, number: int, columns: Sequence[str], is_tum: bool) -> list[float]:
    """Centre and quaternion (w, x, y, z) of one line; NaN passes, nonsense does not."""
    values = []
    for text in columns[1:]:
        try:
            values.append(float(text))
        except ValueError:
            raise DatasetError(f"{path}:{number}: '{text}' is not a number") from None
    quaternion = [values[6], *values[3:6]] if is_tum else values[3:]
    norm = math.hypot(*quaternion)
    if math.isfinite(norm) and not _NORM_RANGE[0] <= norm <= _NORM_RANGE[1]:
        raise DatasetError(
            f"{path}:{number}: quaternion has norm {norm:.4g}, expected 1; check the order of the columns"
        )
    return [*values[:3], *quaternion]


def _no_match_message(answers: Trajectory, truth: Trajectory) -> str:
    """Why no prediction has a truth, with the nearest key of the first."""
    if answers.layout != truth.layout:
        what = {"tum": "timestamps", "named": "names"}
        mend = f"it has {what[answers.layout]}, the other {what[truth.layout]}; write both files in one format"
    else:
        near = difflib.get_close_matches(answers.keys[0], truth.keys, n=1)
        mend = f"did you mean '{near[0]}'?" if near else f"its first is '{truth.keys[0]}'"
    place = f"{answers.path}:{answers.lines[0]}"
    return f"{place}: no pose of this file has its truth in {truth.path}: '{answers.keys[0]}' is not there; {mend}"


def _centres_and_quaternions(c2w: torch.Tensor) -> tuple[list[list[float]], list[list[float]]]:
    poses = c2w.detach().double().cpu()
    return poses[:, :3, 3].tolist(), quaternion_from_matrix(poses[:, :3, :3]).tolist()


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.9f}" for value in values)
