"""Procedural albedo of the room: each texture fills a grid of texels from its size in metres and a generator.

All patterns are band-limited to a few centimetres, so that supersampled views of one texture agree with each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np

__all__ = ["TEXTURES", "paint"]

Painter = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
_SOFT = 0.012  # m, width of an edge


def _cloud(x: np.ndarray, wavelength: float, generator: np.random.Generator, channels: int = 1) -> np.ndarray:
    """Smooth noise in [0, 1]: a random lattice of the wavelength, bicubic between -> (channels, rows, cols)."""
    rows, cols = x.shape
    texel = float(x[0, 1] - x[0, 0])
    shape = [max(4, math.ceil(n * texel / wavelength) + 3) for n in (rows, cols)]
    lattice = generator.random((*shape, channels), np.float32)
    size = [max(n, math.ceil(s * wavelength / texel)) for n, s in zip((rows, cols), shape, strict=True)]
    wide = cv2.resize(lattice, (size[1], size[0]), interpolation=cv2.INTER_CUBIC).reshape(*size, channels)
    return np.moveaxis(wide[:rows, :cols], -1, 0).clip(0, 1)


def _step(value: np.ndarray) -> np.ndarray:
    """Soft edge at zero, `_SOFT` metres wide."""
    return (0.5 + value / _SOFT).clip(0, 1)


def _band(value: np.ndarray, period: float, share: float) -> np.ndarray:
    """1 inside the first `share` of each period, 0 outside, with soft edges."""
    phase = np.remainder(value, period)
    return _step(phase) * _step(share * period - phase)


def _colour(generator: np.random.Generator, low: float = 0.15, high: float = 0.9) -> np.ndarray:
    return (low + (high - low) * generator.random(3, np.float32))[:, None, None]


def _mix(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    return a + (b - a) * share


def _grain(x: np.ndarray, generator: np.random.Generator, strength: float) -> np.ndarray:
    """Multiplicative variation at 5, 14 and 60 cm."""
    total = np.ones_like(x)
    for length, weight in ((0.05, 1.0), (0.14, 1.0), (0.6, 1.5)):
        total = total + strength * weight * (_cloud(x, length, generator)[0] - 0.5)
    return total


def planks(x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Wooden boards of 16 cm along x, each with its own tone."""
    row = np.floor(y / 0.16).astype(np.int64)
    tone = 0.35 + 0.5 * generator.random(int(row.max()) + 1, np.float32)
    base = np.array([0.85, 0.6, 0.38], np.float32)[:, None, None] * tone[row]
    stretched = _cloud(x / 6, 0.05, generator)
    return base * (0.75 + 0.5 * stretched) * (1 - 0.6 * _band(y, 0.16, 0.07)) * _grain(x, generator, 0.25)


