"""Direct alignment on a painted, curved wall whose image from any pose is known by a formula."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from posemap_fast.eval.basin import displaced
from posemap_fast.geometry import Camera, camera_rays, make_c2w, rotation_angle_deg, so3_exp
from posemap_fast.render.picture_alignment import (
    Picture,
    _look,
    _normal_equations,
    _slopes,
    align_to_images,
    blurred,
    huber,
    normalised,
)

CAMERA = Camera(64, 48, 60.0, 58.0, 31.0, 25.0)
N = 4


def wall_depth(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """z of the wall."""
    return 3 + 0.4 * torch.sin(1.5 * x) * torch.cos(1.1 * y)


def paint(points: torch.Tensor) -> torch.Tensor:
    """Colour (..., 3) of points of the wall."""
    x, y, _ = points.unbind(dim=-1)
    waves = torch.stack([(3 * x + y).sin(), (4 * y - x).cos(), (2.5 * x).sin() * (3 * y).cos()], dim=-1)
    return 0.5 + 0.3 * waves


def photograph(c2w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (n, 3, h, w) from poses and how far along its ray each pixel's point lies (n, h * w)."""
    rays_o, rays_d = camera_rays(CAMERA, c2w.double(), CAMERA.pixel_grid().double())
    t = torch.full(rays_o.shape[:2], 3.0, dtype=torch.float64)
    for _ in range(60):  # to where the ray meets the wall
        x, y, z = (rays_o + t[..., None] * rays_d).unbind(dim=-1)
        t = t + (wall_depth(x, y) - z)
    colours = paint(rays_o + t[..., None] * rays_d)
    return colours.reshape(len(c2w), 48, 64, 3).permute(0, 3, 1, 2).float(), t.float()


def picture_from(c2w: torch.Tensor) -> Picture:
    rgb, t = photograph(c2w)
    _, local = camera_rays(CAMERA, torch.eye(4), CAMERA.pixel_grid())
    return Picture(rgb, local * t[..., None], torch.ones_like(t))


