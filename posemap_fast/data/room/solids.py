"""Solids of the procedural room: ray intersection, distance, and the unfolding of their surfaces into patches.

Every solid has a local frame (`rotation` local-to-world, `centre`) with half extents `half`: a box fills them, a
sphere has radius half[0], a cylinder stands along local z with radius half[0] and half height half[2].
A surface point is (patch, u, v) with u, v in [0, 1]; a box has 6 patches (-x +x -y +y -z +z), a sphere 1
(longitude, colatitude), a cylinder 3 (side, bottom, top). Points and directions are (3, n) columns, float32.

The room is traced in numpy by a pool of threads: many small torch operators would fight over the cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

__all__ = ["Solid", "turn"]

_INF = np.float32("inf")


def turn(rotation: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Matrix product (3, 3) @ (3, n) without the threads of a BLAS, which cost more than they give here."""
    return rotation[:, 0:1] * columns[0] + rotation[:, 1:2] * columns[1] + rotation[:, 2:3] * columns[2]


@dataclass(frozen=True, eq=False)
class Solid:
    """One textured solid; see the module's header for the frame and the patches."""

    kind: str  # box, sphere or cylinder
    centre: np.ndarray  # (3,) m
    half: np.ndarray  # (3,) m
    rotation: np.ndarray  # (3, 3) local to world
    texture: str  # name in `textures.TEXTURES`; a room has one per patch, separated by commas
    gloss: float = 0.0  # strength of the highlight
    glow: float = 0.0  # emitted radiance added to the reflected one

    @property
    def radius(self) -> float:
        """Radius of the bounding sphere, m."""
        if self.kind == "sphere":
            return float(self.half[0])
        if self.kind == "cylinder":
            return math.hypot(float(self.half[0]), float(self.half[2]))
        return float(np.linalg.norm(self.half))

    @property
    def patch_sizes(self) -> list[tuple[float, float]]:
        """Extent (u, v) of each patch in metres."""
        x, y, z = (2 * float(h) for h in self.half)
        if self.kind == "box":
            return [(y, z), (y, z), (z, x), (z, x), (x, y), (x, y)]
        if self.kind == "sphere":
            return [(math.pi * x, math.pi * x / 2)]
        return [(math.pi * x, z), (x, x), (x, x)]

    def to_local(self, points: np.ndarray) -> np.ndarray:
        """World points (3, n) -> local points."""
        return turn(self.rotation.T, points - self.centre[:, None])

    def intersect(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """First hit of rays from outside: local origin (3, 1 or n), directions (3, n) -> t (n,), inf for a miss."""
        if self.kind == "box":
            return _hit_box(origin, directions, self.half)
        if self.kind == "sphere":
            return _hit_round(origin, directions, float(self.half[0]))
        return _hit_cylinder(origin, directions, float(self.half[0]), float(self.half[2]))

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Signed distance of world points (3, n), positive outside."""
        local = self.to_local(points)
        if self.kind == "sphere":
            return np.linalg.norm(local, axis=0) - self.half[0]
        if self.kind == "cylinder":
            excess = np.stack([np.hypot(local[0], local[1]), np.abs(local[2])]) - self.half[[0, 2], None]
        else:
            excess = np.abs(local) - self.half[:, None]
        return np.linalg.norm(np.maximum(excess, 0), axis=0) + np.minimum(excess.max(0), 0)

    def unfold(self, local: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Local surface points (3, n) -> patch index, u, v (each (n,))."""
        if self.kind == "box":
            return _unfold_box(local, self.half)
        x, y, z = local
        longitude = np.arctan2(y, x) / np.float32(2 * math.pi) + 0.5
        if self.kind == "sphere":
            v = np.arccos((z / self.half[0]).clip(-1, 1)) / np.float32(math.pi)
            return np.zeros(x.shape, np.int32), longitude, v
        patch = _cap_index(local, self.half)
        is_side = patch == 0
        u = np.where(is_side, longitude, 0.5 + 0.5 * x / self.half[0])
        v = np.where(is_side, 0.5 + 0.5 * z / self.half[2], 0.5 + 0.5 * y / self.half[0])
        return patch, u.clip(0, 1), v.clip(0, 1)

    def fold(self, patch: int, u: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inverse of `unfold`: u, v (n,) of one patch -> local points (3, n) and outward unit normals (3, n)."""
        if self.kind == "box":
            axis, sign = patch // 2, np.float32(1 if patch % 2 else -1)
            a, b = (axis + 1) % 3, (axis + 2) % 3
            point, normal = np.empty((3, u.size), np.float32), np.zeros((3, u.size), np.float32)
            point[axis], normal[axis] = sign * self.half[axis], sign
            point[a], point[b] = (2 * u - 1) * self.half[a], (2 * v - 1) * self.half[b]
            return point, normal
        angle = (u - 0.5) * np.float32(2 * math.pi)
        if self.kind == "sphere":
            sine = np.sin(v * np.float32(math.pi))
            normal = np.stack([sine * np.cos(angle), sine * np.sin(angle), np.cos(v * np.float32(math.pi))])
            return normal * self.half[0], normal
        if patch == 0:
            normal = np.stack([np.cos(angle), np.sin(angle), np.zeros_like(angle)])
            point = normal * self.half[0]
            point[2] = (2 * v - 1) * self.half[2]
            return point, normal
        sign = np.float32(-1 if patch == 1 else 1)
        level = np.full_like(u, sign * self.half[2])
        point = np.stack([(2 * u - 1) * self.half[0], (2 * v - 1) * self.half[0], level])
        return point, np.broadcast_to(np.array([[0], [0], [sign]], np.float32), (3, u.size))


def _hit_box(origin: np.ndarray, directions: np.ndarray, half: np.ndarray) -> np.ndarray:
    inverse = 1 / directions
    middle, reach = -origin * inverse, half[:, None] * np.abs(inverse)
    near, far = (middle - reach).max(0), (middle + reach).min(0)
    return np.where((near < far) & (near > 0), near, _INF)


def _hit_round(origin: np.ndarray, directions: np.ndarray, radius: float) -> np.ndarray:
    """Sphere, or an infinite cylinder when given the x and y rows only."""
    a = (directions * directions).sum(0)
    b = (origin * directions).sum(0)
    c = (origin * origin).sum(0) - radius * radius
    discriminant = b * b - a * c
    t = (-b - np.sqrt(np.maximum(discriminant, 0))) / a
    return np.where((discriminant > 0) & (t > 0), t, _INF)


def _hit_cylinder(origin: np.ndarray, directions: np.ndarray, radius: float, half: float) -> np.ndarray:
    side = _hit_round(origin[:2], directions[:2], radius)
    height = origin[2] + np.where(np.isinf(side), np.float32(0), side) * directions[2]
    side = np.where(np.abs(height) <= half, side, _INF)
    cap = -(np.sign(directions[2]) * half + origin[2]) / directions[2]
    at = origin[:2] + cap * directions[:2]
    cap = np.where(((at * at).sum(0) <= radius * radius) & (cap > 0), cap, _INF)
    return np.minimum(side, cap)


def _unfold_box(local: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x, y, z = local / half[:, None]
    on_x = np.abs(x) >= np.maximum(np.abs(y), np.abs(z))
    on_y = ~on_x & (np.abs(y) >= np.abs(z))
    along = np.where(on_x, x, np.where(on_y, y, z))
    patch = np.where(on_x, 0, np.where(on_y, 2, 4)) + (along > 0)
    u = np.where(on_x, y, np.where(on_y, z, x))
    v = np.where(on_x, z, np.where(on_y, x, y))
    return patch, (0.5 + 0.5 * u).clip(0, 1), (0.5 + 0.5 * v).clip(0, 1)


def _cap_index(local: np.ndarray, half: np.ndarray) -> np.ndarray:
    """0 on the side, 1 on the bottom, 2 on the top of a cylinder."""
    on_cap = np.abs(local[2]) / half[2] > np.hypot(local[0], local[1]) / half[0]
    return np.where(on_cap, np.where(local[2] > 0, 2, 1), 0)
