"""Stage 1 draws its pixels inside the border of the images, and each ray has the colour of its own pixel."""

from __future__ import annotations

import pytest
import torch

from posemap_fast.data import NO_BORDER, Border
from posemap_fast.geometry import project_points
from posemap_fast.train import FieldStage, FieldTrainConfig, TrainingViews


@pytest.mark.parametrize("border", [NO_BORDER, Border(2, 3, 5, 7)])
def test_pixels_are_drawn_inside_the_border(tiny_map, poses, camera, border: Border) -> None:
    images = torch.randint(0, 255, (3, 36, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = TrainingViews.of(images, poses, camera, border)
    stage = FieldStage(FieldTrainConfig(steps=2, samples_per_step=1 << 18), *tiny_map, views, seed=0)
    draws = [stage._draw(torch.Generator().manual_seed(k)) for k in range(8)]
    index, origins, directions, colours = (torch.cat(part) for part in zip(*draws, strict=True))
    assert len(index) == 8 * 4096
    reached = torch.zeros(36, 48, dtype=torch.bool)
    for i in range(3):
        mine = index == i
        pixels, _ = project_points(camera, views.c2w[i], origins[mine] + 2 * directions[mine])
        column, row = pixels.floor().long().T
        torch.testing.assert_close(pixels, torch.stack([column, row], dim=1) + 0.5, atol=1e-3, rtol=0)
        torch.testing.assert_close(colours[mine], images[i, row, column].float() / 255)
        reached[row, column] = True
    inside = torch.zeros(36, 48, 1, dtype=torch.bool)
    border.inside(inside).fill_(True)
    assert torch.equal(reached, inside[..., 0])