def poses(seed: int, angle_deg: float = 3.0, distance: float = 0.2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    turn, move = torch.randn(2, N, 3, generator=generator)
    return make_c2w(so3_exp(math.radians(angle_deg) * turn), distance * move)


def errors(found: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    distance = (found[:, :3, 3] - truth[:, :3, 3]).norm(dim=1)
    return float(distance.max()), float(rotation_angle_deg(found[:, :3, :3], truth[:, :3, :3]).max())


def test_poses_come_home_in_rounds() -> None:
    truth = poses(1)
    images, _ = photograph(truth)
    c2w = displaced(truth, 0.15, 4.0, torch.Generator().manual_seed(8))
    left = []
    for _ in range(5):  # what a round leaves: the two views differ in their mean colours, and in what is blurred
        found = align_to_images(CAMERA, picture_from(c2w), images, c2w, blur_px=1.0, steps=10)
        c2w = found.c2w
        left.append(errors(c2w, truth))
    assert left[0][0] < 0.13 and left[1][0] < 0.03
    assert left[-1][0] < 2e-4 and left[-1][1] < 0.004
    assert bool((found.residual < 1e-5).all()) and bool((found.sigma < 1e-3).all())


def test_exposure_does_not_count_and_images_do_not_influence_each_other() -> None:
    truth = poses(2)
    images, _ = photograph(truth)
    start = displaced(truth, 0.1, 2.0, torch.Generator().manual_seed(8))
    picture = picture_from(start)
    together = align_to_images(CAMERA, picture, images, start, blur_px=1.0, steps=8)
    alone = Picture(*(part[2:3] for part in picture))
    dark = align_to_images(CAMERA, alone, 0.5 * images[2:3] + 0.2, start[2:3], blur_px=1.0, steps=8)
    distance, angle = errors(dark.c2w, together.c2w[2:3])
    assert distance < 0.01 and angle < 0.2
    same = align_to_images(CAMERA, alone, images[2:3], start[2:3], blur_px=1.0, steps=8)
    torch.testing.assert_close(same.c2w, together.c2w[2:3], atol=1e-4, rtol=0)


def test_the_gradient_is_that_of_the_cost() -> None:
    truth = poses(3)
    images, _ = photograph(truth)
    picture = picture_from(displaced(truth, 0.1, 2.0, torch.Generator().manual_seed(8)))
    inner = torch.zeros(48, 64)
    inner[8:-8, 8:-8] = 1  # no point comes into view or leaves it
    picture = picture._replace(weights=inner.reshape(1, -1).expand(N, -1))
    wanted, image = normalised(blurred(picture.rgb, 4.0)).flatten(2), normalised(blurred(images, 4.0))
    layers = torch.cat([image, *_slopes(image)], dim=1)

    def cost(step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weighted sum of the distances after a step from a pose beside the picture's; its gradient."""
        start = so3_exp(torch.tensor([[0.01, -0.02, 0.01]]).expand(N, 3))
        move = torch.tensor([[0.02, 0.01, -0.03]]).expand(N, 3)
        turn, move = start @ so3_exp(step[:, :3]), move + (start @ step[:, 3:, None])[..., 0]
        view = _look(CAMERA, picture, layers, wanted, turn, move)
        return (huber(view.residuals) * view.weights[:, None]).sum(dim=(1, 2)), _normal_equations(CAMERA, view)[1]

    _, gradient = cost(torch.zeros(N, 6))
    for k in range(6):
        step = torch.zeros(N, 6)
        step[:, k] = 1e-3
        measured = (cost(step)[0] - cost(-step)[0]).double() / 2e-3
        torch.testing.assert_close(measured, gradient[:, k], rtol=0.02, atol=0.01 * float(gradient.abs().max()))


def test_sigma_is_the_spread_of_poses_where_the_picture_is_wrong_in_patches() -> None:
    """Errors of the picture that span many pixels: poses scatter as far as sigma says, which J^T W J alone does not."""
    truth = torch.eye(4).expand(60, 4, 4)
    rgb, t = photograph(truth[:1])
    _, local = camera_rays(CAMERA, torch.eye(4), CAMERA.pixel_grid())
    rng = torch.Generator().manual_seed(0)
    wrong = functional.interpolate(0.1 * torch.randn(60, 3, 6, 8, generator=rng), (48, 64), mode="bilinear")
    points = (local * t[..., None]).expand(60, -1, 3)
    picture = Picture(rgb + wrong, points, torch.ones(60, 48 * 64))
    found = align_to_images(CAMERA, picture, rgb.expand(60, 3, 48, 64), truth, blur_px=1.0, steps=10)
    distance = (found.c2w[:, :3, 3] - truth[:, :3, 3]).norm(dim=1)
    angle = rotation_angle_deg(found.c2w[:, :3, :3], truth[:, :3, :3])
    for errors_, sigma in ((distance, found.sigma[:, 0]), (angle, found.sigma[:, 1])):
        assert float(errors_.median()) > 0 and 0.5 < float((errors_ / sigma).median()) < 2


@pytest.mark.parametrize("case", ["turned away", "no weight", "image of nothing", "not finite", "points behind"])
def test_a_pose_that_the_image_says_nothing_of_stays(case: str) -> None:
    truth = poses(5)
    picture, (images, _) = picture_from(truth), photograph(truth)
    if case == "turned away":
        flip = torch.tensor([-1.0, 1.0, -1.0])
        picture = picture._replace(points=picture.points * flip)
    elif case == "no weight":
        picture = picture._replace(weights=torch.zeros_like(picture.weights))
    elif case == "image of nothing":
        images = torch.full_like(images, 0.3)
    elif case == "not finite":
        images = torch.full_like(images, math.nan)
    else:
        picture = picture._replace(points=-picture.points)
    found = align_to_images(CAMERA, picture, images, truth, blur_px=1.0, steps=4)
    torch.testing.assert_close(found.c2w, truth)
    assert bool(torch.isfinite(found.sigma).all()) and bool((found.sigma > 0.5).all())


def test_no_images() -> None:
    none = Picture(torch.zeros(0, 3, 48, 64), torch.zeros(0, 48 * 64, 3), torch.zeros(0, 48 * 64))
    found = align_to_images(CAMERA, none, torch.zeros(0, 3, 48, 64), torch.zeros(0, 4, 4), blur_px=1.0, steps=2)
    assert found.c2w.shape == (0, 4, 4) and found.residual.shape == (0,) and found.sigma.shape == (0, 2)
