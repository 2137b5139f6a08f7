"""A dataset seen from above: cameras with their frusta by split, sparse points, the scene's box and a scale bar.

Drawn with matplotlib's object interface, as the report's plots are: no display, no global state.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Polygon

from posemap_fast.data.box_fit import BoxOptions, up_direction, wild_cameras
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.files import atomic_path
from posemap_fast.geometry import Camera, SceneFrame

__all__ = ["check_picture", "draw_top_down", "floor_axes"]

_COLOURS = {"unlabelled": "#9ca3af", "train": "#2563eb", "val": "#d97706", "test": "#dc2626"}  # drawn in this order
_POINTS, _BOX = "#b8bec7", "#374151"
_FORMATS = (".png", ".svg", ".pdf")
_MAX_FRUSTA = 90  # in all; every n-th view of each split has one, every camera a dot
_MAX_POINTS = 20_000
_FRUSTUM_LENGTH = 0.055  # of the picture's longer side
_WIDTH, _MIN_HEIGHT, _MAX_HEIGHT = 8.0, 3.5, 9.0  # inches
_FARTHEST = 1e100  # world units between two cameras; squares of much more are infinite
_BOX_LIMIT = 3.0  # a box up to this many times as long as the cameras' and points' extent is shown whole


def floor_axes(c2w: np.ndarray, frame: SceneFrame | None) -> np.ndarray:
    """Two world directions (2, 3) that span the floor as seen from above, right and away on the page.

    Args:
        c2w: (n, 4, 4) poses; they say what is up.
        frame: its box is drawn upright where its axes allow; None = the cameras' widest extent to the right.
    """
    up = up_direction(c2w)
    if frame is not None:
        axes = frame.rotation.numpy()
        vertical = int(np.abs(axes @ up).argmax())
        sides = (frame.aabb[1] - frame.aabb[0]).numpy()
        wider = max((k for k in range(3) if k != vertical), key=lambda k: sides[k])
        first = axes[wider]
    else:
        centres = c2w[:, :3, 3] - c2w[:, :3, 3].mean(0)
        centres = centres - np.outer(centres @ up, up)
        first = np.linalg.eigh(centres.T @ centres + 1e-12 * np.eye(3))[1][:, 2]
    first = first - (first @ up) * up
    if np.linalg.norm(first) < 1e-6:  # all cameras in one place: any horizontal direction
        first = np.cross(up, np.eye(3)[np.abs(up).argmin()])
    first = first / np.linalg.norm(first)
    return np.stack([first, np.cross(up, first)])


def _box_outline(box: torch.Tensor, frame: SceneFrame, floor: np.ndarray) -> np.ndarray:
    """Convex outline (k, 2) on the page of a box (2, 3) in field units."""
    corners = torch.stack([box[[i, j, k], [0, 1, 2]] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    points = np.unique((frame.to_world(corners).numpy() @ floor.T).round(12), axis=0)
    halves = []
    for ordered in (points, points[::-1]):  # Andrew's monotone chain
        chain: list[np.ndarray] = []
        for point in ordered:
            while len(chain) > 1 and _turn(chain[-2], chain[-1], point) <= 0:
                chain.pop()
            chain.append(point)
        halves += chain[:-1]
    return np.array(halves)


def _turn(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    return float((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))


def _frusta(c2w: np.ndarray, cameras: Sequence[Camera], floor: np.ndarray, length: float) -> np.ndarray:
    """Outlines (n, 5, 2) of the viewing pyramids: the centre and the far corners, flattened to the floor."""
    outlines = []
    for pose, camera in zip(c2w, cameras, strict=True):
        corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * [camera.width, camera.height]
        local = np.column_stack([(corners - [camera.cx, camera.cy]) / [camera.fx, camera.fy], np.ones(4)])
        outlines.append(np.vstack([pose[:3, 3], pose[:3, 3] + length * local @ pose[:3, :3].T]) @ floor.T)
    return np.array(outlines)


def _sides(outline: np.ndarray) -> np.ndarray:
    """The triangle (3, 2) of a flattened pyramid: its apex and the two corners seen farthest apart from there."""
    corners = outline[1:] - outline[0]
    angles = np.angle(np.exp(1j * (np.arctan2(*corners.T[::-1]) - np.arctan2(*corners.mean(0)[::-1]))))
    return outline[[0, 1 + int(angles.argmin()), 1 + int(angles.argmax())]]


def _limits(content: np.ndarray, outline: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the picture: cameras and most points, and the box unless it is far larger."""
    low, high = content.min(0), content.max(0)
    if outline is not None and (np.ptp(outline, axis=0) <= _BOX_LIMIT * max((high - low).max(), 1e-12)).all():
        low, high = np.minimum(low, outline.min(0)), np.maximum(high, outline.max(0))
    margin = 0.05 * max(float((high - low).max()), 1e-9)
    return low - margin, high + margin


