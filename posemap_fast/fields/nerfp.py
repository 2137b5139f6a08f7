"""NeRF-P: a radiance field with an appearance code, and a pose branch whose projection is deferred.

PoseMap (paper, eqs. 3 and 4): F = sum_i w_i f_i with f_i in R^256. Here f_i = A h_i + b, so

    F = A (sum_i w_i h_i) + b sum_i w_i

holds exactly: the kernels composite the 64 hidden channels and one matrix product per ray makes 256 of them.
`project_per_sample` is the direct form, kept as the oracle of the deferred one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from posemap_fast.errors import FileFormatError
from posemap_fast.fields.appearance import AppearanceEncoder
from posemap_fast.fields.protocol import FIELD_BACKBONES, FieldConfig
from posemap_fast.fields.transient import TransientHead
from posemap_fast.geometry import SceneFrame

__all__ = ["NeRFP"]


class NeRFP(nn.Module):
    """Everything that is stored in a scene map besides the occupancy grid and the decoder.

    Args:
        config: sizes; `finest_resolution` must be resolved (> 0).
        frame: world to unit cube.
        mean_histogram: (10,) mean luminance histogram of the training images; ignored without codes of images.
    """

    def __init__(self, config: FieldConfig, frame: SceneFrame, mean_histogram: torch.Tensor | None = None):
        super().__init__()
        self.config = config
        self.frame = frame
        self.field = FIELD_BACKBONES.get(config.backbone)(config)
        self.projection: nn.Linear | None = None
        if config.pose_branch != "nerf":
            self.projection = nn.Linear(config.pose_hidden, config.pose_features)
        mean = torch.full((10,), 0.1) if mean_histogram is None else mean_histogram
        self.appearance: AppearanceEncoder | None = None
        if config.appearance_dim > 0:
            self.appearance = AppearanceEncoder(config.appearance_dim, mean)
        self.transient: TransientHead | None = None
        self.transient_encoder: AppearanceEncoder | None = None
        if config.transient_dim > 0:  # last, so that everything else starts from the same numbers without it
            self.transient = TransientHead(config)
            self.transient_encoder = AppearanceEncoder(config.transient_dim, mean)

    def appearance_code(self, histograms: torch.Tensor) -> torch.Tensor | None:
        """(n, appearance_dim) codes, or None when appearance is off."""
        return None if self.appearance is None else self.appearance(histograms)

    def transient_code(self, histograms: torch.Tensor) -> torch.Tensor | None:
        """(n, transient_dim) codes, or None when the transient branch is off."""
        return None if self.transient_encoder is None else self.transient_encoder(histograms)

    def project(self, hidden: torch.Tensor, opacity: torch.Tensor) -> torch.Tensor:
        """Deferred projection: composited hidden (n_rays, 64) and opacity (n_rays,) -> (n_rays, 256)."""
        if self.projection is None:
            return hidden
        return hidden @ self.projection.weight.T + opacity[:, None] * self.projection.bias

    def project_per_sample(self, hidden: torch.Tensor) -> torch.Tensor:
        """Direct form: hidden of each sample (n, 64) -> f_i (n, 256), to be composited."""
        return hidden if self.projection is None else self.projection(hidden)

    def rendering_parameters(self) -> list[nn.Parameter]:
        """MLP parameters of stage 1 (everything but the table and the pose branch)."""
        others = {id(p) for p in [*self.pose_parameters(), *self.field.grid_parameters()]}
        return [p for p in self.parameters() if id(p) not in others]

    def pose_parameters(self) -> list[nn.Parameter]:
        """Parameters of stage 2: the pose branch and its projection."""
        projection = [] if self.projection is None else self.projection.parameters()
        return [*self.field.pose_parameters(), *projection]

    def rendering_state(self) -> dict[str, Any]:
        """What stage 1 trains: the state dict without the pose branch, so that maps which differ in it can share it."""
        absent = self._pose_keys()
        return {name: value for name, value in self.state_dict().items() if name not in absent}

    def load_rendering_state(self, state: dict[str, Any]) -> None:
        """Restore what `rendering_state` returned; the pose branch stays as it is.

        Raises:
            FileFormatError: a key is missing or unknown; nothing was changed.
        """
        differing = set(state) ^ (set(self.state_dict()) - self._pose_keys())
        if differing:
            raise FileFormatError(
                f"the state of another field: {', '.join(sorted(differing))} missing or not expected; "
                "were field.appearance_dim or field.transient_dim changed?"
            )
        self.load_state_dict(state, strict=False)

    def _pose_keys(self) -> set[str]:
        pose = {id(p) for p in self.pose_parameters()}
        return {name for name, parameter in self.named_parameters() if id(parameter) in pose}

    def with_backbone(self, name: str) -> NeRFP:
        """The same trained field on another backbone (parameters are copied)."""
        config = dataclasses.replace(self.config, backbone=name)
        other = NeRFP(config, self.frame, None if self.appearance is None else self.appearance.mean_histogram)
        other.load_state_dict(self.state_dict())
        return other.to(self.field.grid_parameters()[0])  # its device and dtype
