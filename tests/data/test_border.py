"""The dark frame of undistorted images is found, whatever they show; what the scene shows is none."""

from __future__ import annotations

import pytest
import torch

from posemap_fast.data import NO_BORDER, Border, ImageStack, find_border
from posemap_fast.geometry import Camera
from posemap_fast.train import TrainingViews

_HEIGHT, _WIDTH = 80, 120


def pictures(n: int = 20, seed: int = 0) -> torch.Tensor:
    """(n, H, W, 3) uint8: smooth pictures of different brightness."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 6, 8, generator=generator)
    light = 0.3 + 0.7 * torch.rand(n, 1, 1, 1, generator=generator)
    fine = torch.nn.functional.interpolate(coarse * light, size=(_HEIGHT, _WIDTH), mode="bilinear")
    return (255 * fine).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def framed(images: torch.Tensor, border: Border, level: float = 0.0) -> torch.Tensor:
    found = (images * level).to(torch.uint8)
    border.inside(found).copy_(border.inside(images))
    return found


@pytest.mark.parametrize("border", [Border(1, 2, 3, 4), Border(left=1), Border(top=4), Border(2, 2, 2, 2)])
@pytest.mark.parametrize("level", [0.0, 0.5])
def test_a_frame_is_found_on_the_sides_that_have_it(border: Border, level: float) -> None:
    found = find_border(ImageStack.of(framed(pictures(), border, level)))
    for width, real in zip(found, border, strict=True):
        assert (width == 0) if real == 0 else real <= width <= real + 1  # the step shows in the next line as well


def test_pictures_without_frame_have_none_nor_have_few_or_tiny_ones() -> None:
    assert find_border(ImageStack.of(pictures())) == NO_BORDER
    assert find_border(ImageStack.of(framed(pictures(7), Border(2, 2, 2, 2)))) == NO_BORDER
    assert find_border(ImageStack.of(torch.zeros(20, _HEIGHT, _WIDTH, 3, dtype=torch.uint8))) == NO_BORDER
    assert find_border(ImageStack.of(pictures()[:, :2, :2])) == NO_BORDER
    assert find_border(ImageStack.of(pictures()[:0])) == NO_BORDER


def test_what_only_some_images_have_is_of_the_scene() -> None:
    images = pictures()
    images[:15] = framed(images[:15], Border(3, 3, 3, 3))
    assert find_border(ImageStack.of(images)) == NO_BORDER


def test_a_frame_wider_than_a_twentieth_is_not_looked_for() -> None:
    found = find_border(ImageStack.of(framed(pictures(), Border(left=20))))
    assert found == NO_BORDER


def test_inside_is_what_is_left() -> None:
    image = torch.arange(4 * 5 * 1).reshape(4, 5, 1)
    assert Border(1, 1, 2, 1).inside(image).flatten().tolist() == [7, 8, 12, 13]
    assert torch.equal(NO_BORDER.inside(image), image)


def test_views_keep_their_border_when_they_move() -> None:
    camera = Camera(_WIDTH, _HEIGHT, 100.0, 100.0, 60.0, 40.0)
    views = TrainingViews.of(pictures(2), torch.eye(4).expand(2, 4, 4), camera, Border(1, 2, 3, 4))
    assert views.to(torch.device("cpu")).border == Border(1, 2, 3, 4)
