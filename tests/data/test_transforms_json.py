"""transforms.json captures: axes, intrinsics, splits, undistortion, and one line for each kind of bad input."""

from __future__ import annotations

import dataclasses
import json
import math

import cv2
import numpy as np
import pytest
import torch

from posemap_fast.data import load_scene
from posemap_fast.data.image_files import ImageLoader, read_image
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.geometry import Camera, Lens, invert_c2w, project_points


def test_convention_opengl_poses_become_opencv(capture):
    scene = load_scene(capture.write())
    assert torch.allclose(scene.c2w, torch.stack(capture.c2w), atol=1e-12)
    raw = torch.tensor(capture.content["frames"][0]["transform_matrix"]).double()
    assert torch.allclose(scene.c2w[0, :3, 2], -raw[:3, 2])  # forward is minus the file's z
    assert not torch.allclose(scene.c2w[0], raw)  # taking the file's axes as they are
    assert not torch.allclose(scene.c2w[0], torch.diag(torch.tensor([1.0, -1, -1, 1])).double() @ raw)  # world flipped


def test_loaded_cameras_see_what_they_look_at(capture):
    scene = load_scene(capture.write())
    pixels, depth = project_points(scene.camera, scene.c2w, torch.zeros(1, 3).double())
    assert torch.allclose(pixels, torch.tensor([19.0, 16.0]).double().expand(8, 1, 2)) and (depth > 0).all()
    assert torch.allclose(invert_c2w(scene.c2w)[:, :3, 3].norm(dim=1), torch.full((8,), math.hypot(2, 0.5)).double())


def test_split_lists_are_followed_and_the_rest_is_unlabelled(capture):
    scene = load_scene(capture.write())
    assert scene.counts() == {"train": 4, "val": 1, "test": 2, "unlabelled": 1}
    assert scene.split_rule == "by hand" and scene.names[scene.views("unlabelled")[0]] == "images/frame_7.jpg"


def test_views_come_in_natural_order_of_their_names(capture):
    for index, number in enumerate([10, 9, 2, 1, 30, 4, 5, 6]):
        source = capture.image(index)
        capture.content["frames"][index]["file_path"] = f"images/view{number}.jpg"
        source.rename(capture.image(index))
    names = [frame["file_path"] for frame in capture.content["frames"]]
    capture.split = {"train": names[:1], "test": names[1:2]}
    assert load_scene(capture.write()).names == [f"images/view{n}.jpg" for n in (1, 2, 4, 5, 6, 9, 10, 30)]


def test_path_may_be_the_json_file_and_options_are_checked(capture):
    folder = capture.write()
    assert load_scene(folder + "/transforms.json").fingerprint == load_scene(folder).fingerprint
    with pytest.raises(ConfigError, match="unknown option 'maxside'; did you mean 'max_side'"):
        load_scene(folder, maxside=3)
    with pytest.raises(DatasetError, match="does not exist"):
        load_scene(folder + "/nothing")


def test_working_size_limits_the_longer_side_and_carries_the_intrinsics(capture):
    scene = load_scene(capture.write(), max_side=20)
    assert scene.images.shape == (8, 15, 20, 3)
    assert scene.camera == Camera(40, 30, 35.0, 36.0, 19.0, 16.0).resized(20, 15)
    full = load_scene(str(capture.folder)).images.tensor().float()
    means = full.reshape(8, 15, 2, 20, 2, 3).mean((2, 4))  # area averaging is the mean of each 2 x 2 block
    assert (scene.images.tensor().float() - means).abs().max() <= 1.0


def test_focal_length_may_come_from_the_angle_of_view(capture):
    for key in ("fl_x", "fl_y", "cx", "cy", "w", "h"):
        del capture.content[key]
    capture.content["camera_angle_x"] = 2 * math.atan(0.5)
    camera = load_scene(capture.write()).camera
    assert (camera.width, camera.height, camera.cx, camera.cy) == (40, 30, 20.0, 15.0)
    assert camera.fx == camera.fy == pytest.approx(40.0)