def _scale_bar(axes: Axes, low: np.ndarray, high: np.ndarray, unit: str) -> None:
    """A bar of 1, 2 or 5 times a power of ten, about a fifth of the width, below the picture."""
    wanted = 0.22 * (high[0] - low[0])
    power = 10.0 ** math.floor(math.log10(wanted))
    length = max(step * power for step in (1, 2, 5) if step * power <= wanted)
    y = low[1] - 0.025 * (high[1] - low[1])
    line = axes.plot([low[0], low[0] + length], [y, y], color=_BOX, linewidth=2.5, solid_capstyle="butt")[0]
    line.set_clip_on(False)
    axes.annotate(
        f"{length:g} {unit.removesuffix('s') if length == 1 else unit}",
        (low[0] + length, y),
        (6, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        annotation_clip=False,
    )


def _draw_cameras(
    axes: Axes,
    floor: np.ndarray,
    c2w: np.ndarray,
    cameras: Sequence[Camera],
    views: Sequence[int],
    look: tuple[str, float, int],
) -> None:
    """Dots of all cameras of one split, frusta of some; `look` is the colour, the frusta's length and their stride."""
    colour, length, stride = look
    some = views[::stride]
    outlines = _frusta(c2w[some], [cameras[view] for view in some], floor, length)
    triangles = [_sides(outline) for outline in outlines]
    fill = matplotlib.colors.to_rgba(colour, 0.13)
    axes.add_collection(PolyCollection(triangles, facecolors=[fill], edgecolors=colour, linewidths=0.5, zorder=3))
    axes.plot(*(c2w[list(views), :3, 3] @ floor.T).T, ".", color=colour, markersize=3.5, zorder=4)


def _legend(axes: Axes, splits: Mapping[str, Sequence[int]], n_points: int, box: str) -> None:
    handles = [
        Line2D([], [], color=_COLOURS[key], marker="o", linestyle="", label=f"{key} ({len(splits[key])})")
        for key in ("train", "val", "test", "unlabelled")
        if splits.get(key)
    ]
    if n_points:
        handles.append(Line2D([], [], color=_POINTS, marker=".", linestyle="", label=f"sparse points ({n_points})"))
    if box:
        handles.append(Line2D([], [], color=_BOX, linewidth=1.2, label=box))
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(0, -0.06), ncols=3, frameon=False, fontsize=9)


def _box_label(outline: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    is_whole = bool((outline >= low).all() and (outline <= high).all())
    return "box of the scene frame" if is_whole else "box of the scene frame (reaches beyond the picture)"


def _figure(low: np.ndarray, high: np.ndarray) -> tuple[Figure, Axes]:
    width, height = high - low
    inches = float(np.clip(_WIDTH * height / width, _MIN_HEIGHT, _MAX_HEIGHT))
    figure = Figure(figsize=(_WIDTH, inches + 1.2), dpi=150)
    axes = figure.add_axes((0.03, 0.95 / (inches + 1.2), 0.94, (inches - 0.1) / (inches + 1.2)))
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal", anchor="NW")
    axes.set_axis_off()
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    buffer = io.BytesIO()
    metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
    with matplotlib.rc_context({"svg.hashsalt": "posemap_fast"}):
        figure.savefig(buffer, format=path.suffix.lower()[1:], metadata=metadata)
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
    except OSError as error:
        raise DatasetError(f"{path}: cannot write the picture: {error.strerror}; choose another place") from error


def check_picture(path: str | Path) -> Path:
    """The path, whose suffix must be one that can be drawn.

    Raises:
        ConfigError: another kind of file.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(f"picture {path}: must end in {', '.join(_FORMATS)}; got '{path.suffix}'")
    return path


def draw_top_down(
    path: str | Path,
    c2w: torch.Tensor,
    cameras: Sequence[Camera],
    splits: Mapping[str, Sequence[int]],
    points: torch.Tensor | None = None,
    frame: SceneFrame | None = None,
    unit: str = "m",
    title: str = "",
) -> None:
    """Draw cameras, points and the scene's box from above; the same input gives the same bytes.

    Args:
        path: file to write, .png, .svg or .pdf.
        c2w: (n, 4, 4) camera-to-world; cameras absurdly far from the others are left out and counted in the title.
        cameras: n.
        splits: view indices under train, val, test, unlabelled.
        points: (p, 3) sparse points in the world.
        frame: its content box is drawn.
        unit: of the world.
        title: first line of the picture.
    Raises:
        ConfigError: another kind of file.
        DatasetError: the file cannot be written, or cameras lie absurdly far apart.
    """
    path = check_picture(path)
    poses = c2w.detach().double().cpu().numpy()
    is_far = wild_cameras(poses[:, :3, 3], BoxOptions().wild_factor)
    if not np.ptp(poses[~is_far, :3, 3], axis=0).max() < _FARTHEST:
        raise DatasetError(f"{path}: cannot draw camera centres that lie {_FARTHEST:g} {unit} apart; correct the poses")
    shown = {key: [view for view in splits.get(key, []) if not is_far[view]] for key in _COLOURS}
    floor = floor_axes(poses[~is_far], frame)
    flat = np.zeros((0, 2)) if points is None else points.double().numpy() @ floor.T
    centres = poses[~is_far, :3, 3] @ floor.T
    most = np.percentile(flat, [2, 98], axis=0) if len(flat) else centres
    outline = None if frame is None else _box_outline(frame.aabb, frame, floor)
    low, high = _limits(np.vstack([centres, most]), outline)
    figure, axes = _figure(low, high)
    inside = flat[((flat >= low) & (flat <= high)).all(axis=1)]
    axes.plot(*inside[:: max(1, len(inside) // _MAX_POINTS)].T, ".", color=_POINTS, markersize=1.6, zorder=1)
    if outline is not None:
        axes.add_patch(Polygon(outline, fill=False, edgecolor=_BOX, linewidth=1.2, zorder=2))
    length = _FRUSTUM_LENGTH * float((high - low).max())
    stride = -(-int((~is_far).sum()) // _MAX_FRUSTA)
    for key, colour in _COLOURS.items():
        if shown[key]:
            _draw_cameras(axes, floor, poses, cameras, shown[key], (colour, length, stride))
    _scale_bar(axes, low, high, unit)
    _legend(axes, shown, len(flat), "" if outline is None else _box_label(outline, low, high))
    left_out = f"; {int(is_far.sum())} camera(s) far off are not shown" if is_far.any() else ""
    axes.set_title(f"{title} from above{left_out}", loc="left", fontsize=10, pad=3)
    _save(figure, path)
