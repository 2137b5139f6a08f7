"""A ring of random views rendered in earlier steps: they cost a network pass, not a rendering."""

from __future__ import annotations

from typing import Any

import torch

from posemap_fast.seeding import integers

__all__ = ["ViewReplay"]


class ViewReplay:
    """Keeps the last `capacity` rendered views with their poses.

    Args:
        capacity: views kept; 0 switches replay off.
        image_size: (height, width) of the views.
        device: where they are kept.
    """

    def __init__(self, capacity: int, image_size: tuple[int, int], device: torch.device | str = "cpu"):
        self.images = torch.zeros(capacity, *image_size, 3, dtype=torch.uint8, device=device)
        self.poses = torch.zeros(capacity, 4, 4, device=device)
        self.n_added = 0

    def __len__(self) -> int:
        return min(self.n_added, self.images.shape[0])

    def add(self, images: torch.Tensor, poses: torch.Tensor) -> None:
        """Store views (n, h, w, 3) uint8 and poses (n, 4, 4) over the oldest ones."""
        capacity = self.images.shape[0]
        if capacity == 0:
            return
        slots = (self.n_added + torch.arange(images.shape[0], device=self.poses.device)) % capacity
        self.images[slots], self.poses[slots] = images, poses
        self.n_added += images.shape[0]

    def draw(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Up to `n` views drawn with replacement; none while the ring holds fewer than `n`."""
        n = n if len(self) >= n else 0
        index = integers(generator, max(1, len(self)), n, self.poses.device)
        return self.images[index], self.poses[index]

    def state_dict(self) -> dict[str, Any]:
        """The filled part of the ring."""
        return {"images": self.images[: len(self)], "poses": self.poses[: len(self)], "n_added": self.n_added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        n = state["images"].shape[0]
        self.images[:n], self.poses[:n] = state["images"], state["poses"]
        self.n_added = state["n_added"]