def test_images_of_other_focal_lengths_are_resampled_to_a_shared_camera(capture):
    del capture.content["fl_x"]
    for frame in capture.content["frames"]:
        frame["fl_x"] = 33.0
    assert load_scene(capture.write()).camera.fx == 33.0
    capture.content["frames"][3]["fl_x"] = 34.0
    scene = load_scene(capture.write())
    assert scene.camera.fx == 34.0  # the narrowest view fills the shared image in all of them
    capture.content["frames"][3]["fl_x"] = -1.0
    with pytest.raises(DatasetError, match=r"frames\[3\]: fl_x: must be positive; got -1"):
        load_scene(capture.write())


def test_suffix_of_the_image_may_be_left_out(capture):
    for frame in capture.content["frames"]:
        frame["file_path"] = frame["file_path"].removesuffix(".jpg")
    assert load_scene(capture.write()).names[0] == "images/frame_0.jpg"


def test_metric_unit_and_sparse_points_are_read(capture):
    capture.content["units"] = "metres"
    np.savez(capture.folder / "points.npz", xyz=np.ones((5, 3), np.float64))
    scene = load_scene(capture.write())
    assert scene.is_metric and scene.points is not None and scene.points.shape == (5, 3)
    assert scene.points.dtype == torch.float32


def test_fingerprint_follows_the_content(capture):
    first = load_scene(capture.write()).fingerprint
    assert load_scene(capture.write()).fingerprint == first
    capture.split["train"] = capture.split["train"][:3]
    assert load_scene(capture.write()).fingerprint != first


@pytest.mark.parametrize("shift", [0.0, 5e6])
@pytest.mark.parametrize("size", [1e-7, 1.0, 1e3])
def test_fingerprint_is_not_of_the_processor_that_read_the_poses(capture, size: float, shift: float) -> None:
    scene = load_scene(capture.write())

    def fingerprint(c2w: torch.Tensor, camera: Camera = scene.camera) -> str:
        return dataclasses.replace(scene, c2w=c2w, camera=camera, fingerprint="").fingerprint

    c2w = scene.c2w.clone()
    c2w[:, :3, 3] = size * (c2w[:, :3, 3] + shift)
    noise = 1 + 1e-16 * torch.randn(c2w.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    read_elsewhere = torch.where(c2w == 0, -0.0, c2w * noise)
    first = fingerprint(c2w)
    assert fingerprint(read_elsewhere) == first
    assert fingerprint(c2w, dataclasses.replace(scene.camera, fx=scene.camera.fx * (1 + 1e-15))) == first
    assert fingerprint(c2w, dataclasses.replace(scene.camera, fx=scene.camera.fx * (1 + 1e-6))) != first
    spread = (c2w[:, :3, 3] - c2w[:, :3, 3].mean(dim=0)).norm(dim=1).mean()
    absurd = c2w.clone()
    absurd[0, 0, 3] = 1e9 * size
    for poses in (c2w, absurd):
        moved, turned = poses.clone(), poses.clone()
        moved[1, 0, 3] += 1e-3 * spread
        turned[1, 0, 0] += 1e-5
        assert len({fingerprint(found) for found in (poses, moved, turned)}) == 3


def test_undistorted_pixels_come_from_where_the_lens_put_them(tmp_path):
    camera, (k1, k2, p1, p2) = Camera(160, 120, 130.0, 130.0, 81.0, 59.0), (-0.4, 0.1, 0.001, -0.002)
    v, u = np.mgrid[:120, :160] + 0.5
    picture = np.zeros((120, 160, 3))
    picture[..., 2], picture[..., 1] = 1.5 * u, 1.5 * v  # red and green tell the stored pixel
    cv2.imwrite(str(tmp_path / "a.png"), picture.round().astype(np.uint8))
    lens = Lens(camera, "opencv", (k1, k2, p1, p2))
    loaded = ImageLoader([tmp_path / "a.png"], [lens], camera, (160, 120))(0).astype(float)
    x, y = (u - camera.cx) / camera.fx, (v - camera.cy) / camera.fy  # Brown's model, K from the image's corner
    r2 = x * x + y * y
    radial = 1 + k1 * r2 + k2 * r2 * r2
    want_u = camera.fx * (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)) + camera.cx
    want_v = camera.fy * (y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y) + camera.cy
    assert np.abs(want_u - u).max() > 5  # the distortion is no trifle
    error = loaded[..., :2] / 1.5 - np.stack([want_u, want_v], axis=-1)
    border = error[10:-10, :20].mean((0, 1)), error[10:-10, -20:].mean((0, 1))  # means out the rounding to 8 bits
    assert np.abs(border).max() < 0.03  # without OpenCV's half-pixel shift of K it is 0.15


