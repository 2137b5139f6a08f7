"""`localizer.pmnet`: one image in, one camera pose out; and the protocol that later localizers share."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch

from posemap_fast.apr import APRConfig, APRNet, APROutput, PoseFrame, build_aprnet, use_winograd
from posemap_fast.config import from_dict, to_dict
from posemap_fast.errors import DatasetError, FileFormatError
from posemap_fast.files import LOCALIZER_MAGIC, read_container, write_container
from posemap_fast.geometry import Camera, quaternion_from_matrix
from posemap_fast.localize.error_model import ErrorModel

__all__ = ["Localizer", "PoseAnswer", "PoseRegressor", "read_image"]

_VERSION = 3
_SUPPORT = "errors.support"  # name of the training poses among the tensors
_ASPECT_TOLERANCE = 0.02  # relative difference of the aspect ratio beyond which an image is refused


@dataclass(frozen=True)
class PoseAnswer:
    """Answer of a localizer for one image."""

    c2w: torch.Tensor  # (4, 4) float64 camera-to-world, OpenCV axes, world units
    sigma_t_m: float | None  # 68 % of errors in translation are below it, None when not calibrated
    sigma_r_deg: float | None  # and in rotation
    ms: float  # time from decoded image to pose

    def to_dict(self, name: str) -> dict[str, Any]:
        """One JSON line: name, c2w, t, q (w, x, y, z), sigma_t_m, sigma_r_deg, ms."""
        return {
            "name": name,
            "c2w": self.c2w.tolist(),
            "t": self.c2w[:3, 3].tolist(),
            "q": quaternion_from_matrix(self.c2w[:3, :3]).tolist(),
            "sigma_t_m": self.sigma_t_m,
            "sigma_r_deg": self.sigma_r_deg,
            "ms": round(self.ms, 3),
        }


class Localizer(Protocol):
    """What every localizer offers."""

    camera: Camera

    def localize(self, image: torch.Tensor) -> PoseAnswer:
        """(H, W, 3) uint8 RGB image -> pose."""
        ...


class PoseRegressor:
    """Absolute pose regression: a single forward pass of APRNet.

    Args:
        net: trained network.
        config: its configuration, stored beside it.
        camera: intrinsics of the training images; a query must come from the same camera (any size).
        metrics: errors on test images and calibration of the intervals at training time, stored in the file.
        errors: model of the network's errors; None: answers carry no sigma.
    """

    def __init__(
        self,
        net: APRNet,
        config: APRConfig,
        camera: Camera,
        metrics: dict[str, Any],
        errors: ErrorModel | None = None,
    ):
        self.net = net.eval()
        self.config = config
        self.camera = camera
        self.metrics = metrics
        self.errors = errors
        self._is_ready = False

    @torch.no_grad()
    def localize(self, image: torch.Tensor) -> PoseAnswer:
        """(H, W, 3) uint8 RGB image of the training camera's aspect ratio -> pose."""
        self._get_ready()
        begin = time.perf_counter()
        pixels = image.to(next(self.net.parameters()).device)
        batch = pixels.permute(2, 0, 1)[None].float().div(255).contiguous(memory_format=torch.channels_last)
        output = self.net(batch)
        c2w = output.c2w[0].double().cpu()
        sigma = self._sigma(output)
        elapsed = 1000 * (time.perf_counter() - begin)
        return PoseAnswer(c2w, *sigma, elapsed)

    def _get_ready(self) -> None:
        """What the first answer waits for, so that all are fast; what is saved stays the same."""
        if not self._is_ready and next(self.net.parameters()).device.type == "cpu":
            use_winograd(self.net)
        self._is_ready = True

    def _sigma(self, output: APROutput) -> tuple[float | None, float | None]:
        """Calibrated expected errors of the first answer, in world units and degrees."""
        if self.errors is None:
            return None, None
        factors = self.metrics.get("calibration", {})
        return self.errors.first_sigma(factors, output.c2w, output.head_c2w, output.log_sigma)

    def save(self, path: str | Path, scene: str) -> None:
        """Write network, camera, frame, configuration and metrics atomically, with a checksum."""
        header = {
            "version": _VERSION,
            "scene": scene,
            "apr": to_dict(self.config),
            "pose_frame": self.net.pose_frame.to_dict(),
            "camera": self.camera.to_dict(),
            "metrics": self.metrics,
            "errors": None if self.errors is None else self.errors.to_dict(),
        }
        tensors = self.net.state_dict()
        if self.errors is not None:
            tensors[_SUPPORT] = self.errors.support
        write_container(path, LOCALIZER_MAGIC, header, tensors)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> PoseRegressor:
        """Read a localizer to `device`.

        Raises:
            FileFormatError: not a localizer, damaged, or of another version.
        """
        header, tensors = read_container(path, LOCALIZER_MAGIC)
        if header.get("version") != _VERSION:
            raise FileFormatError(
                f"{path}: localizer of version {header.get('version')}, this program reads {_VERSION}; train again"
            )
        config = from_dict(APRConfig, header["apr"], str(path))
        camera = Camera.from_dict(header["camera"])
        net = build_aprnet(config, PoseFrame.from_dict(header["pose_frame"]), load_weights=False, camera=camera)
        support = tensors.pop(_SUPPORT, None)
        net.load_state_dict(tensors)
        errors = None if support is None else ErrorModel.from_dict(header["errors"], support)
        return cls(net.to(device), config, camera, header["metrics"], errors)


def read_image(path: str | Path, camera: Camera) -> torch.Tensor:
    """Decode an image file to (H, W, 3) uint8 RGB and check that it can come from `camera`.

    Raises:
        DatasetError: missing, not an image, or of another aspect ratio.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError(f"{path}: no such image; check the path")
    pixels = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise DatasetError(f"{path}: not an image that can be decoded; give a PNG or JPEG file")
    height, width = pixels.shape[:2]
    ratio = (width / height) / (camera.width / camera.height)
    if abs(ratio - 1) > _ASPECT_TOLERANCE:
        raise DatasetError(
            f"{path}: image is {width}x{height}, the localizer was trained on {camera.width}x{camera.height}: "
            "the aspect ratio differs; crop or undistort the image as the training images were"
        )
    size = (camera.width, camera.height)
    if (width, height) != size:
        shrink = width > camera.width
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR)
    return torch.from_numpy(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
