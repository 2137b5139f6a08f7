"""Frames of a video, or photos of a folder: which of them a reconstruction needs, written as JPEG files.

A window of the recording begins where the view has moved by a step (median displacement of tracked corners, as a
share of the longer image side) since the window's first frame, so a standing camera stays in one window and a fast
one opens many. Each window gives its sharpest frame. Frames are BGR arrays here, as OpenCV has them.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from posemap_fast.data.capture import natural_order
from posemap_fast.data.image_files import read_image
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.progress import NoProgress, ProgressMeter

__all__ = ["FrameChoice", "FrameSource", "PhotoFolder", "Video", "choose_frames", "open_frames", "write_frames"]

STEPS = (0.04, 0.015, 0.005)  # of the longer side: a window's extent; a finer one where there are too few windows
JPEG_QUALITY = 95
LEAST_FRAMES = 3
_SCORE_SIDE = 480  # px; frames are scored at this size
_MAX_PIXELS = 1 << 26  # per frame; 8K video has 2^25
_PHOTOS = (".jpg", ".jpeg", ".png")
_LEAST_CORNERS = 12
_LOST = 1 / 3  # share of the corners below which the view counts as another one
_FLAT = 0.02  # share of the median sharpness below which a window shows nothing: a black or blank picture


@dataclass(frozen=True)
class FrameChoice:
    """How many frames are taken.

    Raises:
        ConfigError: fewer than 3, or the least above the most.
    """

    min_frames: int = 60  # finer steps are taken to reach it, as far as the camera moves at all
    max_frames: int = 150

    def __post_init__(self) -> None:
        if not LEAST_FRAMES <= self.min_frames <= self.max_frames:
            raise ConfigError(
                f"frames: {LEAST_FRAMES} <= least <= most is needed; got {self.min_frames} and {self.max_frames}"
            )


class FrameSource(Protocol):
    """A recording that can be gone through from the start."""

    path: Path
    n_expected: int  # number of frames as the file says it; 0 when it does not

    def name(self, index: int) -> str:
        """File name for frame `index`; natural order of the names is the order of the frames."""

    def frames(self, wanted: Sequence[int] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """(index, (H, W, 3) uint8 BGR) of all frames, or of the ascending `wanted` ones."""

    def fingerprint(self) -> str:
        """What tells this recording from another."""


class Video:
    """A video file, decoded by OpenCV and turned upright as its orientation tag says.

    Raises:
        DatasetError: no file, or none that can be decoded.
    """

    def __init__(self, path: Path):
        self.path = path
        capture = self._open()
        count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.n_expected = int(count) if 0 < count < 1e8 else 0
        capture.release()

    def _defect(self, finding: str) -> DatasetError:
        mend = f'convert it: ffmpeg -i "{self.path}" -c:v libx264 -crf 18 -pix_fmt yuv420p converted.mp4'
        return DatasetError(f"{self.path}: {finding}; {mend}")

    def _open(self) -> cv2.VideoCapture:
        try:
            capture = cv2.VideoCapture(str(self.path))
        except cv2.error as error:
            raise self._defect(f"no video that can be decoded here ({error.err})") from error
        if not capture.isOpened():
            raise self._defect("no video that can be decoded here")
        width, height = (capture.get(key) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if width * height > _MAX_PIXELS:
            raise self._defect(f"frames of {width:.0f}x{height:.0f} pixels are too large")
        capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        return capture

    def name(self, index: int) -> str:
        """frame_000042.jpg for frame 42 of the video."""
        return f"frame_{index:06d}.jpg"

    def frames(self, wanted: Sequence[int] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Decode in order; a video that cannot seek is no problem. Ends at the first frame that does not decode."""
        capture = self._open()
        pending, index = None if wanted is None else list(reversed(wanted)), 0
        try:
            while pending is None or pending:
                if not capture.grab():
                    return
                if pending is None or pending[-1] == index:
                    is_whole, frame = capture.retrieve()
                    if not is_whole or frame is None or frame.ndim != 3:
                        return
                    yield index, frame
                    if pending is not None:
                        pending.pop()
                index += 1
        except cv2.error as error:
            raise self._defect(f"frame {index} does not decode ({error.err})") from error
        finally:
            capture.release()

    def fingerprint(self) -> str:
        """Of the size and of the first and last MiB."""
        size = self.path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with self.path.open("rb") as file:
            for start in (0, max(0, size - (1 << 20))):
                file.seek(start)
                digest.update(file.read(1 << 20))
        return digest.hexdigest()