def test_unsupported_lens_models_are_refused(capture):
    capture.content["camera_model"] = "EQUIRECTANGULAR"
    with pytest.raises(DatasetError, match="camera_model: 'EQUIRECTANGULAR' is not supported"):
        load_scene(capture.write())


def nan_pose(capture):
    capture.content["frames"][2]["transform_matrix"][0][3] = float("nan")


def scaled_pose(capture):
    capture.content["frames"][2]["transform_matrix"][0][0] *= 1.5
    capture.content["frames"][2]["transform_matrix"][1][1] += 0.5


BAD_CONTENT = [
    (lambda c: c.image(3).unlink(), r"transforms.json: frames\[3\].file_path: image .*frame_3.jpg does not exist"),
    (lambda c: c.image(3).write_bytes(c.image(3).read_bytes()[:-200]), r"frame_3.jpg: JPEG of \d+ bytes is truncated"),
    (lambda c: c.image(3).write_bytes(b""), r"frame_3.jpg: the file is empty"),
    (lambda c: c.image(3).write_bytes(b"no picture"), r"frame_3.jpg: 10 bytes that are no readable image"),
    (scaled_pose, r"frames\[2\].transform_matrix: is not rigid: .* by 1\.\d+; give a rotation"),
    (nan_pose, r"frames\[2\].transform_matrix: has NaN"),
    (lambda c: c.content["frames"][2].update(transform_matrix=[[1, 0], [0, 1]]), r"must be 4x4; got shape \(2, 2\)"),
    (lambda c: c.content["frames"][2].update(transform_matrix="x"), r"frames\[2\].transform_matrix: must be 4 rows"),
    (lambda c: c.content["frames"][2].pop("transform_matrix"), r"frames\[2\].transform_matrix: must be 4 rows"),
    (lambda c: c.content.update(fl_x=0), r"transforms.json: fl_x: must be positive; got 0"),
    (lambda c: c.content.update(fl_y=-5.0), r"transforms.json: fl_y: must be positive; got -5"),
    (lambda c: c.content.update(fl_x=float("inf")), r"fl_x: must be a finite number; got inf"),
    (lambda c: c.content.update(cx="left"), r"cx: must be a finite number; got 'left'"),
    (lambda c: [c.content.pop("fl_x"), c.content.pop("fl_y")], r"fl_x: missing, and so is camera_angle_x"),
    (lambda c: c.content.update(w=41), r"frame_0.jpg: image is 40x30 but w, h say 41x30"),
    (lambda c: c.content.update(w=40.5), r"w, h: must be positive whole numbers; got 40.5"),
    (
        lambda c: c.content["frames"].append(dict(c.content["frames"][1])),
        r"frames\[8\].* already frames\[1\]",
    ),
    (lambda c: c.content["frames"][1].update(file_path="../other.jpg"), r"'../other.jpg' leads out of"),
    (
        lambda c: c.content["frames"][1].update(file_path=7),
        r"frames\[1\].file_path: must be the name .* got 7",
    ),
    (lambda c: c.content.update(frames=[]), r"frames: must be a list of at least one frame"),
    (lambda c: c.content.update(frames=["a"]), r"frames\[0\]: must be an object"),
    (lambda c: c.split.update(train=[]), r"split.json: train: is empty"),
    (lambda c: c.split.update(test=[]), r"split.json: test: is empty"),
    (lambda c: c.split.pop("test"), r"split.json: test: is empty"),
    (lambda c: c.split["test"].append("images/frame_77.jpg"), r"test: '.*frame_77.jpg' is no frame .*did you mean"),
    (lambda c: c.split["test"].append("images/frame_1.jpg"), r"test: 'images/frame_1.jpg' is also in train"),
    (lambda c: c.split["test"].append("images/frame_5.jpg"), r"test: 'images/frame_5.jpg' is listed twice"),
    (lambda c: c.split.update(val="all"), r"split.json: val: must be a list"),
    (lambda c: np.savez(c.folder / "points.npz", xyz=np.ones((5, 2))), r"points.npz: xyz: must be finite and \(n, 3\)"),
    (lambda c: (c.folder / "points.npz").write_bytes(b"PK"), r"points.npz: xyz: cannot read the points"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_CONTENT, ids=[message[:40] for _, message in BAD_CONTENT])
def test_bad_input_is_one_line_with_file_field_value_and_mend(capture, damage, message):
    damage(capture)
    with pytest.raises(DatasetError, match=message) as caught:
        load_scene(capture.write())
    text = str(caught.value)
    assert "\n" not in text and str(capture.folder) in text
    assert "; " in text or "no frame" in text  # the mend follows the finding


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "line 1: not valid JSON"), ("[1]", "must hold a JSON object; got a list"), ("\xff", "not valid JSON")],
)
def test_wrong_json_is_refused(capture, text, message):
    capture.write()
    (capture.folder / "transforms.json").write_text(text, encoding="utf-8")
    with pytest.raises(DatasetError, match=message):
        load_scene(str(capture.folder))


