"""Analytic ray tracer of the room: nearest solid per ray, colour from the atlas, highlights on glossy spheres."""

from __future__ import annotations

import math

import numpy as np

from posemap_fast.data.room.atlas import Atlas
from posemap_fast.data.room.layout import LIGHTS, ROOM
from posemap_fast.data.room.solids import Solid, turn
from posemap_fast.geometry import Camera

__all__ = ["trace_view"]

_SHINE = 40.0  # exponent of the highlight
_TINY = 1e-12


def _leave_room(origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Distance at which rays from inside leave the room: local origin (3, 1), directions (3, n) -> (n,)."""
    return ((np.copysign(ROOM.half[:, None], directions) - origin) / directions).min(0)


def _window(camera: Camera, rotation: np.ndarray, eye: np.ndarray, solid: Solid) -> tuple[slice, slice] | None:
    """Rows and columns of the image that the solid's bounding sphere may touch; None when it is not in view."""
    x, y, z = (rotation.T @ (solid.centre - eye[:, 0])).tolist()
    radius = solid.radius
    if z < -radius:
        return None
    if z <= radius + 0.05:
        return slice(0, camera.height), slice(0, camera.width)
    spans = []
    for value, focal, centre, size in (
        (y, camera.fy, camera.cy, camera.height),
        (x, camera.fx, camera.cx, camera.width),
    ):
        edges = [(value + s * radius) / (z + q * radius) * focal + centre for s in (-1, 1) for q in (-1, 1)]
        low, high = max(0, math.floor(min(edges)) - 1), min(size, math.ceil(max(edges)) + 1)
        if low >= high:
            return None
        spans.append(slice(low, high))
    return spans[0], spans[1]


def _unit(columns: np.ndarray) -> np.ndarray:
    return columns / np.sqrt((columns * columns).sum(0))


def _highlight(solid: Solid, eye: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Blinn-Phong highlight (n, 3) of a sphere at world points (3, n)."""
    normal, to_eye = _unit(points - solid.centre[:, None]), _unit(eye - points)
    total = np.zeros((points.shape[1], 3), np.float32)
    for light in LIGHTS:
        halfway = _unit(to_eye + _unit(np.array(light.position, np.float32)[:, None] - points))
        shine = np.maximum((normal * halfway).sum(0), 0) ** np.float32(_SHINE)
        total += shine[:, None] * np.array(light.colour, np.float32) * np.float32(solid.gloss / max(light.colour))
    return total


def _shade(atlas: Atlas, eye: np.ndarray, points: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """Colours (H, W, 3) of hit points (3, H * W) on the solids `hit` (H, W)."""
    patch, u, v = ROOM.unfold(ROOM.to_local(points))
    flat = hit.ravel()
    shine: list[tuple[np.ndarray, np.ndarray]] = []
    for index in np.flatnonzero(np.bincount(flat, minlength=2)[1:]) + 1:
        solid, at = atlas.solids[index], np.flatnonzero(flat == index)
        part = points[:, at]
        own, u[at], v[at] = solid.unfold(solid.to_local(part))
        patch[at] = own + atlas.first_patch[index]
        if solid.gloss > 0:
            shine.append((at, _highlight(solid, eye, part)))
    colours = atlas.look_up(*(part.reshape(hit.shape) for part in (patch, u, v)))
    for at, light in shine:
        lit = colours.reshape(-1, 3)
        lit[at] = np.minimum(lit[at] + light, 1)
    return colours


def trace_view(atlas: Atlas, camera: Camera, c2w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One ray per pixel of `camera` through its centre.

    Args:
        c2w: (4, 4) pose inside the room and outside all solids.
    Returns:
        colours (H, W, 3) float32 in [0, 1] and z-depth (H, W) float32 in metres.
    """
    rotation, eye = c2w[:3, :3].astype(np.float32), c2w[:3, 3:].astype(np.float32)
    height, width = camera.height, camera.width
    x = ((np.arange(width) + 0.5 - camera.cx) / camera.fx).astype(np.float32)
    y = ((np.arange(height) + 0.5 - camera.cy) / camera.fy).astype(np.float32)
    forward, across, down = rotation[:, 2], rotation[:, 0], rotation[:, 1]
    rays = across[:, None, None] * x + down[:, None, None] * y[:, None] + forward[:, None, None]  # z = 1: t is z-depth
    rays[rays == 0] = _TINY  # a ray within a face's plane would give 0 / 0
    hit = np.zeros((height, width), np.int8)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # rays parallel to a face
        depth = _leave_room(ROOM.to_local(eye), rays.reshape(3, -1)).reshape(height, width)
        for index, solid in enumerate(atlas.solids[1:], start=1):
            window = _window(camera, rotation, eye, solid)
            if window is None:
                continue
            part = rays[:, window[0], window[1]]
            t = solid.intersect(solid.to_local(eye), turn(solid.rotation.T, part.reshape(3, -1))).reshape(
                part.shape[1:]
            )
            is_nearer = t < depth[window]
            np.copyto(depth[window], t, where=is_nearer)
            np.copyto(hit[window], np.int8(index), where=is_nearer)
        colours = _shade(atlas, eye, eye + depth.reshape(1, -1) * rays.reshape(3, -1), hit)
    return colours, depth
