"""The automatic frame: tight on a known room, robust to wild poses and outliers, cascades only for long tails."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from posemap_fast.data import FrameEstimate, ImageStack, Scene, estimate_frame, load_scene
from posemap_fast.data.box_fit import BoxOptions, fit_box, up_direction, wild_cameras
from posemap_fast.data.triangulate import TriangulationOptions, triangulate_pair, triangulate_scene
from posemap_fast.errors import DatasetError, FileFormatError
from posemap_fast.geometry import Camera, look_at, project_points, so3_exp

CAMERA = Camera(160, 120, 131.0, 131.0, 80.0, 60.0)
UP = torch.tensor([0.0, 0.0, 1.0]).double()


def ring(n: int, radius: float, target: float = 0.0) -> np.ndarray:
    """Cameras on a circle of `radius` at height 1.5 that look across it."""
    angle = torch.arange(n).double() / n * 2 * torch.pi
    centre = torch.stack([radius * angle.cos(), radius * angle.sin(), torch.full_like(angle, 1.5)], dim=-1)
    return look_at(centre, torch.tensor([0.0, 0.0, 1.5]).double() + target * centre, UP).numpy()


def shell(n: int, half: tuple[float, float, float], seed: int) -> np.ndarray:
    """Points on the walls of a box centred at (0, 0, 1.5)."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(-1, 1, (n, 3))
    points[np.arange(n), rng.integers(0, 3, n)] = rng.choice([-1.0, 1.0], n)
    return points * half + [0, 0, 1.5]


@pytest.fixture(scope="module")
def estimate(small_room) -> FrameEstimate:
    return estimate_frame(small_room)


def test_triangulation_is_exact_for_exact_pixels():
    poses = ring(12, 1.5)[[0, 1]]
    points = shell(400, (2.4, 2.4, 1.4), 0)
    pixels, depth = zip(
        *(project_points(CAMERA, torch.from_numpy(p), torch.from_numpy(points)) for p in poses), strict=True
    )
    seen = (depth[0] > 0.1) & (depth[1] > 0.1)
    found, distance = triangulate_pair(
        CAMERA, (poses[0], poses[1]), (pixels[0][seen].numpy(), pixels[1][seen].numpy()), TriangulationOptions()
    )
    gaps = np.linalg.norm(found[:, None] - points[None], axis=-1).min(1)
    assert len(found) > 0.8 * int(seen.sum()) and gaps.max() < 1e-6
    to_cameras = np.linalg.norm(found[:, None] - poses[None, :, :3, 3], axis=-1).min(1)
    assert np.allclose(distance, to_cameras)


def test_wrong_matches_are_rejected():
    poses = ring(12, 1.5)[[0, 1]]
    rng = np.random.default_rng(1)
    wrong = rng.uniform(0, 120, (2, 5000, 2))
    found, _ = triangulate_pair(CAMERA, (poses[0], poses[1]), (wrong[0], wrong[1]), TriangulationOptions())
    assert len(found) < 0.04 * 5000  # random pixels pass only near their epipolar line


def test_triangulated_points_of_the_room_lie_on_its_surfaces(small_room):
    views = small_room.views("train")
    sparse = triangulate_scene(
        small_room.images.select(torch.tensor(views)), small_room.c2w[views].numpy(), small_room.camera
    )
    from posemap_fast.data.room.layout import clearance

    assert len(sparse.xyz) > 300
    assert np.median(np.abs(clearance(sparse.xyz))) < 0.05
    again = triangulate_scene(
        small_room.images.select(torch.tensor(views)), small_room.c2w[views].numpy(), small_room.camera
    )
    assert np.array_equal(sparse.xyz, again.xyz)


def test_frame_of_the_room_is_tight_and_holds_all_cameras(estimate, small_room):
    frame = estimate.frame
    sides = (frame.aabb[1] - frame.aabb[0]) / frame.scale
    assert frame.n_cascades == 1 and estimate.share_inside >= 0.99
    assert (sides[:2] > 4.7).all() and (sides[:2] < 6.2).all() and 2.6 < sides[2] < 3.9  # the room is 4.8 x 4.8 x 2.8
    inside = frame.to_field(small_room.c2w[:, :3, 3])
    assert ((inside > frame.aabb[0]) & (inside < frame.aabb[1])).all()
    assert "triangulated" in estimate.rule and estimate.scene_extent == pytest.approx(float(sides.max()), rel=1e-6)


