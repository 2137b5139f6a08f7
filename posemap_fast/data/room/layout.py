"""What stands in the room of 4.8 x 4.8 x 2.8 m (z up, origin in the middle of the floor), and the lamps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from posemap_fast.data.room.solids import Solid
from posemap_fast.geometry import so3_exp

__all__ = ["LIGHTS", "ROOM", "Light", "clearance", "furniture"]


def _solid(
    kind: str,
    centre: tuple[float, float, float],
    half: tuple[float, float, float],
    texture: str,
    turn_deg: tuple[float, float, float] = (0.0, 0.0, 0.0),
    gloss: float = 0.0,
    glow: float = 0.0,
) -> Solid:
    """A solid turned by a rotation vector given in degrees."""
    rotation = so3_exp(torch.deg2rad(torch.tensor(turn_deg, dtype=torch.float64))).numpy().astype(np.float32)
    return Solid(kind, np.array(centre, np.float32), np.array(half, np.float32), rotation, texture, gloss, glow)


ROOM = _solid("box", (0, 0, 1.4), (2.4, 2.4, 1.4), "bricks,wallpaper,clouds,dots,planks,plaster")


@dataclass(frozen=True)
class Light:
    """A small spherical lamp."""

    position: tuple[float, float, float]  # m
    colour: tuple[float, float, float]  # radiant intensity, linear RGB
    radius: float  # m; softens the shadows


LIGHTS = (
    Light((0.5, -0.4, 2.55), (2.2, 2.1, 1.9), 0.2),
    Light((-1.6, 1.5, 2.3), (1.5, 1.05, 0.65), 0.15),
    Light((1.9, 1.9, 2.0), (0.55, 0.8, 1.3), 0.25),
)


def furniture() -> list[Solid]:
    """All solids inside the room, none reaching through a wall."""
    turned = math.radians(20)
    along = (math.cos(turned) * 0.55, math.sin(turned) * 0.55)
    return [
        _solid("box", (0.55, -0.55, 0.72), (0.65, 0.4, 0.03), "planks", (0, 0, 20)),  # table top and its two legs
        _solid("box", (0.55 + along[0], -0.55 + along[1], 0.345), (0.03, 0.35, 0.344), "fabric", (0, 0, 20)),
        _solid("box", (0.55 - along[0], -0.55 - along[1], 0.345), (0.03, 0.35, 0.344), "fabric", (0, 0, 20)),
        _solid("sphere", (0.8, -0.5, 0.89), (0.14, 0.14, 0.14), "marble", gloss=0.6),
        _solid("cylinder", (0.25, -0.7, 0.85), (0.07, 0.07, 0.1), "checker"),
        _solid("box", (0.5, -0.35, 0.84), (0.15, 0.11, 0.09), "wallpaper", (0, 0, 55)),
        _solid("box", (-2.1, 0.9, 0.85), (0.28, 0.5, 0.85), "clouds"),  # cabinet
        _solid("box", (0.4, 1.95, 0.22), (0.8, 0.38, 0.22), "fabric"),  # sofa, seat and back
        _solid("box", (0.4, 2.26, 0.45), (0.8, 0.1, 0.45), "wallpaper"),
        _solid("cylinder", (-1.8, -1.8, 1.4), (0.2, 0.2, 1.399), "marble"),  # column
        _solid("box", (1.85, 0.7, 0.3), (0.3, 0.3, 0.3), "checker", (0, 0, 35)),  # crates
        _solid("box", (1.85, 0.7, 0.78), (0.18, 0.18, 0.18), "dots", (0, 0, 10)),
        _solid("cylinder", (1.7, -1.9, 0.25), (0.25, 0.25, 0.4), "planks", (0, 90, 0)),  # barrel on its side
        _solid("sphere", (-0.6, 0.3, 2.4), (0.17, 0.17, 0.17), "paper", glow=0.35),  # hanging lamp
        _solid("box", (2.27, -0.7, 1.45), (0.13, 0.6, 0.025), "planks"),  # shelf, with a ball and books
        _solid("sphere", (2.26, -1.05, 1.58), (0.1, 0.1, 0.1), "checker"),
        _solid("box", (2.27, -0.5, 1.6), (0.09, 0.16, 0.12), "bricks", (0, 0, 8)),
        _solid("cylinder", (-1.1, 1.9, 0.2), (0.18, 0.18, 0.2), "bricks"),  # pot and plant
        _solid("sphere", (-1.1, 1.9, 0.68), (0.3, 0.3, 0.3), "leaves"),
        _solid("box", (-1.0, -2.15, 0.5), (0.5, 0.2, 0.5), "dots", (0, 0, -4)),  # chest, with a globe
        _solid("sphere", (-1.0, -2.1, 1.15), (0.15, 0.15, 0.15), "clouds"),
    ]


def clearance(points: np.ndarray) -> np.ndarray:
    """Distance in metres from points (n, 3) to the nearest wall or solid; negative inside one or outside the room."""
    columns = points.T.astype(np.float32)
    distances = [-ROOM.distance(columns)] + [solid.distance(columns) for solid in furniture()]
    return np.stack(distances).min(0)