class PhotoFolder:
    """The JPEG and PNG files of one folder, in natural order of their names; orientation tags are ignored.

    Raises:
        DatasetError: too few photos, or two that would get one name.
    """

    def __init__(self, path: Path):
        self.path = path
        found = (file for file in path.iterdir() if file.suffix.lower() in _PHOTOS and file.is_file())
        self.files = sorted(found, key=lambda file: natural_order(file.name))
        self.n_expected = len(self.files)
        if len(self.files) < LEAST_FRAMES:
            raise DatasetError(
                f"{path}: {len(self.files)} JPEG or PNG files here, {LEAST_FRAMES} are the least; give a folder of "
                "photos (convert other formats to JPEG) or a video"
            )
        names: dict[str, Path] = {}
        for index, file in enumerate(self.files):
            other = names.setdefault(self.name(index), file)
            if other is not file:
                raise DatasetError(
                    f"{file}: would be written as {self.name(index)}, like {other.name}; rename or remove one"
                )

    def name(self, index: int) -> str:
        """The photo's own name with the suffix .jpg, and _ for what COLMAP's lists of names cannot hold."""
        return re.sub(r"[^\w.-]+", "_", self.files[index].stem) + ".jpg"

    def frames(self, wanted: Sequence[int] | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Read the photos one by one.

        Raises:
            DatasetError: a damaged photo.
        """
        for index in range(len(self.files)) if wanted is None else wanted:
            yield index, cv2.cvtColor(read_image(self.files[index]), cv2.COLOR_RGB2BGR)

    def fingerprint(self) -> str:
        """Of all names and sizes."""
        return hashlib.sha256(repr([(f.name, f.stat().st_size) for f in self.files]).encode()).hexdigest()


def open_frames(path: Path) -> Video | PhotoFolder:
    """The recording at `path`: a folder of photos or a video file.

    Raises:
        DatasetError: neither.
    """
    if path.is_dir():
        return PhotoFolder(path)
    if not path.is_file():
        raise DatasetError(f"{path}: no such file or folder; give a video or a folder of photos")
    if path.suffix.lower() in _PHOTOS:
        raise DatasetError(f"{path}: is a single image; give a video or the folder with all photos")
    return Video(path)


def _corners(grey: np.ndarray) -> np.ndarray:
    """(n, 1, 2) float32 corners worth tracking; n may be 0."""
    found = cv2.goodFeaturesToTrack(grey, 200, 0.01, 8)
    return np.zeros((0, 1, 2), np.float32) if found is None else found


class _Motion:
    """Numbers the frames: the whole part is the window, the rest how much of the step was made since its start."""

    def __init__(self, step: float):
        self._step, self._window = step, -1
        self._reference: np.ndarray | None = None
        self._corners = _corners(np.zeros((8, 8), np.uint8))

    def position(self, grey: np.ndarray) -> float:
        moved = math.inf if self._reference is None else self._displacement(self._reference, grey)
        if moved < self._step:
            return self._window + moved / self._step
        self._window, self._reference, self._corners = self._window + 1, grey, _corners(grey)
        return float(self._window)

    def _displacement(self, reference: np.ndarray, grey: np.ndarray) -> float:
        """Median displacement since the reference, share of the longer side; inf for another view."""
        if reference.shape != grey.shape:
            return math.inf
        if len(self._corners) < _LEAST_CORNERS:  # a flat picture lasts until one with texture comes
            return math.inf if len(_corners(grey)) >= _LEAST_CORNERS else 0.0
        empty = np.empty_like(self._corners)
        there, found, _ = cv2.calcOpticalFlowPyrLK(reference, grey, self._corners, empty)
        back, found_back, _ = cv2.calcOpticalFlowPyrLK(grey, reference, there, empty.copy())
        error = np.linalg.norm(back - self._corners, axis=-1)
        is_kept = (found == 1) & (found_back == 1) & (error < 1.0)
        if is_kept.mean() < _LOST:
            return math.inf
        return float(np.median(np.linalg.norm(there - self._corners, axis=-1)[is_kept])) / max(grey.shape)


def _small_grey(frame: np.ndarray) -> np.ndarray:
    grey, scale = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), _SCORE_SIDE / max(frame.shape[:2])
    return grey if scale >= 1 else cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)


def _sharpest(sharpness: np.ndarray, position: np.ndarray, n_chosen: int) -> list[int]:
    """The sharpest frame of each of `n_chosen` runs of windows, but none of the windows that show nothing.

    Only the first half of a run's motion is looked at, so that half of it lies at least between two chosen frames.
    """
    edges = np.linspace(0, int(position[-1]) + 1, n_chosen + 1).round()
    chosen = []
    for start, end in itertools.pairwise(edges):
        candidates = np.flatnonzero((position >= start) & (position <= start + (end - start) / 2))
        chosen.append(int(candidates[sharpness[candidates].argmax()]))
    floor = _FLAT * float(np.median(sharpness[chosen]))
    return [index for index in chosen if sharpness[index] >= floor]


def _score(source: FrameSource, step: float, meter: ProgressMeter) -> tuple[np.ndarray, np.ndarray]:
    """(n,) sharpness (variance of the Laplacian) and (n,) position (see `_Motion`) of all frames.

    Raises:
        DatasetError: nothing decodes.
    """
    sharpness, position, motion = array("f"), array("d"), _Motion(step)
    with meter.task(f"looking at frames, step {step:.1%}", total=source.n_expected) as task:
        for index, frame in source.frames():
            grey = _small_grey(frame)
            sharpness.append(cv2.Laplacian(grey, cv2.CV_32F).var())
            position.append(motion.position(grey))
            task.update(index + 1, windows=float(int(position[-1]) + 1))
    if not sharpness:
        raise DatasetError(f"{source.path}: not one frame decodes; copy the file again, or convert it with ffmpeg")
    return np.array(sharpness), np.array(position)


def choose_frames(source: FrameSource, choice: FrameChoice, meter: ProgressMeter | None = None) -> list[int]:
    """Indices of the frames to reconstruct from, ascending; all photos of a folder that has few enough.

    One to three passes over all frames; memory grows by 12 bytes per frame.

    Raises:
        DatasetError: nothing decodes, or the camera hardly moves.
    """
    if isinstance(source, PhotoFolder) and source.n_expected <= choice.max_frames:
        return list(range(source.n_expected))
    for step in STEPS:
        sharpness, position = _score(source, step, meter or NoProgress())
        n_windows = int(position[-1]) + 1
        if n_windows >= choice.min_frames:
            break
    most = choice.max_frames if step == STEPS[0] else choice.min_frames
    chosen = _sharpest(sharpness, position, min(most, n_windows))
    if len(chosen) < LEAST_FRAMES:
        raise DatasetError(
            f"{source.path}: the camera hardly moves: {len(chosen)} distinct view(s) in {len(sharpness)} frames; "
            "walk around the place while filming"
        )
    return chosen


def write_frames(
    source: FrameSource,
    indices: Sequence[int],
    folder: Path,
    max_side: int | None = None,
    meter: ProgressMeter | None = None,
) -> dict[str, tuple[int, int]]:
    """Write frames as JPEG files.

    Args:
        source: recording.
        indices: ascending frame indices.
        folder: an existing folder.
        max_side: limit of the longer side in pixels; reduced with area averaging.
    Returns:
        file name -> (width, height), in order.
    Raises:
        DatasetError: a frame that was there when they were chosen does not decode now.
    """
    sizes: dict[str, tuple[int, int]] = {}
    with (meter or NoProgress()).task("writing frames", total=len(indices)) as task:
        for index, frame in source.frames(indices):
            scale = 1.0 if max_side is None else min(1.0, max_side / max(frame.shape[:2]))
            if scale < 1:
                size = tuple(max(1, round(side * scale)) for side in frame.shape[1::-1])
                frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
            is_done, data = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
            assert is_done
            (folder / source.name(index)).write_bytes(data.tobytes())
            sizes[source.name(index)] = (frame.shape[1], frame.shape[0])
            task.update(len(sizes))
    if len(sizes) != len(indices):
        raise DatasetError(
            f"{source.path}: {len(indices) - len(sizes)} chosen frame(s) no longer decode; copy it again"
        )
    return sizes
