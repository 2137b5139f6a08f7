"""The procedural room: solids, textures, tracer, camera paths and the scene made of them."""

from __future__ import annotations

from posemap_fast.data.room.scene import load_room

__all__ = ["load_room"]
