"""Stage 4: self-supervised alignment on unlabelled images (paper, section 3.3, eq. 5; DFNet_dm).

    L_align = L_image + L_posemap

An unlabelled image I gives a pose p_hat; the map renders I' there, differentiably. L_image compares the features
of I and I' (a frozen copy of the network computes them, so that they cannot collapse); its gradient reaches the
pose through the rendering. L_posemap compares F(pose of I') with F(p_hat): I' is an image whose pose is known.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from posemap_fast.apr import APRNet
from posemap_fast.data import ImageStack
from posemap_fast.errors import ConfigError
from posemap_fast.fields import luminance_histogram
from posemap_fast.geometry import Camera, camera_rays
from posemap_fast.losses import posemap_cosine, triplet_loss
from posemap_fast.render import ImagePoseConfig, render_posemaps
from posemap_fast.seeding import integers, step_generator
from posemap_fast.train.apr import OnlineMap, rendered_size
from posemap_fast.train.nerfp import TrainingViews
from posemap_fast.train.selection import BestState, network_input

__all__ = ["AlignConfig", "AlignStage"]


@dataclass(frozen=True)
class AlignConfig:
    """Schedule of stage 4."""

    method: Literal["distil", "paper"] = "distil"  # poses from the map, then learnt; or the paper's joint loss
    steps: int = 60
    batch: int = 2  # unlabelled images per step; with 1 (the paper) the triplet's negative is another image
    lr: float = 1e-5
    image_pose: ImagePoseConfig = field(default_factory=ImagePoseConfig)  # distil: how poses are found
    min_gain: float = 0.1  # distil: an image is learnt from when this share of its difference to the map went away
    posemap_weight: float = 1.0  # distil: of the distance of PoseMaps
    rvs_batch: int = 0  # distil: fresh views per step, rendered around the poses found
    replay_batch: int = 0  # distil: views of earlier steps per step
    guard: float = 0.5  # distil: states are kept while the validation score has not risen by more than this share; the
    # start was the best of many on few views near the training views, so some rise is sure and means little
    render_scale: float = 0.5  # paper: size of the differentiable render relative to the camera's; 0 = the network's
    share: float = 1.0  # share of the unlabelled images used (paper: .1 indoor, .5 outdoor of the test images)
    triplet_margin: float = 1.0  # paper
    validate_every: int = 10  # steps; `paper` keeps the best state on validation, the untouched one included

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1:
            raise ConfigError(f"steps and batch must be >= 1; got {self.steps} and {self.batch}")
        if self.rvs_batch < 0 or self.replay_batch < 0:
            raise ConfigError(f"rvs_batch and replay_batch must be >= 0; got {self.rvs_batch} and {self.replay_batch}")
        if self.replay_batch > 0 and self.rvs_batch == 0:
            raise ConfigError(f"replay_batch needs rvs_batch > 0: it repeats these; got {self.replay_batch}")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share must be in (0, 1]; got {self.share}")


class AlignStage:
    """Fine-tunes `net` with batch normalisation frozen; `best.state` is the one to use (start included)."""

    name = "align"

    def __init__(
        self,
        config: AlignConfig,
        net: APRNet,
        online: OnlineMap,
        images: ImageStack | torch.Tensor,
        camera: Camera,
        validation: TrainingViews,
        seed: int,
    ):
        """`images`: (n, H, W, 3) uint8 unlabelled images, n >= 1."""
        self.config = config
        self.n_steps = config.steps
        self.net, self.online, self.camera = net, online, camera
        self.seed = seed
        stride = max(1, round(1 / config.share))
        self.images = ImageStack.of(images)[::stride]
        codes = online.nerfp.appearance_code(luminance_histogram(self.images))
        self.codes = None if codes is None else codes.detach()
        net.eval()
        net.freeze_batch_norm()
        self.teacher = copy.deepcopy(net).requires_grad_(False)
        self.optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=config.lr, fused=True)
        self.best = BestState(net, validation, config.validate_every, config.steps)
        self.best.look(0)

    def step(self, k: int) -> dict[str, float]:
        """One step of Adam on a batch of unlabelled images."""
        generator = step_generator(self.seed, self.name, k)
        n_drawn = max(2, self.config.batch)  # with a batch of one the second image is the triplet's negative
        index = integers(generator, len(self.images), n_drawn, self.images.device)
        images = self.net.resized(network_input(self.images[index]))
        batch = self.config.batch
        predicted = self.net(images[:batch]).c2w
        renders = self._render(predicted, None if self.codes is None else self.codes[index[:batch]])
        losses = {
            "image": self._image_loss(images, renders),
            "posemap": self._posemap_loss(predicted, renders),
        }
        loss = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        values = {"loss": float(loss.detach())} | {name: float(v.detach()) for name, v in losses.items()}
        return values | self.best.look(k + 1)

    def _render(self, c2w: torch.Tensor, codes: torch.Tensor | None) -> torch.Tensor:
        """Differentiable colour renders, (B, 3, h, w)."""
        height, width = rendered_size(self.camera, self.config.render_scale, self.net.config.input_size)
        size = self.camera.resized(width, height)
        rays_o, rays_d = camera_rays(size, c2w, size.pixel_grid())
        appearance = None if codes is None else codes.repeat_interleave(height * width, dim=0)
        out = self.online.renderer.render_rays(
            self.online.nerfp, rays_o.reshape(-1, 3), rays_d.reshape(-1, 3), appearance=appearance
        )
        return out.rgb.reshape(c2w.shape[0], height, width, 3).permute(0, 3, 1, 2)

    def _image_loss(self, images: torch.Tensor, renders: torch.Tensor) -> torch.Tensor:
        """Triplet loss between the features of the images and of their renders."""
        n = renders.shape[0]
        with torch.no_grad():
            real = self.teacher.features(images)
        fake = self.teacher.features(renders)
        if n == 1:  # anchor and positive beside a second image, whose pairing rolls in as the negative
            fake = torch.cat([fake, real[:, 1:2]], dim=1)
        return triplet_loss(fake, real[:, : fake.shape[1]], margin=self.config.triplet_margin)

    def _posemap_loss(self, predicted: torch.Tensor, renders: torch.Tensor) -> torch.Tensor:
        """PoseMap at the pose regressed from the render against the one at the pose it was rendered from."""
        online = self.online
        again = self.net(self.net.resized(renders.detach())).c2w
        maps = render_posemaps(online.renderer, online.nerfp, again, self.camera)
        with torch.no_grad():
            wanted = render_posemaps(online.renderer, online.nerfp, predicted.detach(), self.camera)
        return posemap_cosine(maps, wanted)

    def state_dict(self) -> dict[str, Any]:
        """Network, optimizer and the best state so far."""
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(), "best": self.best.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best.state = state["best"]
