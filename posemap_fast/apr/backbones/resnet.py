"""ResNet-18 and ResNet-34 (He et al. 2016, arXiv:1512.03385) with torchvision's layout.

The modules carry torchvision's names, so `conv1.*`, `bn1.*`, `layerN.M.*` of its checkpoints load unchanged; the
classifier `fc.*` is left out. A stage here ends *before* the ReLU of its last block and the next block applies it,
which gives the taps; likewise the stem pools before its ReLU, which is the same because ReLU is monotone.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from posemap_fast.apr.backbones import weights as sources
from posemap_fast.apr.backbones.base import BACKBONES, Backbone, BackboneOutput

__all__ = ["ResNet18", "ResNet34"]

_WIDTHS = (64, 128, 256, 512)
_FIRST_RESIDUAL_SCALE = 0.1  # of random weights; not 0, at which the convolutions before it would not learn at first


class _Block(nn.Module):
    """relu(x) -> s(relu(x)) + f(relu(x)), before the ReLU; s is the identity or a strided 1x1 convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(x)
        residual = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        return residual + self.downsample(x)


class _ResNet(Backbone):
    """Stem and four stages of basic blocks; a subclass names the checkpoint and says how many blocks."""

    tap_channels = (_WIDTHS[0], _WIDTHS[1], _WIDTHS[3])
    tap_strides = (2, 8, 32)
    local_channels = _WIDTHS[1]
    out_channels = _WIDTHS[3]
    out_stride = 32
    min_size = 32

    name: str  # in BACKBONES
    n_blocks: tuple[int, int, int, int]  # of layer1 to layer4
    imagenet_url: str

    def __init__(self, weights: str | None = sources.RANDOM) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, _WIDTHS[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.layer1 = _stage(_WIDTHS[0], _WIDTHS[0], self.n_blocks[0], stride=1)
        self.layer2 = _stage(_WIDTHS[0], _WIDTHS[1], self.n_blocks[1], stride=2)
        self.layer3 = _stage(_WIDTHS[1], _WIDTHS[2], self.n_blocks[2], stride=2)
        self.layer4 = _stage(_WIDTHS[2], _WIDTHS[3], self.n_blocks[3], stride=2)
        if weights == sources.RANDOM:
            self._initialise()
        sources.initialise(self, self.name, weights, ignore=("fc.",), imagenet_url=self.imagenet_url)

    def _initialise(self) -> None:
        """As torchvision, but blocks start near the identity: maps do not grow while statistics are still (0, 1)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, _Block):
                nn.init.constant_(module.bn2.weight, _FIRST_RESIDUAL_SCALE)

    def forward(self, images: torch.Tensor, with_taps: bool = True) -> BackboneOutput:
        """(B, 3, H, W) in [0, 1] -> taps after bn1, layer2 and layer4 before the ReLU, and layer4 after it."""
        stem = self.bn1(self.conv1(self.normalise(images)))  # stride 2
        x = functional.max_pool2d(stem, 3, stride=2, padding=1)
        middle = self.layer2(self.layer1(x))  # stride 8
        deep = self.layer4(self.layer3(middle))  # stride 32
        taps = [stem, middle, deep] if with_taps else []
        return BackboneOutput(taps, functional.relu(middle), functional.relu(deep))


def _stage(in_channels: int, channels: int, n_blocks: int, stride: int) -> nn.Sequential:
    first = _Block(in_channels, channels, stride)
    return nn.Sequential(first, *(_Block(channels, channels, stride=1) for _ in range(n_blocks - 1)))


@BACKBONES.register("resnet18")
class ResNet18(_ResNet):
    """Taps at strides 2, 8 and 32; final map (B, 512, ceil(H / 32), ceil(W / 32)), 11.2 M parameters.

    Cost: 0.072 GFLOP (two per multiply-add) per 1000 pixels forward, an eighth of VGG-16.
    """

    name = "resnet18"
    n_blocks = (2, 2, 2, 2)
    imagenet_url = "https://download.pytorch.org/models/resnet18-f37072fd.pth"


@BACKBONES.register("resnet34")
class ResNet34(_ResNet):
    """As `ResNet18` with the same maps and 21.3 M parameters; 0.146 GFLOP per 1000 pixels forward."""

    name = "resnet34"
    n_blocks = (3, 4, 6, 3)
    imagenet_url = "https://download.pytorch.org/models/resnet34-b627a593.pth"
