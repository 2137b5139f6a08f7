"""APRNet: one image -> camera pose, and during training the feature maps of the triplet loss.

PoseMap (arXiv:2403.12800, section 3.3) with DFNet's network (arXiv:2204.00559): backbone, pose head, feature branch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from posemap_fast.apr.backbones import BACKBONES
from posemap_fast.apr.features import FeatureBranch
from posemap_fast.apr.heads import HEADS, HeadOptions
from posemap_fast.apr.pose_frame import PoseFrame
from posemap_fast.apr.posemap_refiner import PoseMapRefiner
from posemap_fast.checks import expect_shape
from posemap_fast.errors import ConfigError, ShapeError
from posemap_fast.geometry import Camera
from posemap_fast.seeding import stream_seed

__all__ = ["APRConfig", "APRNet", "APROutput", "build_aprnet"]


@dataclass(frozen=True)
class APRConfig:
    """The network; defaults suit two CPU cores, the paper's values stand in the comments."""

    backbone: str = "compact"  # a name in BACKBONES; paper: vgg16
    weights: str = "random"  # 'random', 'imagenet' (vgg16, resnet18, resnet34) or a checkpoint file; paper: imagenet
    input_size: tuple[int, int] = (120, 160)  # height, width in px that images are resized to; paper: (240, 427)
    head: str = "grid_mlp"  # a name in HEADS; paper: gap_linear
    head_options: HeadOptions = field(default_factory=HeadOptions)
    pose_from: Literal["head", "posemap"] = "head"  # posemap: solved for from the PoseMap of the image; paper: head
    posemap_width: int = 128  # channels inside the branch that predicts PoseMaps
    posemap_channels: int = 256  # of the map's PoseMaps; training fills it in, as the next
    posemap_cells: tuple[int, int] = (0, 0)  # rows, columns of the map's PoseMaps
    feature_dim: int = 64  # channels of the feature maps; paper: 128
    feature_hidden: int = 32  # channels between the two convolutions; paper: 64
    feature_kernel: int = 3  # px, odd; paper: 5
    feature_stride: int = 8  # input px per feature cell, common to all levels; paper: 1

    def __post_init__(self) -> None:
        if len(self.input_size) != 2 or min(self.input_size) < 1:
            raise ConfigError(f"apr: input_size must be (height, width) in pixels, both >= 1; got {self.input_size}")
        if min(self.feature_dim, self.feature_hidden, self.feature_stride) < 1:
            raise ConfigError("apr: feature_dim, feature_hidden and feature_stride must be >= 1")
        if self.feature_kernel < 1 or self.feature_kernel % 2 == 0:
            raise ConfigError(f"apr: feature_kernel must be odd and >= 1; got {self.feature_kernel}")

    @property
    def feature_size(self) -> tuple[int, int]:
        """Rows and columns of the feature maps."""
        height, width = self.input_size
        return -(-height // self.feature_stride), -(-width // self.feature_stride)


@dataclass(frozen=True)
class APROutput:
    """What one pass gives.

    Attributes:
        vector12: (B, 12) row-major [R | t] in the normalised pose frame, R not orthogonalised: the L_pose input.
        head12: (B, 12) of the pose head alone, the start of the solver; `vector12` itself where there is none.
        c2w: (B, 4, 4) camera-to-world in world units, R the nearest rotation.
        head_c2w: (B, 4, 4) the same of `head12`.
        log_sigma: (B, 2) logarithm of the expected errors, see `PoseHead.log_sigma`.
        features: (levels, B, feature_dim, *feature_size), shallow to deep; None unless asked for.
        posemap: (B, posemap_channels, *posemap_cells) predicted from the image; None unless the pose comes from it.
    """

    vector12: torch.Tensor
    head12: torch.Tensor
    c2w: torch.Tensor
    head_c2w: torch.Tensor
    log_sigma: torch.Tensor
    features: torch.Tensor | None = None
    posemap: torch.Tensor | None = None

    @property
    def pose_vectors(self) -> list[torch.Tensor]:
        """Every (B, 12) that L_pose teaches: the pose, and the head's own where the pose is solved for from there."""
        return [self.vector12] if self.posemap is None else [self.vector12, self.head12]


class APRNet(nn.Module):
    """Absolute pose regression network; make it with `build_aprnet`.

    Images may have any size: they are resized to `config.input_size` inside, with antialiasing when they shrink.
    Everything is differentiable, in the images too (alignment sends gradients through rendered images).
    """

    def __init__(
        self, config: APRConfig, pose_frame: PoseFrame, load_weights: bool = True, camera: Camera | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.pose_frame = pose_frame
        self.backbone = BACKBONES.get(config.backbone)(config.weights if load_weights else None)
        if min(config.input_size) < self.backbone.min_size:
            raise ConfigError(
                f"apr: input_size {config.input_size} is too small for {config.backbone}, "
                f"which needs {self.backbone.min_size} pixels or more"
            )
        self.head = HEADS.get(config.head)(self.backbone.out_channels, config.head_options)
        self.feature_branch = FeatureBranch(
            self.backbone.tap_channels, config.feature_hidden, config.feature_dim, config.feature_kernel
        )
        self.refiner: PoseMapRefiner | None = None
        if config.pose_from == "posemap":
            if camera is None:
                raise ConfigError("network: pose_from=posemap needs the camera of the images")
            self.refiner = PoseMapRefiner(
                self.backbone.local_channels,
                self.backbone.out_channels,
                config.posemap_channels,
                config.posemap_cells,
                camera,
                config.posemap_width,
            )
        self._is_norm_frozen = False

    def forward(self, images: torch.Tensor, n_features: int = 0) -> APROutput:
        """Poses of all images, and the feature maps of the first `n_features` from the same backbone pass.

        Args:
            images: (B, 3, H, W) float in [0, 1].
            n_features: 0 to B; the images whose features a loss compares.
        Raises:
            ShapeError: wrong shape or dtype.
        """
        encoded = self.backbone(self.resized(images), with_taps=n_features > 0)
        summary = self.head.features(encoded.final)
        head12 = _at_least_float32(self.head.output(summary))
        features = None
        if n_features > 0:
            taps = [tap[:n_features] for tap in encoded.taps]
            features = self.feature_branch(taps, self.config.feature_size)
        with torch.autocast(head12.device.type, enabled=False):
            head_c2w = self.pose_frame.decode(head12)
        if self.refiner is None:
            log_sigma = _at_least_float32(self.head.log_sigma(summary))
            return APROutput(head12, head12, head_c2w, head_c2w, log_sigma, features)
        refined = self.refiner(encoded.local, encoded.final, head12, head_c2w[:, :3, :3])
        with torch.autocast(head12.device.type, enabled=False):
            c2w = self.pose_frame.decode(refined.vector12)
        return APROutput(refined.vector12, head12, c2w, head_c2w, refined.log_sigma, features, refined.posemap)

    def spread_parameters(self) -> list[nn.Parameter]:
        """What `log_sigma` is read off with: it learns the errors and does not shape the poses; none in the solver."""
        return list(self.head.spread.parameters()) if self.refiner is None else []

    def regress(self, images: torch.Tensor) -> torch.Tensor:
        """Only the (B, 12) vectors: what an exported graph holds, free of the SVD where the pose is the head's."""
        if self.refiner is not None:
            return self(images).vector12
        return self.head(self.backbone(self.resized(images), with_taps=False).final)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Only the feature maps (levels, B, feature_dim, *feature_size) of images (B, 3, H, W)."""
        return self.feature_branch(self.backbone(self.resized(images)).taps, self.config.feature_size)

    def freeze_batch_norm(self) -> None:
        """From now on batch norms use their running statistics, also in `train()`, and do not learn.

        For batches of one (alignment), whose statistics mean nothing.
        """
        self._is_norm_frozen = True
        for norm in self._norms():
            norm.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> APRNet:
        """As `nn.Module.train`, but frozen batch norms stay in evaluation."""
        super().train(mode)
        if self._is_norm_frozen:
            for norm in self._norms():
                norm.eval()
        return self

    def _norms(self) -> list[nn.BatchNorm2d]:
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

    def resized(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) at the network's input size, with antialiasing when they shrink.

        Raises:
            ShapeError: wrong shape or dtype.
        """
        expect_shape("APRNet", "images", images, (None, 3, None, None))
        if not images.is_floating_point():
            raise ShapeError(f"APRNet: images must be float in [0, 1]; got {images.dtype}: divide by 255 first")
        if tuple(images.shape[2:]) == self.config.input_size:
            return images
        return functional.interpolate(
            images, size=self.config.input_size, mode="bilinear", align_corners=False, antialias=True
        )


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """What mixed precision left in half is brought back: the SVD and the losses need it."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def build_aprnet(
    config: APRConfig,
    pose_frame: PoseFrame,
    mean_c2w: torch.Tensor | None = None,
    seed: int = 0,
    load_weights: bool = True,
    camera: Camera | None = None,
) -> APRNet:
    """A new network, channels last in memory; the same weights for the same config and seed.

    Args:
        mean_c2w: (4, 4) mean training pose (`geometry.mean_pose`), about which the first predictions lie;
            None: the frame's centre, unrotated.
        seed: of the random weights; the global generator is left as it was.
        load_weights: False when a state dict is loaded next: `config.weights` is then not read.
        camera: of the images; needed with `config.pose_from` posemap.
    Raises:
        ConfigError, BackendError, FileFormatError: unknown names or unusable weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "apr/initial weights"))
        net = APRNet(config, pose_frame, load_weights, camera)
    start = torch.eye(4, dtype=torch.float64) if mean_c2w is None else mean_c2w.detach().double().cpu()
    if mean_c2w is None:
        start[:3, 3] = torch.tensor(pose_frame.center, dtype=torch.float64)
    net.head.start_at(pose_frame.encode(start))
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
