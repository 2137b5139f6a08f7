"""Stage 2: the pose branch and its decoder, on a frozen field (paper, section 3.2).

The loss is the distance between decoded and true pose, on training poses and on poses around them: no image is
needed, so supervision at perturbed poses is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from posemap_fast.apr import PoseFrame
from posemap_fast.errors import ConfigError
from posemap_fast.fields import NeRFP, PoseDecoder
from posemap_fast.geometry import Camera
from posemap_fast.losses import pose_l2
from posemap_fast.render import Renderer, render_posemaps
from posemap_fast.seeding import step_generator
from posemap_fast.train.rvs import ViewSampler

__all__ = ["PoseBranchConfig", "PoseBranchStage"]


@dataclass(frozen=True)
class PoseBranchConfig:
    """Schedule of stage 2."""

    steps: int = 600
    batch: int = 16  # poses per step
    lr: float = 2e-3  # Adam, cosine to 1 % of it
    range_scale: float = 2.0  # perturbation of the poses, relative to random view synthesis

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ConfigError(f"steps and batch must be >= 1; got {self.steps} and {self.batch}")


class PoseBranchStage:
    """Trains `nerfp`'s pose branch and `decoder`; everything else stays as it is."""

    name = "pose_branch"

    def __init__(
        self,
        config: PoseBranchConfig,
        nerfp: NeRFP,
        decoder: PoseDecoder,
        pose_frame: PoseFrame,
        renderer: Renderer,
        camera: Camera,
        sampler: ViewSampler,
        seed: int,
    ):
        self.config = config
        self.n_steps = config.steps
        self.nerfp, self.decoder, self.pose_frame = nerfp, decoder, pose_frame
        self.renderer, self.camera, self.sampler = renderer, camera, sampler
        self.seed = seed
        nerfp.requires_grad_(False)
        parameters = nerfp.pose_parameters()
        for parameter in parameters:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.Adam([*parameters, *decoder.parameters()], lr=config.lr, fused=True)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.optimizer, config.steps, eta_min=config.lr * 0.01
        )

    def step(self, k: int) -> dict[str, float]:
        """One step of Adam on a batch of random poses."""
        generator = step_generator(self.seed, "pose_branch", k)
        poses, _ = self.sampler.draw(self.config.batch, generator, self.config.range_scale)
        posemaps = render_posemaps(self.renderer, self.nerfp, poses, self.camera, generator=generator)
        loss = pose_l2(self.decoder(posemaps), self.pose_frame.encode(poses))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return {"loss": float(loss.detach())}

    def state_dict(self) -> dict[str, Any]:
        """Pose branch, decoder, optimizer and schedule."""
        return {
            "nerfp": self.nerfp.state_dict(),
            "decoder": self.decoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.nerfp.load_state_dict(state["nerfp"])
        self.decoder.load_state_dict(state["decoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
