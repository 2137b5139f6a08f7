"""The atlas of the room: every surface unfolded into texels of albedo times baked irradiance, gamma encoded.

Light is baked once, with soft shadows, so that a view costs ray intersections and one bilinear look-up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from posemap_fast.data.room.layout import LIGHTS, ROOM, furniture
from posemap_fast.data.room.solids import Solid, turn
from posemap_fast.data.room.textures import paint
from posemap_fast.seeding import stream_seed

__all__ = ["Atlas", "bake_atlas"]

_TEXEL = 0.008  # m, of the albedo
_LIGHT_TEXEL = 0.05  # m, of the irradiance, which varies slowly
_LIGHT_SAMPLES = 6  # points per lamp
_AMBIENT = 0.22
_GAMMA = 1 / 2.2
_HALF = np.float32(0.5)


@dataclass(frozen=True, eq=False)
class Atlas:
    """All patches of all solids below each other in one picture; patch p is rows[p] x cols[p] texels from top[p]."""

    solids: list[Solid]  # the room first
    first_patch: list[int]  # per solid
    picture: np.ndarray  # (n_rows, max(cols), 3) float32 display RGB in [0, 1]
    top: np.ndarray  # (n_patches,) float32
    rows: np.ndarray
    cols: np.ndarray

    def look_up(self, patch: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Bilinear colours (H, W, 3) at surface points given as (H, W) arrays."""
        rows, cols = self.rows[patch], self.cols[patch]
        x = (u * cols - _HALF).clip(0, cols - 1)
        y = (v * rows - _HALF).clip(0, rows - 1) + self.top[patch]
        return cv2.remap(self.picture, x, y, cv2.INTER_LINEAR)


def _grid(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """u and v of the texel centres of a patch, row by row."""
    v, u = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(cols) + 0.5) / cols, indexing="ij")
    return u.ravel().astype(np.float32), v.ravel().astype(np.float32)


def _irradiance(solids: list[Solid], points: np.ndarray, normals: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Linear RGB irradiance (3, n) at world points (3, n): soft-shadowed lamps plus a sky-to-floor ambient."""
    total = np.repeat(np.float32(_AMBIENT) * (1 + np.float32(0.3) * normals[2:]), 3, axis=0)
    origin = points + np.float32(2e-3) * normals
    blockers = [(solid, solid.to_local(origin)) for solid in solids[1:] if solid.glow == 0]
    for index, light in enumerate(LIGHTS):
        colour = np.array(light.colour, np.float32)[:, None] / _LIGHT_SAMPLES
        for draw in draws[index]:
            to_light = (np.array(light.position, np.float32) + np.float32(light.radius) * draw)[:, None] - origin
            squared = (to_light * to_light).sum(0)
            cosine = np.maximum((to_light * normals).sum(0) / np.sqrt(squared), 0)
            is_lit = np.ones(squared.shape, bool)
            for solid, local in blockers:
                is_lit &= solid.intersect(local, turn(solid.rotation.T, to_light)) > 1
            total += colour * (cosine / (squared + np.float32(0.3)) * is_lit)
    return total


def _light_points(solids: list[Solid], solid: Solid, patch: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """World points and normals (3, n) at which the irradiance of a patch is computed, and their grid (rows, cols)."""
    width, height = solid.patch_sizes[patch]
    grid = max(2, math.ceil(height / _LIGHT_TEXEL)), max(2, math.ceil(width / _LIGHT_TEXEL))
    local, normal = solid.fold(patch, *_grid(*grid))
    outward = turn(solid.rotation, normal)
    return turn(solid.rotation, local) + solid.centre[:, None], -outward if solid is solids[0] else outward, grid


def _bake_light(solids: list[Solid], seed: int) -> list[np.ndarray]:
    """Irradiance (rows, cols, 3) of every patch of every solid, on its coarse grid."""
    parts = [_light_points(solids, solid, patch) for solid in solids for patch in range(len(solid.patch_sizes))]
    points = np.concatenate([part[0] for part in parts], axis=1)
    normals = np.concatenate([part[1] for part in parts], axis=1)
    generator = np.random.default_rng(stream_seed(seed, "room/lamps"))
    draws = generator.standard_normal((len(LIGHTS), _LIGHT_SAMPLES, 3), np.float32)
    draws /= np.linalg.norm(draws, axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # rays parallel to a face
        light = _irradiance(solids, points, normals, draws)
    ends = np.cumsum([part[0].shape[1] for part in parts])[:-1]
    pieces = np.split(light, ends, axis=1)
    return [piece.T.reshape(*part[2], 3) for piece, part in zip(pieces, parts, strict=True)]


def bake_atlas(seed: int) -> Atlas:
    """Textures and light of the room for one seed."""
    solids = [ROOM, *furniture()]
    lights = _bake_light(solids, seed)
    texels: list[np.ndarray] = []
    shapes: list[tuple[int, int]] = []
    first_patch: list[int] = []
    for index, solid in enumerate(solids):
        first_patch.append(len(shapes))
        names = solid.texture.split(",")
        for patch, size in enumerate(solid.patch_sizes):
            rows, cols = max(8, round(size[1] / _TEXEL)), max(8, round(size[0] / _TEXEL))
            generator = np.random.default_rng(stream_seed(seed, f"room/texture/{index}", patch))
            posters = 4 if index == 0 and patch < 4 else 0
            albedo = paint(names[patch % len(names)], size, (rows, cols), generator, posters)
            light = cv2.resize(lights[len(shapes)], (cols, rows), interpolation=cv2.INTER_LINEAR)
            colour = (albedo.reshape(3, -1).T * light.reshape(-1, 3) + np.float32(solid.glow)).clip(0, 1)
            texels.append(colour ** np.float32(_GAMMA))
            shapes.append((rows, cols))
    rows_all, cols_all = np.array(shapes, np.float32).T.copy()
    top = np.cumsum(rows_all) - rows_all
    picture = np.zeros((int(rows_all.sum()), int(cols_all.max()), 3), np.float32)
    for first, (rows, cols), texel in zip(top.astype(int), shapes, texels, strict=True):
        picture[first : first + rows, :cols] = texel.reshape(rows, cols, 3)
    return Atlas(solids, first_patch, picture, top, rows_all, cols_all)