def test_binary_json_is_refused(capture):
    capture.write()
    (capture.folder / "transforms.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match="not a text file"):
        load_scene(str(capture.folder))


def test_link_out_of_the_folder_is_refused(capture, tmp_path):
    target = tmp_path / "elsewhere.jpg"
    capture.image(0).rename(target)
    capture.image(0).symlink_to(target)
    with pytest.raises(DatasetError, match="leads out of"):
        load_scene(capture.write())


@pytest.mark.parametrize("cut", [20, 300, 1])
def test_truncated_files_are_found_even_where_the_decoder_is_silent(tmp_path, cut):
    picture = np.random.default_rng(1).integers(0, 255, (60, 80, 3), np.uint8)
    for name in ("a.jpg", "a.png"):
        path = tmp_path / name
        cv2.imwrite(str(path), picture)
        assert read_image(path).shape == (60, 80, 3)
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(DatasetError, match="is truncated"):
            read_image(path)


def test_end_marker_of_a_thumbnail_does_not_hide_a_truncated_jpeg(tmp_path):
    path = tmp_path / "a.jpg"
    cv2.imwrite(str(path), np.random.default_rng(1).integers(0, 255, (60, 80, 3), np.uint8))
    data = path.read_bytes()
    segment = b"\xff\xe1" + (2 + 6).to_bytes(2, "big") + b"Exif\xff\xd9"  # a header block that holds an end marker
    path.write_bytes(data[:2] + segment + data[2:-500])
    with pytest.raises(DatasetError, match="is truncated"):
        read_image(path)
    path.write_bytes(data[:2] + segment + data[2:])
    assert read_image(path).shape == (60, 80, 3)


def test_colours_are_rgb(tmp_path):
    cv2.imwrite(str(tmp_path / "red.png"), np.full((4, 4, 3), (0, 0, 255), np.uint8))  # cv2 writes BGR
    assert read_image(tmp_path / "red.png")[0, 0].tolist() == [255, 0, 0]


@pytest.mark.dataset
def test_real_captures_load_and_agree_with_their_split_files(real_scenes):
    found = sorted(real_scenes.glob("*/transforms.json"))
    assert found, f"no capture with a transforms.json in {real_scenes}"
    for path in found:
        scene = load_scene(str(path.parent), max_side=80)
        lists = json.loads((path.parent / "split.json").read_text())
        assert len(scene.views("test")) == len(lists["test"]) and scene.n_views > 10
        assert all(scene.counts()[key] > 0 for key in ("train", "val", "test"))
