"""The procedural room: deterministic, consistent between views, clear paths, different paths for train and test."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from posemap_fast.data import load_room, load_scene
from posemap_fast.data.room.layout import ROOM, clearance, furniture
from posemap_fast.data.room.paths import MIN_CLEARANCE, PATHS, camera_path
from posemap_fast.data.room.solids import Solid
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.geometry import camera_rays, mean_pose, project_points, rotation_angle_deg, so3_exp

TURNED = so3_exp(torch.tensor([0.3, -0.2, 0.5])).numpy()
SOLIDS = [
    Solid(kind, np.array([0.2, -0.1, 0.4], np.float32), np.array(half, np.float32), TURNED, "dots")
    for kind, half in (("box", (0.3, 0.5, 0.2)), ("sphere", (0.4, 0.4, 0.4)), ("cylinder", (0.3, 0.3, 0.5)))
]


def rays_at(solid: Solid, seed: int, n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Random local origins outside the solid and directions roughly towards it, (3, n) float32 each."""
    rng = np.random.default_rng(seed)
    origin = rng.standard_normal((3, n))
    origin *= (1 + rng.random(n)) / np.linalg.norm(origin, axis=0)
    return origin.astype(np.float32), (0.4 * rng.standard_normal((3, n)) - origin).astype(np.float32)


@pytest.mark.parametrize("solid", SOLIDS, ids=lambda solid: solid.kind)
def test_hits_lie_on_the_surface_and_nothing_is_nearer(solid):
    origin, direction = rays_at(solid, 0)
    t = solid.intersect(origin, direction)
    hit = np.isfinite(t)
    assert 0.3 < hit.mean() < 0.99

    def distance(at: np.ndarray, rays: np.ndarray) -> np.ndarray:
        local = origin[:, rays] + at * direction[:, rays]
        return solid.distance(solid.rotation @ local + solid.centre[:, None])

    assert np.abs(distance(t[hit], hit)).max() < 1e-4
    for share in (0.25, 0.5, 0.75, 0.95):  # before the hit the ray is outside
        assert distance(share * t[hit], hit).min() > -1e-4
    for share in np.linspace(0, 3, 60, dtype=np.float32):  # a miss never enters
        assert distance(share, ~hit).min() > -1e-4


@pytest.mark.parametrize("solid", [*SOLIDS, ROOM], ids=["box", "sphere", "cylinder", "room"])
def test_folding_inverts_unfolding(solid):
    rng = np.random.default_rng(1)
    for patch in range(len(solid.patch_sizes)):
        u, v = rng.uniform(0.05, 0.95, (2, 500)).astype(np.float32)
        if solid.kind == "cylinder" and patch:  # caps are discs
            u, v = 0.5 + 0.6 * (u - 0.5), 0.5 + 0.6 * (v - 0.5)
        local, normal = solid.fold(patch, u, v)
        found, found_u, found_v = solid.unfold(local)
        assert (found == patch).all() and np.abs(found_u - u).max() < 1e-4 and np.abs(found_v - v).max() < 1e-4
        outside = solid.rotation @ (local + 1e-2 * normal) + solid.centre[:, None]
        assert np.allclose(solid.distance(outside), 1e-2, atol=2e-4)  # normals point outwards


def test_furniture_stands_inside_the_room_and_is_varied():
    solids = furniture()
    assert len(solids) >= 7 and {solid.kind for solid in solids} == {"box", "sphere", "cylinder"}
    for solid in solids:
        surface = np.concatenate([solid.fold(p, *np.random.default_rng(2).random((2, 200), np.float32))[0]
                                  for p in range(len(solid.patch_sizes))], axis=1)  # fmt: skip
        world = solid.rotation @ surface + solid.centre[:, None]
        inside = ROOM.distance(world) < 2e-3
        assert inside.mean() > 0.8  # caps of a cylinder are sampled as squares, hence not all


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("name", "n_views"), [("train", 224), ("train", 60), ("test", 40), ("unlabelled", 24)])
def test_no_camera_is_close_to_anything(name, n_views, seed):
    poses = camera_path(name, n_views, seed)
    assert clearance(poses[:, :3, 3].numpy()).min() > MIN_CLEARANCE
    assert torch.allclose(torch.linalg.det(poses[:, :3, :3]), torch.ones(n_views).double())


