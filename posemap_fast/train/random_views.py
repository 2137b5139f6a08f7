"""Fresh views for random view synthesis: step k of a seed always shows the same ones, whoever asks.

Poses and pictures are a function of (map, seed, k) alone. Networks that are compared on one map therefore train on the
same views, and `ViewBank` keeps the pictures on disk, so that an ablation renders them once instead of once per row.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from posemap_fast.fields import NeRFP
from posemap_fast.geometry import Camera
from posemap_fast.render import Renderer, render_views
from posemap_fast.seeding import integers, step_generator
from posemap_fast.train.rvs import ViewSampler
from posemap_fast.train.view_cache import to_uint8

__all__ = ["RandomViewSource", "ViewBank"]


class ViewBank:
    """Rendered views of some steps in a folder, read and written through memory maps.

    Args:
        folder: created when it is not there; it belongs to one map, seed and view size.
        n_steps, n_views, image_size: steps, views per step, (height, width).
    """

    def __init__(self, folder: Path, n_steps: int, n_views: int, image_size: tuple[int, int]):
        folder.mkdir(parents=True, exist_ok=True)
        self.poses, kept_poses = _array(folder / "poses.npy", np.float32, (n_steps, n_views, 4, 4))
        self.images, kept_images = _array(folder / "images.npy", np.uint8, (n_steps, n_views, *image_size, 3))
        self.seconds, _ = _array(folder / "seconds.npy", np.float32, (n_steps,))  # that rendering a step took
        self.is_there, _ = _array(folder / "is_there.npy", np.bool_, (n_steps,))  # set last: a killed write is no entry
        if not (kept_poses and kept_images):
            self.is_there[:] = False

    def get(self, k: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Poses (n, 4, 4) and images (n, h, w, 3) uint8 of step k, on the CPU; None when nobody has rendered them."""
        if k >= len(self.is_there) or not self.is_there[k]:
            return None
        return torch.from_numpy(self.poses[k].copy()), torch.from_numpy(self.images[k].copy())

    def put(self, k: int, poses: torch.Tensor, images: torch.Tensor, begin: float) -> None:
        """Keep the views of step k, whose rendering began at `time.monotonic()` = begin; none beyond the end."""
        if k < len(self.is_there):
            self.poses[k], self.images[k] = poses.cpu().numpy(), images.cpu().numpy()  # waits for the device
            self.seconds[k] = time.monotonic() - begin
            self.is_there[k] = True


def _array(path: Path, dtype: type, shape: tuple[int, ...]) -> tuple[np.ndarray, bool]:
    """The memory-mapped array of a file and True; a new one, of zeros, and False where it has not this shape."""
    if path.exists():
        try:
            np.lib.format.open_memmap(path, mode="r")  # refuses a short file, which "r+" would fill with zeros
            found = np.lib.format.open_memmap(path, mode="r+")
        except (ValueError, EOFError, OSError):  # empty, or cut off while it was made
            found = None
        if found is not None and found.shape == shape and found.dtype == dtype:
            return found, True
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape), False


class RandomViewSource:
    """Renders views at random poses.

    Args:
        nerfp, renderer: the frozen map.
        sampler: of the poses.
        camera: of the images.
        codes: (n_train, dim) appearance codes of the training images, or None.
        image_size: (height, width) of the views.
        n_views: per step.
        appearance: 'source' lights a view as the training image its pose comes from, 'random' as any of them.
        seed: of the run.
        bank: where views are kept, or None.
    Attributes:
        seconds_saved: what rendering the views that came from the bank had taken.
    """

    def __init__(
        self,
        nerfp: NeRFP,
        renderer: Renderer,
        sampler: ViewSampler,
        camera: Camera,
        codes: torch.Tensor | None,
        *,
        image_size: tuple[int, int],
        n_views: int,
        appearance: Literal["source", "random"],
        seed: int,
        bank: ViewBank | None = None,
    ):
        self.nerfp, self.sampler, self.camera = nerfp, sampler, camera
        self.renderer = renderer.at_coarseness(sampler.config.coarseness)
        self.codes, self.image_size, self.n_views = codes, image_size, n_views
        self.appearance, self.seed, self.bank = appearance, seed, bank
        self.seconds_saved = 0.0

    def draw(self, k: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Poses (n_views, 4, 4) and images (n_views, h, w, 3) uint8 of step k.

        Args:
            scale: multiplies the sampler's ranges; to be the same whenever a bank is asked for step k.
        """
        device = self.sampler.c2w.device
        kept = None if self.bank is None else self.bank.get(k)
        if kept is not None and self.bank is not None:
            self.seconds_saved += float(self.bank.seconds[k])
            return kept[0].to(device), kept[1].to(device)
        begin = time.monotonic()
        generator = step_generator(self.seed, "rvs", k)
        poses, source = self.sampler.draw(self.n_views, generator, scale)
        if self.appearance == "random":
            source = integers(generator, len(self.sampler.c2w), self.n_views, device)
        view = render_views(
            self.renderer,
            self.nerfp,
            poses,
            self.camera,
            appearance=None if self.codes is None else self.codes[source],
            image_size=self.image_size,
            with_posemap=False,
        )
        images = to_uint8(view.rgb)
        if self.bank is not None:
            self.bank.put(k, poses, images, begin)
        return poses, images
