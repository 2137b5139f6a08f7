"""`scene.map`: field, occupancy grid, pose branch, decoder, frames and camera of one scene in one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posemap_fast.apr import PoseFrame
from posemap_fast.backends import resolve_backend, runnable_backend
from posemap_fast.config import from_dict, to_dict
from posemap_fast.errors import FileFormatError
from posemap_fast.fields import FieldConfig, NeRFP, PoseDecoder
from posemap_fast.files import MAP_MAGIC, read_container, write_container
from posemap_fast.geometry import Camera, SceneFrame
from posemap_fast.render import RenderConfig, Renderer

__all__ = ["SceneMap"]

_VERSION = 2


@dataclass
class SceneMap:
    """A trained map, ready to render."""

    name: str
    nerfp: NeRFP
    renderer: Renderer
    decoder: PoseDecoder
    pose_frame: PoseFrame
    camera: Camera
    usual_difference: float | None = None  # of pictures and training images, see `refined.usual_difference`

    @classmethod
    def untrained(
        cls,
        name: str,
        field: FieldConfig,
        render: RenderConfig,
        frame: SceneFrame,
        near: float,
        pose_frame: PoseFrame,
        camera: Camera,
    ) -> SceneMap:
        """The parts of a map before training."""
        nerfp = NeRFP(field, frame)
        decoder = PoseDecoder(field.posemap_channels)
        return cls(name, nerfp, Renderer(render, frame, near), decoder, pose_frame, camera)

    def to(self, device: torch.device) -> SceneMap:
        """Move the parts to `device`; returns itself."""
        for part in (self.nerfp, self.renderer.occupancy, self.decoder):
            part.to(device)
        return self

    def save(self, path: str | Path) -> None:
        """Write the map atomically, with a checksum."""
        header = {
            "version": _VERSION,
            "scene": self.name,
            "field": to_dict(self.nerfp.config),
            "render": to_dict(self.renderer.config),
            "near": self.renderer.near,
            "frame": self.nerfp.frame.to_dict(),
            "pose_frame": self.pose_frame.to_dict(),
            "camera": self.camera.to_dict(),
            "usual_difference": self.usual_difference,
        }
        write_container(path, MAP_MAGIC, header, self._tensors())

    def _tensors(self) -> dict[str, torch.Tensor]:
        parts = {"nerfp": self.nerfp, "occupancy": self.renderer.occupancy, "decoder": self.decoder}
        return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}

    @classmethod
    def load(cls, path: str | Path, backbone: str | None = None, device: torch.device | str = "cpu") -> SceneMap:
        """Read a map.

        Args:
            path: file written by `save`.
            backbone: field backbone to evaluate it with, `auto` for the best one here; default the one it was trained
                with where that can run.
            device: where to.
        Raises:
            FileFormatError: not a map, damaged, or of another version.
            ConfigError: unknown backbone.
            BackendError: the named backbone cannot run here.
        """
        header, tensors = read_container(path, MAP_MAGIC)
        device = torch.device(device)
        if header.get("version") != _VERSION:
            raise FileFormatError(
                f"{path}: scene map of version {header.get('version')}, this program reads {_VERSION}; train again"
            )
        values: dict[str, Any] = header["field"]
        if backbone is None:
            backbone = runnable_backend("field.backbone", values["backbone"], device)
        backbone = resolve_backend("field.backbone", backbone, device)
        backend = runnable_backend("render.backend", header["render"]["backend"], device)
        found = cls.untrained(
            header["scene"],
            from_dict(FieldConfig, {**values, "backbone": backbone}, str(path)),
            from_dict(RenderConfig, {**header["render"], "backend": backend}, str(path)),
            SceneFrame.from_dict(header["frame"]),
            header["near"],
            PoseFrame.from_dict(header["pose_frame"]),
            Camera.from_dict(header["camera"]),
        )
        for part, module in (
            ("nerfp", found.nerfp),
            ("occupancy", found.renderer.occupancy),
            ("decoder", found.decoder),
        ):
            prefix = f"{part}."
            module.load_state_dict({k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)})
        found.nerfp.requires_grad_(False)
        found.usual_difference = header.get("usual_difference")
        return found.to(device)
