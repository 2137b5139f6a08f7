"""Poses: conventions, round trips, perturbation statistics, the rigidity check."""

from __future__ import annotations

import math

import pytest
import torch

from posemap_fast.errors import ShapeError
from posemap_fast.geometry import (
    c2w_from_vector12,
    check_rigid,
    interpolate_poses,
    invert_c2w,
    look_at,
    make_c2w,
    matrix_from_quaternion,
    mean_pose,
    perturb_poses,
    pose_vector12,
    rigid_defect,
    rotation_angle_deg,
    so3_exp,
)


def random_poses(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rotation = matrix_from_quaternion(torch.randn(n, 4, generator=generator, dtype=torch.float64))
    return make_c2w(rotation, torch.randn(n, 3, generator=generator, dtype=torch.float64))


def test_convention_c2w_maps_camera_points_into_the_world():
    # A camera at (1, 2, 3) that looks along world +x with its image top towards world +z.
    c2w = look_at(torch.tensor([1.0, 2, 3]), torch.tensor([5.0, 2, 3]), torch.tensor([0.0, 0, 1]))
    ahead = c2w @ torch.tensor([0.0, 0, 2, 1])
    assert torch.allclose(ahead, torch.tensor([3.0, 2, 3, 1]))  # 2 ahead of the camera is +2 in world x
    assert not torch.allclose(invert_c2w(c2w) @ torch.tensor([0.0, 0, 2, 1]), torch.tensor([3.0, 2, 3, 1]))
    assert torch.allclose(c2w[:3, 3], torch.tensor([1.0, 2, 3]))  # column 3 is the camera centre


def test_convention_camera_axes_are_opencv_right_down_forward():
    c2w = look_at(torch.zeros(3), torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 0, 1]))
    assert torch.allclose(c2w[:3, 2], torch.tensor([1.0, 0, 0]))  # z looks forward (OpenGL: -z)
    assert torch.allclose(c2w[:3, 1], torch.tensor([0.0, 0, -1]))  # y points down (OpenGL: up)
    assert torch.allclose(c2w[:3, 0], torch.tensor([0.0, -1, 0]))  # x points right
    assert torch.linalg.det(c2w[:3, :3]) == pytest.approx(1.0)


def test_convention_pose_vector_is_row_major_3x4():
    c2w = torch.arange(16.0).reshape(4, 4)
    vector = pose_vector12(c2w)
    assert vector.tolist() == [float(i) for i in range(12)]  # translation sits at 3, 7, 11
    assert vector.tolist() != c2w[:3].T.flatten().tolist()  # not column-major, where it would be 9, 10, 11


def test_inverse_cancels():
    poses = random_poses(20, 0)
    assert torch.allclose(invert_c2w(poses) @ poses, torch.eye(4).double().expand(20, 4, 4), atol=1e-12)


def test_vector_round_trip_is_exact_for_rigid_poses():
    poses = random_poses(20, 1)
    assert torch.allclose(c2w_from_vector12(pose_vector12(poses)), poses, atol=1e-12)


def test_regressed_vector_becomes_a_rigid_pose_and_passes_the_gradient():
    vector = torch.randn(5, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    check_rigid("test", c2w_from_vector12(vector).detach(), tolerance=1e-9)
    assert torch.autograd.gradcheck(c2w_from_vector12, vector)


def test_vector_of_wrong_length_is_refused():
    with pytest.raises(ShapeError, match=r"\(\.\.\., 12\); got \(2, 16\)"):
        c2w_from_vector12(torch.zeros(2, 16))


def test_perturbation_stays_within_its_limits_and_fills_them():
    poses = random_poses(1, 3).expand(4000, 4, 4)
    moved = perturb_poses(poses, 0.2, 10.0, torch.Generator().manual_seed(4))
    shift = moved[:, :3, 3] - poses[:, :3, 3]
    angle = rotation_angle_deg(moved[:, :3, :3], poses[:, :3, :3])
    assert shift.abs().max() <= 0.2 and shift.abs().amax(0).min() > 0.19 and shift.mean(0).abs().max() < 0.01
    assert angle.max() <= 10 * math.sqrt(3) + 0.5 and angle.max() > 14  # three axes of 10 deg each
    check_rigid("test", moved, tolerance=1e-9)


def test_convention_perturbation_turns_about_world_axes():
    generator = torch.Generator().manual_seed(5)
    poses = random_poses(3, 6)
    left = perturb_poses(poses, 0.0, 5.0, generator)[:, :3, :3] @ poses[:, :3, :3].transpose(1, 2)
    same = perturb_poses(torch.eye(4).double().expand(3, 4, 4), 0.0, 5.0, torch.Generator().manual_seed(5))
    assert torch.allclose(left, same[:, :3, :3], atol=1e-12)  # R' R^T does not depend on R: left-multiplied
    right = poses[:, :3, :3].transpose(1, 2) @ (left @ poses[:, :3, :3])
    assert not torch.allclose(right, same[:, :3, :3], atol=1e-3)


def test_perturbation_repeats_with_its_seed_and_respects_bounds():
    poses = random_poses(50, 7)
    bounds = torch.stack([poses[:, :3, 3].amin(0), poses[:, :3, 3].amax(0)])
    first = perturb_poses(poses, 1.0, 5.0, torch.Generator().manual_seed(8), bounds)
    again = perturb_poses(poses, 1.0, 5.0, torch.Generator().manual_seed(8), bounds)
    assert torch.equal(first, again)
    assert (first[:, :3, 3] >= bounds[0]).all() and (first[:, :3, 3] <= bounds[1]).all()


def test_interpolation_meets_both_ends_and_the_middle():
    a, b = random_poses(2, 9)
    assert torch.allclose(interpolate_poses(a, b, 0.0), a, atol=1e-12)
    assert torch.allclose(interpolate_poses(a, b, 1.0), b, atol=1e-12)
    middle = interpolate_poses(a, b, 0.5)
    assert torch.allclose(middle[:3, 3], (a[:3, 3] + b[:3, 3]) / 2)
    assert rotation_angle_deg(a[:3, :3], middle[:3, :3]) == pytest.approx(
        float(rotation_angle_deg(a[:3, :3], b[:3, :3])) / 2
    )


def test_mean_pose_of_symmetric_poses_is_their_centre():
    axis = torch.tensor([[0.0, 0.3, 0.0], [0.0, -0.3, 0.0]]).double()
    poses = make_c2w(so3_exp(axis), torch.tensor([[1.0, 0, 0], [3.0, 2, 0]]).double())
    mean = mean_pose(poses)
    assert torch.allclose(mean, make_c2w(torch.eye(3).double(), torch.tensor([2.0, 1, 0]).double()), atol=1e-12)


def test_mean_pose_of_nothing_is_refused():
    with pytest.raises(ShapeError, match="at least one pose"):
        mean_pose(torch.zeros(0, 4, 4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p[0].fill_(float("nan")), "NaN"),
        (lambda p: p[:3, :3].mul_(1.1), "not rigid"),
        (lambda p: p[:3, 0].neg_(), "reflection"),
        (lambda p: p[3, 0].add_(0.5), "last row"),
    ],
)
def test_rigid_defect_names_what_is_wrong(change, words):
    pose = random_poses(1, 10)[0]
    assert rigid_defect(pose) is None
    change(pose)
    assert words in str(rigid_defect(pose))
    with pytest.raises(ShapeError, match=words):
        check_rigid("test", pose)
