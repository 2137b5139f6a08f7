"""VGG-16 without batch norm (Simonyan and Zisserman 2015, configuration D), the paper's backbone.

The modules sit at torchvision's indices, so `features.N.weight` and `features.N.bias` of its
checkpoint load unchanged. Taps at conv1_2, conv3_3 and conv5_3 as DFNet (arXiv:2204.00559).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from posemap_fast.apr.backbones import weights as sources
from posemap_fast.apr.backbones.base import BACKBONES, Backbone, BackboneOutput

__all__ = ["VGG16"]

_POOL = 0
_PLAN = (64, 64, _POOL, 128, 128, _POOL, 256, 256, 256, _POOL, 512, 512, 512, _POOL, 512, 512, 512, _POOL)
_TAPS = (2, 14, 28)  # conv1_2, conv3_3, conv5_3
_LOCAL = 22  # the ReLU after conv4_3, at stride 8
_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"


@BACKBONES.register("vgg16")
class VGG16(Backbone):
    """13 convolutions and 5 pools; the final map is the last pool, (B, 512, H // 32, W // 32).

    Cost: 0.61 GFLOP per 1000 pixels forward: 11.7 at 160x120, 250 at 854x480.
    """

    tap_channels = (64, 256, 512)
    tap_strides = (1, 4, 16)
    local_channels = 512
    out_channels = 512
    out_stride = 32
    min_size = 32

    def __init__(self, weights: str | None = sources.RANDOM) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in _PLAN:
            if width == _POOL:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        self.features = nn.Sequential(*layers)
        if weights == sources.RANDOM:
            self._initialise_as_torchvision()
        sources.initialise(self, "vgg16", weights, ignore=("classifier.",), imagenet_url=_URL)

    def _initialise_as_torchvision(self) -> None:
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, images: torch.Tensor, with_taps: bool = True) -> BackboneOutput:
        """(B, 3, H, W) in [0, 1] -> taps at conv1_2, conv3_3, conv5_3 before the ReLU, and the last pool."""
        x = self.normalise(images)
        taps: list[torch.Tensor] = []
        is_tapped = False
        for index, layer in enumerate(self.features):
            # The in-place ReLU of the plan would overwrite the tap, so the one after a tap is not.
            x = functional.relu(x) if is_tapped else layer(x)
            is_tapped = with_taps and index in _TAPS
            if is_tapped:
                taps.append(x)
            if index == _LOCAL:
                local = x
        return BackboneOutput(taps, local, x)