def plaster(x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Pale ceiling in panels of 60 cm."""
    seams = np.maximum(_band(x, 0.6, 0.04), _band(y, 0.6, 0.04))
    tint = 0.7 + 0.25 * _cloud(x, 0.9, generator, 3)
    return tint * (1 - 0.35 * seams) * _grain(x, generator, 0.2)


def bricks(x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Brick wall, 24 x 8 cm, every brick with its own tone."""
    row = np.floor(y / 0.08)
    shifted = x + 0.12 * np.remainder(row, 2)
    column = np.floor(shifted / 0.24)
    tones = generator.random((64, 64, 3), np.float32)
    tone = tones[row.astype(np.int64) % 64, column.astype(np.int64) % 64]
    base = np.array([0.62, 0.28, 0.2], np.float32) + 0.3 * (tone - 0.35)
    joint = np.maximum(_band(y, 0.08, 0.18), _band(shifted, 0.24, 0.07))
    return _mix(np.moveaxis(base, -1, 0), np.full((3, 1, 1), 0.72, np.float32), joint) * _grain(x, generator, 0.35)


def wallpaper(x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Striped wallpaper with blots of colour over it."""
    stripes = _mix(_colour(generator, 0.4), _colour(generator, 0.5), _band(x, 0.3, 0.5))
    blots = _cloud(x, 0.35, generator)
    stripes = _mix(stripes, _colour(generator), ((blots - 0.62) * 12).clip(0, 1))
    return stripes * _grain(x, generator, 0.3)


def clouds(x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Broad patches of many colours with a tile grid of 30 cm."""
    broad = 0.2 + 0.7 * _cloud(x, 1.1, generator, 3)
    grid = np.maximum(_band(x, 0.3, 0.05), _band(y, 0.3, 0.05))
    return broad * (1 - 0.5 * grid) * _grain(x, generator, 0.35)


def checker(x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Checks of 10 cm in two colours."""
    a, b = _band(x, 0.2, 0.5), _band(y, 0.2, 0.5)
    checks = _mix(_colour(generator, 0.05, 0.4), _colour(generator, 0.55, 0.95), a + b - 2 * a * b)
    return checks * _grain(x, generator, 0.3)


def dots(x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Dots of 5 cm radius on a plain ground."""
    radius = np.hypot(np.remainder(x, 0.16) - 0.08, np.remainder(y, 0.16) - 0.08)
    dotted = _mix(_colour(generator, 0.5), _colour(generator, 0.05, 0.5), _step(0.05 - radius))
    return dotted * _grain(x, generator, 0.2)


def marble(x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Veins that wander through a pale ground."""
    veins = np.sin(25 * (x + 0.5 * y) + 9 * _cloud(x, 0.25, generator)[0])
    veined = _mix(_colour(generator, 0.6), _colour(generator, 0.1, 0.5), ((veins - 0.3) * 1.4).clip(0, 1))
    return veined * _grain(x, generator, 0.15)


def fabric(x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Crossed bands of a woven cloth."""
    cloth = _mix(_colour(generator), _colour(generator), 0.5 * (_band(x, 0.11, 0.4) + _band(y, 0.13, 0.4)))
    return cloth * _grain(x, generator, 0.4)


def leaves(x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Mottled green."""
    mottle = _cloud(x, 0.07, generator)
    dark, light = np.array([[0.1, 0.28, 0.08], [0.5, 0.75, 0.25]], np.float32)[:, :, None, None]
    return _mix(dark, light, mottle)


def paper(x: np.ndarray, y: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Near-white lampshade with faint ribs."""
    return (0.9 - 0.2 * _band(y, 0.08, 0.3)) * np.array([1.0, 0.95, 0.85], np.float32)[:, None, None]


TEXTURES: dict[str, Painter] = {
    painter.__name__: painter
    for painter in (planks, plaster, bricks, wallpaper, clouds, checker, dots, marble, fabric, leaves, paper)
}


def _posters(
    albedo: np.ndarray, x: np.ndarray, y: np.ndarray, count: int, generator: np.random.Generator
) -> np.ndarray:
    """Hang `count` framed pictures, each with its own colours, side by side on a wall."""
    width, height = float(x.max()), float(y.max())
    for index in range(count):
        draw = generator.random(5, np.float32)
        half_w, half_h = 0.18 + 0.2 * float(draw[0]), 0.18 + 0.2 * float(draw[1])
        centre_x = width * (index + 0.25 + 0.5 * float(draw[2])) / count
        centre_y = height * (0.5 + 0.2 * float(draw[3]))
        inside = np.minimum(half_w - np.abs(x - centre_x), half_h - np.abs(y - centre_y))
        picture = _mix(_colour(generator, 0, 0.6), _colour(generator, 0.4, 1), _cloud(x, 0.12, generator, 3))
        picture = _mix(picture, _colour(generator, 0, 1), _band(x + float(draw[4]) * y, 0.2, 0.25))
        albedo = _mix(albedo, _colour(generator, 0.0, 0.25), _step(inside))
        albedo = _mix(albedo, picture, _step(inside - 0.03))
    return albedo


def paint(
    name: str, size: tuple[float, float], shape: tuple[int, int], generator: np.random.Generator, posters: int = 0
) -> np.ndarray:
    """Albedo of one patch: `size` (u, v) in metres over `shape` (rows along v, cols along u) -> (3, rows, cols)."""
    rows, cols = shape
    v, u = np.meshgrid(np.arange(rows, dtype=np.float32) + 0.5, np.arange(cols, dtype=np.float32) + 0.5, indexing="ij")
    x, y = u * (size[0] / cols), v * (size[1] / rows)
    albedo = TEXTURES[name](x, y, generator)
    if posters:
        albedo = _posters(albedo, x, y, posters, generator)
    return np.broadcast_to(albedo.clip(0.02, 0.98), (3, rows, cols))
