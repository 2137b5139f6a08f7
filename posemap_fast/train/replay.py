"""The random views of a step: fresh ones, and some of earlier steps, which cost a network pass, not a rendering."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from posemap_fast.seeding import integers
from posemap_fast.train.random_views import RandomViewSource

__all__ = ["RandomViews", "ViewReplay", "draw_views"]


class RandomViews(NamedTuple):
    """Views at random poses: the fresh ones first, then those of earlier steps."""

    poses: torch.Tensor  # (n, 4, 4)
    images: torch.Tensor  # (n, h, w, 3) uint8
    posemaps: torch.Tensor | None  # (m, C, rows, cols) at the first m poses; None where none were asked for


class ViewReplay:
    """Keeps the last `capacity` rendered views with their poses, and their PoseMaps where they are known.

    Args:
        capacity: views kept; 0 switches replay off.
        image_size: (height, width) of the views.
        device: where they are kept.
    """

    def __init__(self, capacity: int, image_size: tuple[int, int], device: torch.device | str = "cpu"):
        self.images = torch.zeros(capacity, *image_size, 3, dtype=torch.uint8, device=device)
        self.poses = torch.zeros(capacity, 4, 4, device=device)
        self.n_added = 0
        self._posemaps: torch.Tensor | None = None  # (capacity, C, rows, cols), once their shape is known
        self._is_rendered = torch.zeros(capacity, dtype=torch.bool, device=device)

    def __len__(self) -> int:
        return min(self.n_added, self.images.shape[0])

    def add(self, images: torch.Tensor, poses: torch.Tensor, posemaps: torch.Tensor | None = None) -> None:
        """Store views (n, h, w, 3) uint8, poses (n, 4, 4) and maybe PoseMaps (n, C, rows, cols) over the oldest."""
        capacity = len(self.poses)
        if capacity == 0:
            return
        slots = (self.n_added + torch.arange(len(poses), device=self.poses.device)) % capacity
        self.images[slots], self.poses[slots] = images, poses
        self.n_added += len(poses)
        self._is_rendered[slots] = False
        if posemaps is not None:
            self._keep(slots, posemaps)

    def draw(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Slots of `n` views drawn with replacement, (n,); none while the ring holds fewer than `n`."""
        n = n if len(self) >= n else 0
        return integers(generator, max(1, len(self)), n, self.poses.device)

    def posemaps(self, slots: torch.Tensor, render: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """PoseMaps (n, C, rows, cols) of some slots; `render` makes those at poses (m, 4, 4) that are not kept."""
        missing = slots[~self._is_rendered[slots]].unique()
        if self._posemaps is None or len(missing) > 0:
            self._keep(missing, render(self.poses[missing]))
        assert self._posemaps is not None
        return self._posemaps[slots]

    def _keep(self, slots: torch.Tensor, posemaps: torch.Tensor) -> None:
        if self._posemaps is None:
            self._posemaps = posemaps.new_zeros(len(self.poses), *posemaps.shape[1:])
        self._posemaps[slots], self._is_rendered[slots] = posemaps, True

    def state_dict(self) -> dict[str, Any]:
        """The filled part of the ring, without the PoseMaps, which are larger and soon rendered again."""
        filled = slice(0, len(self))  # copied: of a view torch.save writes the whole ring
        return {"images": self.images[filled].clone(), "poses": self.poses[filled].clone(), "n_added": self.n_added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        n = state["images"].shape[0]
        self.images[:n], self.poses[:n] = state["images"], state["poses"]
        self.n_added = state["n_added"]
        self._is_rendered.fill_(False)


def draw_views(
    source: RandomViewSource,
    replay: ViewReplay,
    n_kept: int,
    k: int,
    generator: torch.Generator,
    render: Callable[[torch.Tensor], torch.Tensor] | None,
    *,
    of_kept: bool = True,
) -> RandomViews:
    """The views of step k: those of `source`, and `n_kept` of those that the ring holds, which then takes the new ones.

    Args:
        render: PoseMaps (m, C, rows, cols) at poses (m, 4, 4); None: no PoseMaps are wanted.
        of_kept: whether they are wanted of the kept views, too; those that the ring has are not rendered again.
    """
    poses, images = source.draw(k)
    posemaps = fresh = None if render is None else render(poses)
    slots = replay.draw(n_kept, generator)
    all_poses, all_images = torch.cat([poses, replay.poses[slots]]), torch.cat([images, replay.images[slots]])
    if render is not None and fresh is not None and of_kept and len(slots) > 0:
        posemaps = torch.cat([fresh, replay.posemaps(slots, render)])
    replay.add(images, poses, fresh if of_kept else None)
    return RandomViews(all_poses, all_images, posemaps)
