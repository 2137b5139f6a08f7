"""Cameras, rays and the scene frame: conventions, round trips, gradients."""

from __future__ import annotations

import json

import pytest
import torch

from posemap_fast.errors import ConfigError, ShapeError
from posemap_fast.geometry import (
    Camera,
    SceneFrame,
    camera_rays,
    make_c2w,
    matrix_from_quaternion,
    project_points,
    so3_exp,
)

CAMERA = Camera(160, 120, 131.376, 130.0, 80.0, 61.0)


def some_poses(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rotation = matrix_from_quaternion(torch.randn(n, 4, generator=generator, dtype=torch.float64))
    return make_c2w(rotation, torch.randn(n, 3, generator=generator, dtype=torch.float64))


def test_convention_pixel_centres_are_at_half():
    grid = Camera(3, 2, 1, 1, 1, 1).pixel_grid()
    assert grid[0].tolist() == [0.5, 0.5]  # not (0, 0)
    assert grid[1].tolist() == [1.5, 0.5]  # x runs fastest, row by row
    assert grid[-1].tolist() == [2.5, 1.5]


def test_convention_ray_through_the_principal_point_looks_along_z():
    pose = some_poses(1, 0)[0]
    rays_o, rays_d = camera_rays(CAMERA, pose, torch.tensor([[80.0, 61.0]]).double())
    assert torch.allclose(rays_o[0], pose[:3, 3]) and torch.allclose(rays_d[0], pose[:3, 2])
    assert not torch.allclose(rays_d[0], -pose[:3, 2])  # OpenGL cameras look along -z
    _, right = camera_rays(CAMERA, torch.eye(4).double(), torch.tensor([[90.0, 71.0]]).double())
    assert right[0, 0] > 0 and right[0, 1] > 0  # larger u is right (+x), larger v is down (+y)


def test_convention_resize_scales_intrinsics_without_half_pixel_shift():
    half = CAMERA.resized(80, 60)
    assert (half.cx, half.cy, half.fx) == (40.0, 30.5, 65.688)
    assert half.cx != (80.0 + 0.5) / 2 - 0.5  # what a pixel-centre-at-integer convention would give
    identity = torch.eye(4).double()
    full = camera_rays(CAMERA, identity, torch.tensor([[10.0, 20.0]]))[1]
    small = camera_rays(half, identity, torch.tensor([[5.0, 10.0]]))[1]
    assert torch.allclose(full, small)


def test_rays_have_unit_length_and_reproject_to_their_pixels():
    poses, pixels = some_poses(4, 1), CAMERA.pixel_grid()[::97].double()
    rays_o, rays_d = camera_rays(CAMERA, poses, pixels)
    assert rays_o.shape == rays_d.shape == (4, len(pixels), 3)
    assert torch.allclose(rays_d.norm(dim=-1), torch.ones(4, len(pixels)).double())
    found, depth = project_points(CAMERA, poses, rays_o + 2.5 * rays_d)
    assert torch.allclose(found, pixels.expand(4, -1, 2), atol=1e-9) and (depth > 0).all()
    assert (project_points(CAMERA, poses, rays_o - 2.5 * rays_d)[1] < 0).all()  # behind the camera


def test_projection_equals_the_intrinsic_matrix():
    point = torch.tensor([[0.3, -0.2, 2.0]]).double()
    homogeneous = CAMERA.K @ point[0]
    found, depth = project_points(CAMERA, torch.eye(4).double(), point)
    assert torch.allclose(found[0], homogeneous[:2] / homogeneous[2]) and float(depth[0]) == 2.0


def test_ray_gradient_in_the_pose_matches_finite_differences():
    twist = torch.tensor([[0.1, -0.2, 0.3, 1.0, 2.0, 3.0]]).double().requires_grad_()
    pixels = CAMERA.pixel_grid()[::4001].double()

    def rays(xi: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return camera_rays(CAMERA, make_c2w(so3_exp(xi[:, :3]), xi[:, 3:]), pixels)

    assert torch.autograd.gradcheck(rays, twist)
    assert torch.autograd.gradcheck(lambda c: camera_rays(CAMERA, c, pixels), some_poses(2, 2).requires_grad_())


def test_wrong_ray_shapes_are_refused():
    with pytest.raises(ShapeError, match=r"pixels must have shape \(n, 2\); got \(4, 3\)"):
        camera_rays(CAMERA, torch.eye(4), torch.zeros(4, 3))
    with pytest.raises(ShapeError, match=r"c2w must have shape"):
        camera_rays(CAMERA, torch.zeros(3, 4), torch.zeros(4, 2))


@pytest.mark.parametrize(("name", "value"), [("fx", 0.0), ("fy", -3.0), ("width", 0), ("cx", float("nan"))])
def test_impossible_camera_is_refused_with_its_field(name, value):
    values = {**CAMERA.to_dict(), name: value}
    with pytest.raises(ConfigError, match=f"camera: {name} must be"):
        Camera.from_dict(values)


def test_camera_survives_json():
    assert Camera.from_dict(json.loads(json.dumps(CAMERA.to_dict()))) == CAMERA


def a_frame(n_cascades: int = 3) -> SceneFrame:
    rotation = so3_exp(torch.tensor([0.2, -0.4, 1.0]).double())
    return SceneFrame(0.17, rotation, torch.tensor([0.4, 0.5, 0.6]), n_cascades)


def test_convention_frame_is_scale_times_rotation_plus_offset():
    frame, point = a_frame(), torch.tensor([1.0, 2.0, 3.0]).double()
    expected = 0.17 * frame.rotation @ point + frame.offset
    assert torch.allclose(frame.to_field(point), expected)
    assert not torch.allclose(frame.to_field(point), 0.17 * (frame.rotation @ point + frame.offset))
    assert not torch.allclose(frame.to_field(point), 0.17 * frame.rotation.T @ point + frame.offset)


def test_frame_round_trips_points_directions_and_lengths():
    frame = a_frame()
    points = torch.randn(7, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.allclose(frame.to_world(frame.to_field(points)), points)
    assert torch.allclose(frame.directions_to_world(frame.directions(points)), points)
    assert torch.allclose(frame.directions(points).norm(dim=1), points.norm(dim=1))
    assert frame.length_to_world(frame.length_to_field(2.5)) == pytest.approx(2.5)
    ends = frame.to_field(points + 1.3 * torch.nn.functional.normalize(points, dim=1)) - frame.to_field(points)
    assert torch.allclose(ends.norm(dim=1), torch.tensor(frame.length_to_field(1.3)).double())


def test_frame_works_in_the_dtype_of_its_argument():
    frame = a_frame()
    assert frame.to_field(torch.zeros(2, 3)).dtype == torch.float32
    assert frame.to_field(torch.zeros(2, 3).double()).dtype == torch.float64


def test_convention_cascades_double_outwards_and_the_last_is_the_unit_cube():
    frame = a_frame(3)
    assert frame.cascade_box(2).tolist() == [[0.0] * 3, [1.0] * 3]
    assert frame.cascade_box(0).tolist() == [[0.375] * 3, [0.625] * 3]  # side 2^-2, centred at 0.5
    assert frame.cascade_box(0).tolist() != [[0.0] * 3, [0.25] * 3]  # not cornered at the origin
    with pytest.raises(ConfigError, match="cascade"):
        frame.cascade_box(3)


def test_frame_survives_json_exactly():
    frame = a_frame()
    again = SceneFrame.from_dict(json.loads(json.dumps(frame.to_dict())))
    assert again.to_dict() == frame.to_dict()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"scale": 0.0}, "scale"),
        ({"scale": 1.0, "n_cascades": 0}, "n_cascades"),
        ({"scale": 1.0, "rotation": torch.diag(torch.tensor([1.0, 1.0, -1.0]))}, "rotation"),
        ({"scale": 1.0, "aabb": torch.zeros(2, 3)}, "aabb"),
    ],
)
def test_impossible_frame_is_refused_with_its_field(values, words):
    with pytest.raises(ConfigError, match=f"scene frame: {words} must be"):
        SceneFrame(**values)
