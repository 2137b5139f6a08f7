"""Poses against images: the loaded reading wins where it is right, each other one is found where it is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from posemap_fast.data import Scene, parse_capture
from posemap_fast.data.epipolar import GOOD, EpipolarOptions, PoseCheck, check_poses, epipolar_distances
from posemap_fast.data.image_files import read_image
from posemap_fast.data.pose_readings import AS_LOADED, readings
from posemap_fast.data.split_file import resolve_split
from posemap_fast.geometry import Camera, invert_c2w, matrix_from_quaternion, project_points, quaternion_from_matrix

OPENGL = "the camera's y and z axes are flipped (OpenGL and OpenCV exchanged)"


def check_room(room: Scene, c2w: torch.Tensor, focal_factor: float = 1.0, n_pairs: int = 6) -> PoseCheck:
    train = room.views("train")
    camera = dataclasses.replace(room.camera, fx=room.camera.fx * focal_factor, fy=room.camera.fy * focal_factor)
    return check_poses(
        c2w[train].numpy(),
        [camera] * len(train),
        lambda view: room.images[train[view]].numpy(),
        EpipolarOptions(n_pairs),
    )


def with_axes(c2w: torch.Tensor, *signs: float) -> torch.Tensor:
    return c2w @ torch.diag(torch.tensor([*signs, 1.0])).double()


def with_rotation(c2w: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    changed = c2w.clone()
    changed[:, :3, :3] = rotation
    return changed


def with_quaternion(c2w: torch.Tensor, order: list[int]) -> torch.Tensor:
    return with_rotation(c2w, matrix_from_quaternion(quaternion_from_matrix(c2w[:, :3, :3])[:, order]))


def with_centre(c2w: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    changed = c2w.clone()
    changed[:, :3, 3] = centre
    return changed


def applied(rotation: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (rotation @ vector[..., None]).squeeze(-1)


def test_true_poses_of_the_room_fit_and_every_other_reading_is_far_off(small_room):
    check = check_room(small_room, small_room.c2w, n_pairs=12)
    assert check.fits and check.verdict == GOOD
    assert check.n_pairs == 12 and check.n_matches > 300 and check.image_width == 80
    assert check.loaded.error_px < 0.15 and check.loaded.in_front > 0.9
    eligible = [fit for fit in check.alternatives if fit.in_front > 0.5]
    assert all(fit.error_px > 10 * check.loaded.error_px for fit in eligible)
    assert check.best_alternative == eligible[0]
    assert check.focal_factor == pytest.approx(1, abs=0.03)


MISTAKES = {  # what a loader may do to true poses -> the reading that mends it
    "inverse": (invert_c2w, "camera-to-world and world-to-camera are exchanged"),
    "opengl": (lambda c: with_axes(c, 1, -1, -1), OPENGL),
    "y flipped": (lambda c: with_axes(c, 1, -1, 1), "the camera's y axis is flipped"),
    "x flipped": (lambda c: with_axes(c, -1, 1, 1), "the camera's x axis is flipped (mirrored images)"),
    "z flipped": (lambda c: with_axes(c, 1, 1, -1), "the camera's z axis is flipped"),
    "x and z flipped": (lambda c: with_axes(c, -1, 1, -1), "the camera's x and z axes are flipped"),
    "x and y flipped": (
        lambda c: with_axes(c, -1, -1, 1),
        "the camera's x and y axes are flipped (PyTorch3D, or images upside down)",
    ),
    "inverse of opengl": (
        lambda c: invert_c2w(with_axes(c, 1, -1, -1)),
        f"camera-to-world and world-to-camera are exchanged and {OPENGL}",
    ),
    "transposed": (lambda c: with_rotation(c, c[:, :3, :3].mT), "the rotation is transposed"),
    "scalar last read as first": (
        lambda c: with_quaternion(c, [1, 2, 3, 0]),  # x y z w stood where w x y z was expected
        "quaternions have the scalar last",
    ),
    "scalar first read as last": (lambda c: with_quaternion(c, [3, 0, 1, 2]), "quaternions have the scalar first"),
    "world-to-camera scalar last read as first": (
        lambda c: invert_c2w(with_quaternion(invert_c2w(c), [1, 2, 3, 0])),
        "world-to-camera quaternions have the scalar last",
    ),
    "translation taken for the centre": (
        lambda c: with_centre(c, invert_c2w(c)[:, :3, 3]),
        "column 3 is the world-to-camera translation, not the centre",
    ),
    "centre taken for the translation": (
        lambda c: with_centre(c, -applied(c[:, :3, :3], c[:, :3, 3])),
        "the file's translation is the centre already",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_of_convention_is_found_and_named(small_room, mistake):
    change, mend = MISTAKES[mistake]
    check = check_room(small_room, change(small_room.c2w))
    assert check.fits is False, check.verdict
    assert check.best_alternative.reading == mend
    assert check.best_alternative.error_px < 0.15 < check.loaded.error_px
    assert check.verdict.startswith(f"poses fit better when {mend} (")


def test_turned_images_are_found_with_their_sense(small_room):
    train = small_room.views("train")
    k = small_room.camera
    upright = Camera(k.height, k.width, k.fy, k.fx, k.cy, k.width - k.cx)
    for turns, sense in ((1, "counter-clockwise"), (-1, "clockwise")):
        check = check_poses(
            small_room.c2w[train].numpy(),
            [upright] * len(train),
            lambda view, turns=turns: np.ascontiguousarray(np.rot90(small_room.images[train[view]].numpy(), turns)),
        )
        assert check.best_alternative.reading == f"images are turned by 90 deg {sense}"
        assert check.fits is False


def test_axes_of_a_vehicle_are_found(small_room):
    body = torch.eye(4).double()  # columns: forward, left, up in OpenCV axes
    body[:3, :3] = torch.tensor([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])
    check = check_room(small_room, small_room.c2w @ body)
    assert check.best_alternative.reading == "the camera's axes are a vehicle's (x forward, y left, z up)"


def test_wrong_focal_length_is_found(small_room):
    check = check_room(small_room, small_room.c2w, focal_factor=1.12)
    assert check.focal_factor == pytest.approx(1 / 1.12, rel=0.02)
    assert check.focal_error_px < 0.5 * check.loaded.error_px
    assert f"focal lengths x {check.focal_factor:.2f} fit better" in check.verdict


def test_poses_of_other_images_fit_in_no_reading(small_room):
    shuffled = small_room.c2w[torch.randperm(small_room.n_views, generator=torch.Generator().manual_seed(1))]
    check = check_room(small_room, shuffled)
    assert check.fits is False and check.verdict.startswith("no reading fits: calibration or poses are wrong")


def test_what_cannot_be_judged_is_not_judged(small_room):
    one = check_poses(np.eye(4)[None], [small_room.camera], lambda _: small_room.images[0].numpy())
    grey = np.full((60, 80, 3), 128, np.uint8)
    blank = check_poses(small_room.c2w.numpy(), [small_room.camera] * small_room.n_views, lambda _: grey)
    still = check_room(small_room, with_centre(small_room.c2w, torch.ones(3).double()))
    assert [check.fits for check in (one, blank, still)] == [None] * 3
    assert "centres coincide" in still.verdict and "matches" in blank.verdict


def test_the_check_is_the_same_on_every_call(small_room):
    assert check_room(small_room, small_room.c2w) == check_room(small_room, small_room.c2w)


def test_distances_are_pixels_off_the_epipolar_line():
    """Cameras side by side have horizontal epipolar lines: a point moved down by 3 px is 3 px off in both images."""
    camera, other = Camera(100, 80, 90.0, 90.0, 50.0, 40.0), np.eye(4)
    other[0, 3] = 1.0
    points = torch.tensor([[0.3, 0.2, 4.0], [-0.2, 0.4, 6.0], [0.0, 0.0, 5.0]]).double()
    poses = torch.from_numpy(np.stack([np.eye(4), other]))
    a, b = project_points(camera, poses, points)[0].numpy()
    distance, in_front = epipolar_distances((camera, camera), (np.eye(4), other), (a, b))
    np.testing.assert_allclose(distance, 0, atol=1e-9)
    assert in_front.all()
    distance, _ = epipolar_distances((camera, camera), (np.eye(4), other), (a, b + np.array([7.0, 3.0])))
    np.testing.assert_allclose(distance, 3, rtol=1e-9)
    _, in_front = epipolar_distances((camera, camera), (other, np.eye(4)), (a, b))
    assert not in_front.any()  # exchanged centres give the same lines, with the scene behind the cameras


def test_distances_agree_with_projected_rays(small_room):
    """Brute force: the epipolar line goes through the images of two points on the ray of the partner."""
    c2w = small_room.c2w[[0, 9]]
    sharp = [Camera(100, 80, 90.0, 70.0, 52.0, 41.0), Camera(64, 48, 60.0, 66.0, 30.0, 25.0)]
    rng = np.random.default_rng(0)
    pixels = [rng.uniform(0, [c.width, c.height], (20, 2)) for c in sharp]
    expected = np.zeros(20)
    for here, there in ((0, 1), (1, 0)):
        xy = (pixels[here] - [sharp[here].cx, sharp[here].cy]) / [sharp[here].fx, sharp[here].fy]
        ray = torch.from_numpy(np.column_stack([xy, np.ones(20)])) @ c2w[here, :3, :3].T
        for index, direction in enumerate(ray):
            points = c2w[here, :3, 3] + torch.tensor([[1.0], [3.0]]).double() * direction
            line = np.linalg.inv(c2w[there].numpy()) @ np.column_stack([points, np.ones(2)]).T
            p, q = (sharp[there].K.numpy() @ line[:3, k] / line[2, k] for k in range(2))
            normal = np.cross(p, q)
            expected[index] += abs(normal @ [*pixels[there][index], 1]) / np.hypot(*normal[:2]) / 2
    found = epipolar_distances((sharp[0], sharp[1]), (c2w[0].numpy(), c2w[1].numpy()), (pixels[0], pixels[1]))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    long = [dataclasses.replace(c, fx=c.fx * 0.5, fy=c.fy * 0.5) for c in sharp]
    halved = epipolar_distances((long[0], long[1]), (c2w[0].numpy(), c2w[1].numpy()), (pixels[0], pixels[1]), 2.0)[0]
    np.testing.assert_allclose(halved, expected, rtol=1e-6)


def test_the_first_reading_is_the_loaded_one_and_all_differ(small_room):
    found = list(readings(small_room.c2w.numpy()))
    assert found[0][0] == AS_LOADED
    np.testing.assert_array_equal(found[0][1], small_room.c2w.numpy())
    assert len({name for name, _ in found}) == len(found)


@pytest.mark.dataset
@pytest.mark.parametrize("name", ["redkitchen", "redkitchen_small", "fox", "bonsai", "castle"])
def test_real_captures_fit_within_two_pixels_of_640(real_scenes, name):
    capture = parse_capture(real_scenes / name)
    splits, _ = resolve_split(capture.source, [frame.name for frame in capture.frames], capture.lists)
    train = [capture.frames[view] for view in splits["train"]]
    c2w = torch.stack([frame.c2w for frame in train]).numpy()
    check = check_poses(c2w, [frame.lens.camera for frame in train], lambda view: read_image(train[view].path))
    assert check.verdict == GOOD
    assert check.loaded.error_px * 640 / check.image_width <= 2
    assert check.best_alternative.error_px > 10 * check.loaded.error_px
    assert check.focal_factor == pytest.approx(1, abs=0.03)


@pytest.mark.dataset
def test_both_ground_truths_and_the_kinect_focal_of_7_scenes(real_scenes):
    """SfM poses fit well; those of the depth camera less; with its focal length of 585 px the error doubles."""
    found = {}
    for gt in ("sfm", "dslam"):
        frames = parse_capture(real_scenes / "redkitchen_original" / "redkitchen", "7scenes", gt=gt).frames
        for focal in (frames[0].lens.camera.fx, 585.0):
            camera = dataclasses.replace(frames[0].lens.camera, fx=focal, fy=focal)
            found[gt, round(focal)] = check_poses(
                torch.stack([frame.c2w for frame in frames]).numpy(),
                [camera] * len(frames),
                lambda view, frames=frames: read_image(frames[view].path),
            )
    assert found["sfm", 526].verdict == GOOD and found["sfm", 526].loaded.error_px <= 2
    assert 2 < found["dslam", 525].loaded.error_px < 4
    assert found["dslam", 585].loaded.error_px > 1.5 * found["dslam", 525].loaded.error_px
    assert found["dslam", 585].focal_factor == pytest.approx(525 / 585, abs=0.03)
    assert "check the calibration" in found["dslam", 585].verdict
