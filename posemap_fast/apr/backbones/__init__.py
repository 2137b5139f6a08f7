"""APR backbones; a new one is a file here, a registration and an import below."""

from __future__ import annotations

from posemap_fast.apr.backbones.base import BACKBONES, Backbone, BackboneOutput
from posemap_fast.apr.backbones.compact import Compact
from posemap_fast.apr.backbones.resnet import ResNet18, ResNet34
from posemap_fast.apr.backbones.vgg16 import VGG16

__all__ = ["BACKBONES", "VGG16", "Backbone", "BackboneOutput", "Compact", "ResNet18", "ResNet34"]