def test_near_is_before_all_content_and_median_depth_is_the_rooms(estimate, small_room):
    nearest = float(small_room.depth.min())
    assert 0.01 < estimate.near / estimate.frame.scale < nearest
    median = float(torch.stack([small_room.ray_distances(v) for v in range(10)]).median())
    assert estimate.median_depth == pytest.approx(median, rel=0.35)


def test_frame_is_deterministic_and_survives_its_file(estimate, small_room, tmp_path):
    again = estimate_frame(small_room)
    assert again.frame.to_dict() == estimate.frame.to_dict() and again.near == estimate.near
    estimate.save(tmp_path / "frame.pt")
    loaded = FrameEstimate.load(tmp_path / "frame.pt")
    assert loaded.frame.to_dict() == estimate.frame.to_dict() and loaded.rule == estimate.rule
    (tmp_path / "frame.pt").write_bytes((tmp_path / "frame.pt").read_bytes()[:100])
    with pytest.raises(FileFormatError, match="cannot read this scene frame"):
        FrameEstimate.load(tmp_path / "frame.pt")


def test_one_camera_absurdly_far_away_changes_nothing(estimate, small_room):
    c2w = small_room.c2w.clone()
    wild = small_room.views("train")[5]
    c2w[wild, :3, 3] = torch.tensor([3.1e9, 0.0, 0.0]).double()
    found = estimate_frame(dataclasses.replace(small_room, c2w=c2w, fingerprint=""))
    assert found.ignored_views == [wild] and small_room.names[wild] in found.rule
    assert found.frame.scale == pytest.approx(estimate.frame.scale, rel=0.1)
    assert estimate.ignored_views == []


def test_test_and_validation_poses_are_never_looked_at(estimate, small_room):
    c2w = small_room.c2w.clone()
    c2w[small_room.views("test") + small_room.views("val"), :3, 3] += 100.0
    found = estimate_frame(dataclasses.replace(small_room, c2w=c2w, fingerprint=""))
    assert found.frame.to_dict() == estimate.frame.to_dict()


def test_given_points_replace_triangulation(small_room):
    points = torch.from_numpy(shell(3000, (2.4, 2.4, 1.4), 2)).float()
    found = estimate_frame(dataclasses.replace(small_room, points=points))
    assert "3000 given points" in found.rule
    assert float((found.frame.aabb[1] - found.frame.aabb[0]).max()) / found.frame.scale == pytest.approx(5.28, abs=0.1)


def test_featureless_images_fall_back_to_the_frusta(small_room):
    blank = dataclasses.replace(
        small_room, images=ImageStack(torch.full(small_room.images.shape, 128, dtype=torch.uint8)), fingerprint=""
    )
    found = estimate_frame(blank)
    assert "camera frusta alone" in found.rule
    inside = found.frame.to_field(blank.c2w[:, :3, 3])
    assert ((inside > 0) & (inside < 1)).all() and 2 < found.scene_extent < 60 and found.near > 0


def test_no_training_view_is_refused(small_room):
    splits = {**small_room.splits, "train": []}
    with pytest.raises(DatasetError, match="no training views"):
        estimate_frame(dataclasses.replace(small_room, splits=splits))


def test_closed_room_has_one_cascade_and_a_long_tail_has_more():
    cameras = ring(40, 1.5)
    room = fit_box(shell(5000, (2.4, 2.4, 1.4), 3), cameras)
    assert room.n_cascades == 1 and room.share_inside >= 0.99
    rng = np.random.default_rng(4)
    far = rng.standard_normal((400, 3)) * [12, 12, 3] + [0, 0, 3]
    tail = fit_box(np.concatenate([shell(5000, (2.4, 2.4, 1.4), 3), far]), cameras)
    assert 2 <= tail.n_cascades <= 4 and tail.share_inside >= 0.97
    inner = tail.half / 2 ** (tail.n_cascades - 1)
    assert 2.4 < inner < 6 and np.abs(cameras[:, :3, 3] - tail.centre).max() < inner  # cameras are in the inner box