def test_paths_are_smooth_and_look_around():
    poses = camera_path("train", 224, 0)
    steps = (poses[1:, :3, 3] - poses[:-1, :3, 3]).norm(dim=1)
    turns = rotation_angle_deg(poses[1:, :3, :3], poses[:-1, :3, :3])
    assert steps.max() < 0.15 and turns.max() < 12
    forward = poses[:, :3, 2]
    assert (forward.mean(0).norm() < 0.5) and poses[:, 2, 3].std() > 0.1


def test_test_views_are_away_from_training_views_but_within_their_region():
    train, test = camera_path("train", 200, 0), camera_path("test", 40, 0)
    apart = (test[:, None, :3, 3] - train[None, :, :3, 3]).norm(dim=-1)
    turned = rotation_angle_deg(test[:, None, :3, :3], train[None, :, :3, :3])
    nearest = (apart / 0.3 + turned / 10).argmin(1)
    index = torch.arange(len(test))
    assert 0.25 < apart[index, nearest].median() < 0.55 and 5 < turned[index, nearest].median() < 16
    low, high = train[:, :3, 3].amin(0), train[:, :3, 3].amax(0)
    assert ((test[:, :3, 3] > low) & (test[:, :3, 3] < high)).all()
    mean = mean_pose(train)
    assert (test[:, :3, 3] - mean[:3, 3]).norm(dim=1).median() > 0.8
    assert rotation_angle_deg(test[:, :3, :3], mean[:3, :3]).median() > 60
    assert set(PATHS) == {"train", "test", "unlabelled"}


