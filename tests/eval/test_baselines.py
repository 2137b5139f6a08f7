"""The mean pose and the nearest view."""

from __future__ import annotations

import pytest
import torch

from posemap_fast.errors import ShapeError
from posemap_fast.eval import mean_pose_baseline, nearest_view_baseline, nearest_views, pose_errors, summarize
from posemap_fast.eval.baselines import image_descriptor
from posemap_fast.geometry import make_c2w, mean_pose, so3_exp


def smooth_images(n: int, h: int = 60, w: int = 80, seed: int = 0) -> torch.Tensor:
    """Coloured blobs: images with structure at the scale that a descriptor sees."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 6, 8, generator=g)
    fine = torch.nn.functional.interpolate(coarse, size=(h, w), mode="bicubic").clamp(0, 1)
    return (fine.permute(0, 2, 3, 1) * 255).byte()


def line_of_poses(n: int) -> torch.Tensor:
    centres = torch.zeros(n, 3, dtype=torch.float64)
    centres[:, 0] = torch.arange(n)
    return make_c2w(torch.eye(3, dtype=torch.float64).expand(n, 3, 3), centres)


def test_the_mean_pose_baseline_scores_the_mean_pose() -> None:
    g = torch.Generator().manual_seed(0)
    train = make_c2w(so3_exp(torch.randn(9, 3, generator=g).double() * 0.3), torch.randn(9, 3, generator=g).double())
    expected = summarize(*pose_errors(mean_pose(train).expand(4, 4, 4), train[:4]))
    assert mean_pose_baseline(train, train[:4]) == expected
    assert mean_pose_baseline(line_of_poses(3), line_of_poses(3))["mean_t_m"] == pytest.approx(2 / 3)


def test_a_training_image_finds_itself() -> None:
    images = smooth_images(20)
    assert nearest_views(images, images).tolist() == list(range(20))


def test_a_changed_exposure_and_noise_do_not_change_the_answer() -> None:
    images = smooth_images(20)
    g = torch.Generator().manual_seed(1)
    noisy = images.float() * 0.7 + 30 + 8 * torch.randn(images.shape, generator=g)
    assert nearest_views(images, noisy.clamp(0, 255).byte()).tolist() == list(range(20))


def test_a_small_shift_of_the_camera_is_forgiven() -> None:
    images = smooth_images(12)
    assert nearest_views(images[:, :, 4:], images[:, :, :-4]).tolist() == list(range(12))


def test_the_baseline_answers_with_the_pose_of_the_nearest_view() -> None:
    images, poses = smooth_images(8), line_of_poses(8)
    order = torch.tensor([5, 2, 7])
    assert nearest_view_baseline(images, poses, images[order], poses[order])["mean_t_m"] == 0
    assert nearest_view_baseline(images, poses, images[order], poses[order + 0 * order - 1])["mean_t_m"] == 1


def test_images_without_texture_give_finite_descriptors() -> None:
    descriptor = image_descriptor(torch.full((2, 30, 40, 3), 128, dtype=torch.uint8))
    assert descriptor.shape == (2, 240)
    assert torch.isfinite(descriptor).all()


def test_convention_a_bright_right_half_is_an_edge_pointing_right() -> None:
    image = torch.zeros(1, 96, 128, 3, dtype=torch.uint8)
    image[:, :, 70:] = 200
    edges = image_descriptor(image)[0, 144:].reshape(8, 3, 4)
    assert edges.sum(dim=(1, 2)).argmax() == 0
    assert edges[0].sum(dim=0).argmax() == 2


def test_no_test_image_gives_an_empty_summary_and_no_training_image_an_error() -> None:
    images, poses = smooth_images(3), line_of_poses(3)
    assert nearest_view_baseline(images, poses, images[:0], poses[:0])["n_test"] == 0
    with pytest.raises(ShapeError, match="at least one image"):
        nearest_views(images[:0], images)
    with pytest.raises(ShapeError, match=r"must be torch\.uint8"):
        nearest_views(images.float(), images)
