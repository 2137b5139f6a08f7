"""Stage 4 by distillation: unlabelled images get poses from the map, and the network learns them.

    L_align = L_image + L_posemap (paper, section 3.3, eq. 5), one after the other instead of in one step:
    1. L_image moves the predicted pose of each unlabelled image until the map looks like it (`render.refine_poses`);
    2. the network learns the poses found, by the distance of 12-vectors and of PoseMaps, beside its training images
       and beside views that the map renders around the poses found (RVS): queries come from there, which may be far
       from the training views.

The paper's form (`align.AlignStage`) sends the image loss through a rendering into the network, one or two images at
a time at a rate of 1e-5, which moves it by little. No true pose of an unlabelled image is read in either form.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from typing import Any

import torch

from posemap_fast.apr import APRNet
from posemap_fast.data import ImageStack
from posemap_fast.fields import luminance_histogram
from posemap_fast.geometry import Camera
from posemap_fast.losses import pose_l2, posemap_l2
from posemap_fast.render import refine_poses, render_posemaps
from posemap_fast.seeding import integers, step_generator, stream_seed
from posemap_fast.train.align import AlignConfig
from posemap_fast.train.apr import OnlineMap
from posemap_fast.train.nerfp import TrainingViews
from posemap_fast.train.posemap_distance import posemap_distance
from posemap_fast.train.random_views import RandomViewSource
from posemap_fast.train.replay import RandomViews, ViewReplay, draw_views
from posemap_fast.train.rvs import ViewSampler
from posemap_fast.train.selection import GuardedState, network_input, predict_poses

__all__ = ["DistilAlignStage"]

logger = logging.getLogger(__name__)
_CHUNK = 8  # images whose poses are moved at once; bounds the memory
_MOST_KEPT = 1024  # rendered views kept for replay


class DistilAlignStage:
    """Fine-tunes `net` with batch normalisation frozen; `best.state` is the one to use.

    Args:
        config: schedule.
        net: trained network.
        online: the frozen map.
        images: (n, H, W, 3) uint8 unlabelled images, n >= 1.
        camera: theirs and the training images'.
        validation: views of the guard.
        seed: of the run.
        training: labelled views, those of `online.cache`, mixed in so that nothing is forgotten.
        name: of the stage.
    """

    def __init__(
        self,
        config: AlignConfig,
        net: APRNet,
        online: OnlineMap,
        images: ImageStack | torch.Tensor,
        camera: Camera,
        validation: TrainingViews,
        seed: int,
        training: TrainingViews,
        name: str = "align",
    ):
        self.config, self.net, self.online, self.camera, self.seed = config, net, online, camera, seed
        self.training, self.name = training, name
        self.images = ImageStack.of(images)[:: max(1, round(1 / config.share))]
        codes = online.nerfp.appearance_code(luminance_histogram(self.images))
        self.codes = None if codes is None else codes.detach()
        self.random_views: RandomViewSource | None = None  # once the poses are found
        capacity = min(_MOST_KEPT, config.steps * config.rvs_batch) if config.replay_batch else 0
        self.replay = ViewReplay(capacity, net.config.input_size, self.images.device)
        self.n_chunks = math.ceil(len(self.images) / _CHUNK)
        self.n_steps = self.n_chunks + config.steps
        net.eval()
        net.freeze_batch_norm()
        self.poses = predict_poses(net, self.images).float()
        self.gain = torch.zeros(len(self.images), device=self.poses.device)  # share of the difference that went away
        self.optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=config.lr, fused=True)
        self.best = GuardedState(net, validation, config.validate_every, self.n_steps, config.guard)

    def step(self, k: int) -> dict[str, float]:
        """Move the poses of a few images, and after all of them one step of Adam on the network."""
        if k < self.n_chunks:
            return self._move_poses(k)
        return self._teach(k) | self.best.look(k + 1)

    def _move_poses(self, k: int) -> dict[str, float]:
        part = torch.arange(k * _CHUNK, min((k + 1) * _CHUNK, len(self.images)), device=self.poses.device)
        found = refine_poses(
            self.online.renderer,
            self.online.nerfp,
            self.camera,
            network_input(self.images[part]),
            None if self.codes is None else self.codes[part],
            self.poses[part],
            self.config.image_pose,
        )
        self.poses[part] = found.c2w
        self.gain[part] = 1 - found.difference / found.difference_before.clamp(min=1e-9)
        if k + 1 == self.n_chunks:
            logger.info("align: %d of %d images have a pose that fits", len(self.trusted()), len(self.images))
        return {"loss": float(found.difference.mean()), "before": float(found.difference_before.mean())}

    def trusted(self) -> torch.Tensor:
        """Indices of the images that the map looks more like than before, by a share; the network learns these."""
        return torch.nonzero(self.gain >= self.config.min_gain).flatten()

    def _teach(self, k: int) -> dict[str, float]:
        config, net, online = self.config, self.net, self.online
        generator = step_generator(self.seed, self.name, k)
        done = (k - self.n_chunks) / config.steps
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * max(0.01, 0.5 * (1 + math.cos(math.pi * done)))
        trusted = self.trusted()
        if len(trusted) == 0:  # nothing to learn from: the network stays as it is
            return {"loss": 0.0}
        device = self.poses.device
        new = trusted[integers(generator, len(trusted), config.batch, device)]
        known = integers(generator, len(self.training), config.batch, device)
        parts = [(self.poses[new], self.images[new]), (self.training.c2w[known], self.training.images[known])]
        random = self._random_views(k, trusted, generator)
        if random is not None:
            parts.append((random.poses, random.images))
        output = net(torch.cat([net.resized(network_input(images)) for _, images in parts]))
        target = net.pose_frame.encode(torch.cat([c2w for c2w, _ in parts]))
        wanted, maps = self._true_posemaps(self.poses[new]), output.posemap
        if maps is None:
            maps = self._posemaps(output.c2w[: config.batch])
        else:
            kept = [] if random is None or random.posemaps is None else [random.posemaps]
            wanted = torch.cat([wanted, online.cache.posemaps[known], *kept])
        if net.refiner is None:
            apart = posemap_l2(maps, wanted, scale=online.feature_scale)
        else:
            apart = posemap_distance(net.refiner, maps, wanted, scale=online.feature_scale)
        losses = {
            "pose": torch.stack([pose_l2(vectors, target) for vectors in output.pose_vectors]).sum(),
            "posemap": config.posemap_weight * apart,
        }
        loss = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"loss": float(loss.detach())} | {name: float(v.detach()) for name, v in losses.items()}

    def _posemaps(self, c2w: torch.Tensor) -> torch.Tensor:
        return render_posemaps(self.online.renderer, self.online.nerfp, c2w, self.camera)

    @torch.no_grad()
    def _true_posemaps(self, c2w: torch.Tensor) -> torch.Tensor:
        return self._posemaps(c2w)

    def _random_views(self, k: int, trusted: torch.Tensor, generator: torch.Generator) -> RandomViews | None:
        """Views around the poses found."""
        if self.config.rvs_batch == 0:
            return None
        if self.random_views is None:
            self.random_views = self._source(trusted)
        if self.random_views is None:
            return None
        render = None if self.net.refiner is None else self._true_posemaps
        return draw_views(self.random_views, self.replay, self.config.replay_batch, k, generator, render)

    def _source(self, trusted: torch.Tensor) -> RandomViewSource | None:
        """Views as far from the poses found as those of training are from the training poses.

        None are taken between two poses, which may be on two sides of something, nor around one where no camera can
        have been; without any pose left there are no such views.
        """
        online = self.online
        usable = trusted[online.sampler.is_free(self.poses[trusted, :3, 3])]
        if len(usable) == 0:
            return None
        ranges = dataclasses.replace(
            online.sampler.config, max_translation=online.sampler.max_translation, interpolate=0.0
        )
        return RandomViewSource(
            online.nerfp,
            online.renderer,
            ViewSampler(ranges, self.poses[usable], online.renderer),
            self.camera,
            None if self.codes is None else self.codes[usable],
            image_size=self.net.config.input_size,
            n_views=self.config.rvs_batch,
            appearance=ranges.appearance,
            seed=stream_seed(self.seed, self.name),
        )

    def state_dict(self) -> dict[str, Any]:
        """Poses found so far, network, optimizer and the state to use."""
        return {
            "poses": self.poses,
            "gain": self.gain,
            "net": copy.copy(self.net.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best.state,
            "replay": self.replay.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.poses, self.gain = state["poses"].to(self.poses), state["gain"].to(self.gain)
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best.state = state["best"]
        self.replay.load_state_dict(state["replay"])
        self.random_views = None