def test_outliers_do_not_blow_the_box():
    points = shell(5000, (2.4, 2.4, 1.4), 5)
    clean = fit_box(points, ring(40, 1.5))
    dirty = fit_box(np.concatenate([points, np.full((10, 3), 1e6), np.full((10, 3), -1e4)]), ring(40, 1.5))
    assert dirty.n_cascades == 1 and dirty.half == pytest.approx(clean.half, rel=0.1)


def test_turned_room_gets_a_turned_box():
    turn = so3_exp(torch.tensor([0.2, -0.3, 0.5]).double()).numpy()
    points, cameras = shell(5000, (3.5, 1.5, 1.4), 6), ring(40, 1.0)
    straight = fit_box(points, cameras)
    turned_cameras = cameras.copy()
    turned_cameras[:, :3] = turn @ cameras[:, :3]
    turned = fit_box(points @ turn.T, turned_cameras)
    assert np.array_equal(straight.rotation, np.eye(3))  # axis-aligned content keeps the world's axes
    volumes = [float(np.prod(fit.high - fit.low)) for fit in (straight, turned)]
    assert volumes[1] < 1.15 * volumes[0]
    assert np.allclose(turned.rotation @ turned.rotation.T, np.eye(3)) and np.linalg.det(turned.rotation) > 0


def test_up_is_found_although_all_cameras_look_down():
    angle = torch.arange(30).double() / 30 * 2 * torch.pi
    centre = torch.stack([angle.cos(), angle.sin(), torch.full_like(angle, 2.0)], dim=-1)
    one_sided = look_at(centre, 0.5 * centre * torch.tensor([1.0, 1.0, 0.0]).double(), UP).numpy()[:20]
    assert np.degrees(np.arccos(up_direction(one_sided) @ [0, 0, 1])) < 4
    mean_up = -one_sided[:, :3, 1].mean(0)
    assert np.degrees(np.arccos(mean_up[2] / np.linalg.norm(mean_up))) > 5  # what the mean alone would give


def test_wild_cameras_are_judged_by_the_median():
    centres = np.random.default_rng(7).standard_normal((50, 3))
    centres[3] = 3e9
    assert np.flatnonzero(wild_cameras(centres, BoxOptions().wild_factor)).tolist() == [3]
    assert not wild_cameras(np.zeros((5, 3)), 30.0).any()


@pytest.mark.dataset
def test_real_scenes_get_sensible_boxes(real_scenes):
    found = sorted(real_scenes.glob("*/transforms.json"))
    assert found, f"no capture with a transforms.json in {real_scenes}"
    for path in found:
        scene = load_scene(str(path.parent), max_side=320)
        estimate = estimate_frame(scene)
        print(f"{scene.name}: {estimate.rule}")
        check_real(scene, estimate)


def check_real(scene: Scene, estimate: FrameEstimate) -> None:
    frame = estimate.frame
    assert estimate.share_inside >= 0.99 and 1 <= frame.n_cascades <= 4
    train = frame.to_field(scene.c2w[scene.views("train"), :3, 3])
    assert ((train > frame.aabb[0]) & (train < frame.aabb[1])).all()
    if scene.name.startswith("redkitchen"):  # one end of a kitchen, in metres
        assert 4 < estimate.scene_extent < 6.5 and frame.n_cascades == 1
    if scene.name == "castle":  # an open courtyard
        assert frame.n_cascades > 1


@pytest.mark.dataset
def test_boxes_of_real_scenes_hold_their_points_and_little_else(real_scenes):
    """No number is set by hand; outdoors and unbounded scenes are held to the same bounds as rooms."""
    for path in sorted(real_scenes.glob("*/transforms.json")):
        scene = load_scene(path.parent, max_side=320)
        train = torch.tensor(scene.views("train"))
        points = triangulate_scene(scene.images.select(train), scene.c2w[train].numpy(), scene.camera).xyz
        frame = estimate_frame(scene).frame
        inside_cube = frame.to_field(torch.from_numpy(points)).numpy()
        low, high = frame.aabb.numpy()
        assert ((inside_cube >= low) & (inside_cube <= high)).all(1).mean() >= 0.99, scene.name
        extent = np.diff(np.percentile(inside_cube, [0.5, 99.5], axis=0), axis=0)[0]
        assert np.prod(high - low) <= 8 * np.prod(extent), scene.name
