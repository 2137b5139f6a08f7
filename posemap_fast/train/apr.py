"""Stage 3: the absolute pose regression network in one online loop with the map (paper, section 3.1, eqs. 1 and 2).

    L = L_pose + L_image + L_posemap + L_rvs

Every step draws real images, takes their cached renders and PoseMaps, renders fresh views and PoseMaps at random
poses (RVS), runs the network once over all of them and compares PoseMaps with those of the true poses. Whose PoseMaps
depends on the network: one that predicts a PoseMap (`APRConfig.pose_from` posemap) learns it cell by cell; of any
other the PoseMap at the predicted pose is taken (paper), whose gradient comes through rays, hash grid and compositing
weights.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from posemap_fast.apr import APRNet, APROutput, AugmentConfig, PoseMapReadout, augment_images
from posemap_fast.errors import ConfigError
from posemap_fast.fields import NeRFP
from posemap_fast.geometry import Camera, rotation_angle_deg
from posemap_fast.losses import laplace_nll, pose_l2, pose_mse, posemap_cosine, posemap_l2, triplet_loss
from posemap_fast.render import Renderer, render_posemaps
from posemap_fast.seeding import step_generator
from posemap_fast.train.nerfp import TrainingViews
from posemap_fast.train.posemap_distance import posemap_distance
from posemap_fast.train.random_views import RandomViewSource, ViewBank
from posemap_fast.train.replay import RandomViews, ViewReplay, draw_views
from posemap_fast.train.rvs import ViewSampler
from posemap_fast.train.selection import BestState, network_input
from posemap_fast.train.view_cache import ViewCache

__all__ = ["APRStage", "APRTrainConfig", "LossWeights", "OnlineMap", "rendered_size"]


@dataclass(frozen=True)
class LossWeights:
    """Weights of the four losses; 0 switches one off together with its cost."""

    pose: float = 1.0
    image: float = 1.0
    posemap: float = 1.0
    rvs: float = 1.0
    rvs_posemap: float = 1.0  # the PoseMap part of the RVS loss, relative to its pose part
    points: float = 1.0  # scene points read off predicted PoseMaps, relative to the PoseMaps themselves
    sigma: float = 1.0  # of the predicted error sizes; they read the network's features and do not shape them


@dataclass(frozen=True)
class APRTrainConfig:
    """Schedule of stage 3."""

    steps: int = 1000
    batch: int = 8  # real images per step (and as many cached renders)
    rvs_batch: int = 8  # fresh views rendered per step
    replay_batch: int = 0  # views of earlier steps per step; PoseMaps at their predicted poses are not rendered
    replay_capacity: int = 1024  # views kept for that
    render_scale: float = 0.5  # size of rendered views relative to the camera's; 0 = the network's input size
    lr: float = 1e-3  # Adam
    schedule: Literal["cosine", "constant"] = "cosine"
    pose_loss: Literal["l2", "mse"] = "l2"  # norm of the 12-vector (paper) or mean square (DFNet's code)
    translation_weight: float = 1.0  # of the translation entries of the residual; the paper's is 1, in metres
    triplet_distance: Literal["channels", "width"] = "channels"  # distance of the triplet loss; width = DFNet's code
    triplet_margin: float = 1.0
    grad_clip: float = 1.0  # gradient norm limit; 0 = off
    validate_every: int = 50  # steps
    select_from: float = 0.7  # share of the steps after which a state may be chosen on validation
    subset: float = 1.0  # share of the training images used (paper: .2 indoor, .5 outdoor), every k-th
    ema: float = 0.0  # decay of an average of the weights, which is then what is chosen from; 0 = off, .99 is usual
    precision: Literal["float32", "bfloat16"] = "float32"  # of the network's pass; bfloat16 is slower on most CPUs
    augment: AugmentConfig = field(default_factory=AugmentConfig)  # photometric changes of all images of a step
    weights: LossWeights = field(default_factory=LossWeights)

    def __post_init__(self) -> None:
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema must be in [0, 1); got {self.ema}")
        if self.steps < 1 or self.batch < 1 or self.rvs_batch < 0:
            raise ConfigError(f"steps and batch must be >= 1, rvs_batch >= 0; got {self}")
        if not 0 <= self.render_scale <= 1:
            raise ConfigError(f"render_scale must be in [0, 1]; got {self.render_scale}")
        if not 0 < self.subset <= 1:
            raise ConfigError(f"subset must be in (0, 1]; got {self.subset}")
        if self.weights.image > 0 and self.batch < 2:
            raise ConfigError("weights.image needs batch >= 2: it compares images with each other; or set it to 0")

    @property
    def teaches_poses(self) -> bool:
        """Whether any loss but that of the error sizes is on."""
        weights = self.weights
        has_views = weights.rvs > 0 and self.rvs_batch > 0
        return weights.pose > 0 or weights.image > 0 or weights.posemap > 0 or has_views


@dataclass
class OnlineMap:
    """The frozen map and what the loop needs around it."""

    nerfp: NeRFP
    renderer: Renderer
    sampler: ViewSampler
    cache: ViewCache
    feature_scale: float  # root mean square norm of a PoseMap cell: makes the L2 of PoseMaps scale-free
    readout: PoseMapReadout | None = None  # scene points from PoseMaps, for networks that predict PoseMaps
    bank: Path | None = None  # folder that keeps random views for other networks on the same map and seed


class APRStage:
    """Trains `net`; `best.state` is the one to use (chosen on validation)."""

    def __init__(
        self,
        config: APRTrainConfig,
        net: APRNet,
        online: OnlineMap,
        views: TrainingViews,
        validation: TrainingViews,
        seed: int,
        name: str = "apr",
    ):
        self.name = name
        self.config = config
        self.n_steps = config.steps
        self.net, self.online, self.views = net, online, views
        self.seed = seed
        stride = max(1, round(1 / config.subset))
        self.chosen = torch.arange(0, len(views), stride)
        online.nerfp.requires_grad_(False)
        self.optimizer = torch.optim.Adam(net.parameters(), lr=config.lr, fused=True)
        self.average = None
        if config.ema > 0:
            self.average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        chosen_from = net if self.average is None else cast(APRNet, self.average.module)
        spread = {id(p) for p in net.spread_parameters()}
        self.has_spread = len(spread) > 0
        self.clipped = [p for p in net.parameters() if id(p) not in spread]
        self.best = BestState(
            chosen_from, validation, config.validate_every, config.steps, first=round(config.select_from * config.steps)
        )
        self.render_size = rendered_size(views.camera, config.render_scale, net.config.input_size)
        has_views = config.weights.rvs > 0 and config.rvs_batch > 0
        self.random_views = self._random_view_source() if has_views else None
        capacity = config.replay_capacity if has_views and config.replay_batch > 0 else 0
        self.replay = ViewReplay(capacity, self.render_size, views.c2w.device)
        net.train()

    def step(self, k: int) -> dict[str, float]:
        """One step of Adam on real images, their renders and fresh random views."""
        generator = step_generator(self.seed, self.name, k)
        self._set_rate(k)
        index = self.chosen[torch.randperm(len(self.chosen), generator=generator)[: self.config.batch]]
        losses = self._losses(index.to(self.views.c2w.device), self._draw_views(k, generator), generator)
        loss = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.config.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.clipped, self.config.grad_clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.net)
        values = {"loss": float(loss.detach())} | {name: float(v.detach()) for name, v in losses.items()}
        return values | self.best.look(k + 1)

    def _set_rate(self, k: int) -> None:
        if self.config.schedule == "cosine":
            factor = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * k / self.n_steps)).item())
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * max(0.01, factor)

    def _losses(
        self, index: torch.Tensor, rvs: RandomViews | None, generator: torch.Generator
    ) -> dict[str, torch.Tensor]:
        """The weighted losses that are switched on, of the training images `index` and of random views."""
        weights, online = self.config.weights, self.online
        n = index.numel()
        poses = self.views.c2w[index]
        batch = [network_input(self.views.images[index])]
        n_features = n
        if weights.image > 0:
            batch.append(network_input(online.cache.renders[index]))
            n_features = 2 * n
        if rvs is not None:
            batch.append(network_input(rvs.images))
        images = torch.cat([self.net.resized(part) for part in batch])
        images = augment_images(images, self.config.augment, generator)
        is_mixed = self.config.precision != "float32"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=is_mixed):
            output = self.net(images, n_features=n_features if weights.image > 0 and n > 1 else 0)
        features = output.features
        losses: dict[str, torch.Tensor] = {}
        known = torch.cat([poses] * (n_features // n))
        if weights.pose > 0:
            losses["pose"] = weights.pose * self._pose_loss(output, slice(0, n_features), known)
        if features is not None:
            losses["image"] = weights.image * triplet_loss(
                features[:, n:],
                features[:, :n],
                margin=self.config.triplet_margin,
                distance=self.config.triplet_distance,
            )
        if rvs is not None:
            losses["rvs"] = weights.rvs * self._pose_loss(output, slice(n_features, None), rvs.poses)
        if weights.sigma > 0 and self.has_spread:  # random views are new to the network: their errors are honest ones
            losses["sigma"] = weights.sigma * (
                self._sigma_loss(output, slice(0, n), poses)
                if rvs is None
                else self._sigma_loss(output, slice(n_features, None), rvs.poses)
            )
        compare = self._rendered_posemap_losses if output.posemap is None else self._predicted_posemap_losses
        return losses | compare(output, index, n_features, rvs)

    def _predicted_posemap_losses(
        self, output: APROutput, index: torch.Tensor, n_features: int, rvs: RandomViews | None
    ) -> dict[str, torch.Tensor]:
        """PoseMaps predicted from all images of the pass against those at the true poses."""
        weights, online, predicted = self.config.weights, self.online, output.posemap
        assert predicted is not None and self.net.refiner is not None
        distance = functools.partial(
            posemap_distance, self.net.refiner, scale=online.feature_scale, points=weights.points
        )
        losses = {}
        if weights.posemap > 0:
            known = online.cache.posemaps[index].repeat(n_features // index.numel(), 1, 1, 1)
            losses["posemap"] = weights.posemap * distance(predicted[:n_features], known)
        if rvs is not None and rvs.posemaps is not None:
            apart = distance(predicted[n_features:], rvs.posemaps)
            losses["rvs_posemap"] = weights.rvs * weights.rvs_posemap * apart
        return losses

    def _rendered_posemap_losses(
        self, output: APROutput, index: torch.Tensor, n_features: int, rvs: RandomViews | None
    ) -> dict[str, torch.Tensor]:
        """PoseMaps at the predicted poses of real images and fresh random views against those at the true poses."""
        weights, online = self.config.weights, self.online
        n = index.numel() if weights.posemap > 0 else 0
        known = None if rvs is None else rvs.posemaps
        n_random = 0 if known is None else len(known)
        poses = torch.cat([output.c2w[:n], output.c2w[n_features : n_features + n_random]])
        if poses.shape[0] == 0:
            return {}
        maps = render_posemaps(online.renderer, online.nerfp, poses, self.views.camera)
        losses = {}
        if n:
            losses["posemap"] = weights.posemap * posemap_cosine(maps[:n], online.cache.posemaps[index])
        if known is not None:
            distance = posemap_l2(maps[n:], known, scale=online.feature_scale)
            losses["rvs_posemap"] = weights.rvs * weights.rvs_posemap * distance
        return losses

    @torch.no_grad()
    def _posemaps(self, poses: torch.Tensor) -> torch.Tensor:
        return render_posemaps(self.online.renderer, self.online.nerfp, poses, self.views.camera)

    def _sigma_loss(self, output: APROutput, part: slice, c2w: torch.Tensor) -> torch.Tensor:
        """Predicted against actual errors of some views of the pass."""
        found = output.c2w[part].detach()
        translation = (found[:, :3, 3] - c2w[:, :3, 3]).norm(dim=1) / self.net.pose_frame.scale
        rotation = torch.deg2rad(rotation_angle_deg(found[:, :3, :3], c2w[:, :3, :3]))
        return laplace_nll(torch.stack([translation, rotation], dim=1), output.log_sigma[part])

    def _pose_loss(self, output: APROutput, part: slice, c2w: torch.Tensor) -> torch.Tensor:
        target = self.net.pose_frame.encode(c2w)
        distance = pose_l2 if self.config.pose_loss == "l2" else pose_mse
        weight = self.config.translation_weight
        losses = [distance(vectors[part], target, translation_weight=weight) for vectors in output.pose_vectors]
        return torch.stack(losses).sum()

    def _random_view_source(self) -> RandomViewSource:
        online, config = self.online, self.config
        codes = online.nerfp.appearance_code(self.views.histograms)
        bank = None
        if online.bank is not None:
            bank = ViewBank(online.bank, config.steps, config.rvs_batch, self.render_size)
        return RandomViewSource(
            online.nerfp,
            online.renderer,
            online.sampler,
            self.views.camera,
            None if codes is None else codes.detach(),
            image_size=self.render_size,
            n_views=config.rvs_batch,
            appearance=online.sampler.config.appearance,
            seed=self.seed,
            bank=bank,
        )

    def _draw_views(self, k: int, generator: torch.Generator) -> RandomViews | None:
        """Fresh views of step k, and views of earlier steps."""
        if self.random_views is None:
            return None
        return draw_views(
            self.random_views,
            self.replay,
            self.config.replay_batch,
            k,
            generator,
            self._posemaps if self.config.weights.rvs_posemap > 0 else None,
            of_kept=self.net.refiner is not None,  # PoseMaps at predicted poses are rendered for fresh views only
        )

    @property
    def seconds_saved(self) -> float:
        """What rendering the random views that came from a bank had taken."""
        return 0.0 if self.random_views is None else self.random_views.seconds_saved

    def state_dict(self) -> dict[str, Any]:
        """Network, optimizer, the best state so far and the views kept for replay."""
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best.state,
            "replay": self.replay.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "seconds_saved": self.seconds_saved,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best.state = state["best"]
        self.replay.load_state_dict(state["replay"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.random_views is not None:
            self.random_views.seconds_saved = state["seconds_saved"]


def rendered_size(camera: Camera, scale: float, network: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of rendered views: a share of the camera's size, or with 0 the network's input size."""
    if scale == 0:
        return network
    return max(1, round(camera.height * scale)), max(1, round(camera.width * scale))