def test_room_repeats_with_its_seed_and_changes_with_it():
    options = {"n_train": 3, "n_val": 0, "n_test": 1, "n_unlabelled": 0, "width": 40, "height": 30, "supersample": 1}
    first, again, other = (load_room(seed=seed, **options) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(first.images.tensor(), again.images.tensor())


def test_room_has_the_promised_views_and_camera(small_room):
    assert small_room.counts() == {"train": 40, "val": 4, "test": 6, "unlabelled": 3}
    assert small_room.camera.fx == pytest.approx(525.505 * 80 / 640) and small_room.camera.cx == 40
    assert small_room.is_metric and small_room.depth is not None
    assert len(set(small_room.names)) == small_room.n_views
    assert float(small_room.depth.min()) > 0.2 and float(small_room.depth.max()) < 8


def test_validation_views_are_blocks_of_the_training_path(small_room):
    path = camera_path("train", 40 + 4 + 2, 0)
    val = small_room.c2w[small_room.views("val")]
    place = [int((path[:, :3, 3] - pose[:3, 3]).norm(dim=1).argmin()) for pose in val]
    assert place == list(range(place[0], place[0] + 4))  # one block
    train = small_room.c2w[small_room.views("train")][:, :3, 3]
    for beside in (place[0] - 1, place[-1] + 1):  # the gap is in no split
        assert (train - path[beside, :3, 3]).norm(dim=1).min() > 1e-3


def test_depth_agrees_between_views(small_room):
    # Points seen by one view reproject into its neighbour at the depth the neighbour has there, where not occluded.
    scene, a, b = small_room, 10, 11
    pixels = scene.camera.pixel_grid().double()
    rays_o, rays_d = camera_rays(scene.camera, scene.c2w[a], pixels)
    points = rays_o + rays_d * scene.ray_distances(a).reshape(-1, 1)
    found, depth = project_points(scene.camera, scene.c2w[b], points)
    inside = (found > 1).all(1) & (found[:, 0] < 79) & (found[:, 1] < 59) & (depth > 0)
    x, y = found[inside].long().T
    error = (scene.depth[b, y, x] - depth[inside]).abs()
    assert inside.float().mean() > 0.5
    assert error.median() < 0.03 and (error < 0.15).float().mean() > 0.85  # the rest is occluded or at an edge


def test_depth_is_along_z_and_ray_distance_along_the_ray(small_room):
    distance, depth = small_room.ray_distances(0), small_room.depth[0]
    assert (distance >= depth).all() and distance[0, 0] / depth[0, 0] > 1.1
    assert distance[30, 40] / depth[30, 40] == pytest.approx(1.0, abs=1e-3)  # half a pixel off the axis


def test_depth_is_that_of_the_pixel_centres_whatever_the_supersampling():
    options = {"n_train": 2, "n_val": 0, "n_test": 1, "n_unlabelled": 0, "width": 40, "height": 30}
    depths = [load_room(supersample=n, **options).depth for n in (1, 2, 3)]
    for depth in depths[1:]:
        assert ((depth - depths[0]).abs() > 1e-4).float().mean() < 2e-3  # rounding may flip a ray at an edge


def test_colours_agree_between_views(small_room):
    # Mostly view independent: the same surface points look alike from the neighbouring view.
    scene, a, b = small_room, 10, 11
    rays_o, rays_d = camera_rays(scene.camera, scene.c2w[a], scene.camera.pixel_grid().double())
    points = rays_o + rays_d * scene.ray_distances(a).reshape(-1, 1)
    found, depth = project_points(scene.camera, scene.c2w[b], points)
    inside = (found > 1).all(1) & (found[:, 0] < 79) & (found[:, 1] < 59) & (depth > 0)
    x, y = found[inside].long().T
    same = (scene.depth[b, y, x] - depth[inside]).abs() < 0.03
    ours, theirs = scene.images[a].reshape(-1, 3)[inside][same].float(), scene.images[b][y, x][same].float()
    shuffled = ours[torch.randperm(len(ours), generator=torch.Generator().manual_seed(0))]
    assert (ours - theirs).abs().mean() < 0.35 * (shuffled - theirs).abs().mean()


def test_images_are_textured_and_neither_black_nor_blown_out(small_room):
    images = small_room.images.tensor().float()
    assert images.std(dim=(1, 2)).mean(1).min() > 12  # every view has contrast
    assert 80 < images.mean() < 190 and (images == 255).all(-1).float().mean() < 0.02


def test_camera_on_the_axes_sees_no_hole():
    # Rays exactly parallel to walls and to the faces of unturned boxes are where 0 / 0 hides.
    from posemap_fast.data.room.atlas import bake_atlas
    from posemap_fast.data.room.tracer import trace_view
    from posemap_fast.geometry import Camera, look_at

    c2w = look_at(torch.tensor([0.0, 0.0, 1.4]), torch.tensor([0.0, 1.0, 1.4]), torch.tensor([0.0, 0, 1.0])).numpy()
    colours, depth = trace_view(bake_atlas(0), Camera(9, 7, 5.0, 5.0, 4.5, 3.5), c2w)
    assert np.isfinite(colours).all() and (depth > 0).all() and depth.max() < 8


def test_room_options_are_checked():
    with pytest.raises(ConfigError, match="dataset room: n_test must be at least 1; got 0"):
        load_scene("room", n_test=0)
    with pytest.raises(ConfigError, match="unknown option 'n_trian'; did you mean 'n_train'"):
        load_scene("room", n_trian=3)


def test_scene_refuses_unknown_splits_and_missing_depth(small_room):
    with pytest.raises(ConfigError, match="unknown split 'tset'"):
        small_room.views("tset")
    import dataclasses

    with pytest.raises(DatasetError, match="no ground-truth depth"):
        dataclasses.replace(small_room, depth=None).ray_distances(0)
