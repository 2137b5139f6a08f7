"""Checks of poses, splits and images: each defect that is put in is found, and a sound dataset has none."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch

from posemap_fast.data.dataset_report import report_dataset
from posemap_fast.data.image_checks import describe_images, measure_images
from posemap_fast.data.sanity import describe_cameras, describe_extent, describe_poses, nearest_training_views
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.geometry import Camera, Lens, look_at

SPLITS = {"train": [0, 1, 2, 3], "test": [4, 5]}


def ring(n: int = 6) -> torch.Tensor:
    """Cameras on a circle of radius 2 around the origin, z up."""
    angle = torch.arange(n).double() * 2 * torch.pi / n
    centre = torch.stack([2 * angle.cos(), 2 * angle.sin(), torch.full((n,), 0.5).double()], dim=1)
    return look_at(centre, torch.zeros(3).double(), torch.tensor([0.0, 0.0, 1.0]).double())


def names(n: int = 6) -> list[str]:
    return [f"{i}.png" for i in range(n)]


def textured(seed: int) -> np.ndarray:
    return cv2.resize(np.random.default_rng(seed).integers(0, 255, (30, 40, 3), np.uint8), (160, 120))


def described(images: list[np.ndarray], contents: list[bytes] | None = None) -> dict:
    contents = contents or [image.tobytes() for image in images]
    facts = measure_images(len(images), contents.__getitem__, images.__getitem__)
    return describe_images(names(len(images)), facts, SPLITS)


def test_sound_poses_are_rigid_right_handed_and_upright():
    found = describe_poses(names(), ring())
    assert found["n_rigid"] == 6 and found["not_rigid"] == [] and found["handedness"] == "right-handed"
    assert found["determinants"] == pytest.approx([1, 1]) and found["n_upside_down"] == 0


def test_scaled_mirrored_and_overturned_poses_are_named():
    c2w = ring()
    c2w[1, :3, :3] *= 2
    c2w[2, :3, 0] *= -1
    c2w[3, :3, :2] *= -1  # turned by 180 deg about its axis
    found = describe_poses(names(), c2w)
    assert found["n_rigid"] == 4 and found["n_upside_down"] == 1
    assert found["not_rigid"][0].startswith("1.png is not rigid") and "2.png is a reflection" in found["not_rigid"][1]
    assert found["handedness"] == "1 of 6 left-handed" and found["largest_rotation_defect"] == pytest.approx(3)


def test_extent_and_the_camera_far_off():
    c2w = ring(40)
    assert describe_extent(names(40), c2w)["far_off"] == []
    c2w[7, 0, 3] = 3.1e9
    found = describe_extent(names(40), c2w)
    assert found["far_off"] == ["7.png"] and found["n_far_off"] == 1
    assert found["camera_extent"][0] == pytest.approx(3.1e9, rel=1e-6) and found["camera_box"][0][2] == 0.5


def test_distance_to_training_views_and_shared_poses():
    c2w = ring()
    c2w[4, :3, 3] = c2w[1, :3, 3] + torch.tensor([0.0, 0.0, 0.1]).double()
    c2w[4, :3, :3] = c2w[1, :3, :3]
    c2w[5] = c2w[2]
    found = nearest_training_views(names(), c2w, SPLITS)
    assert found["identical_poses"] == [["5.png", "2.png"]] and found["n_identical_poses"] == 1
    assert found["median_distance"] == pytest.approx(0, abs=1e-9)  # of 0.1 and 0 the lower
    assert found["median_angle_deg"] == pytest.approx(0, abs=1e-6)
    c2w[5, :3, :3] = c2w[2, :3, :3] @ torch.diag(torch.tensor([-1.0, -1, 1])).double()
    assert nearest_training_views(names(), c2w, SPLITS)["n_identical_poses"] == 0


def test_distinct_cameras_are_counted_with_the_commonest_first():
    a, b = Lens(Camera(40, 30, 35, 35, 20, 15)), Lens(Camera(40, 30, 36, 36, 20, 15), "opencv", (0.1, 0, 0, 0))
    found = describe_cameras([a, b, b])
    assert found["sizes"] == {"40x30": 3} and found["n_cameras"] == 2
    assert found["cameras"][0]["views"] == 2 and found["cameras"][0]["model"] == "opencv"


def test_sound_images_have_no_finding():
    found = described([textured(i) for i in range(6)])
    assert found["n_checked"] == 6
    assert all(found[key]["n"] == 0 for key in ("blurred", "black", "blown_out"))
    assert found["n_identical_groups"] == found["n_near_identical_pairs"] == found["n_damaged"] == 0


def test_the_same_file_twice_is_found_and_a_leak_into_the_test_set_counted():
    images = [textured(i) for i in (0, 1, 1, 3, 0, 5)]
    found = described(images)
    assert found["n_identical_groups"] == 2 and found["n_identical_in_train_and_test"] == 1
    assert found["identical"] == [["0.png", "4.png"]]  # those in train and test go before the others
    assert found["n_near_identical_pairs"] == 0  # identical files are not named twice


def test_the_same_picture_saved_anew_is_nearly_identical():
    images = [textured(i) for i in range(6)]
    coded = cv2.imencode(".jpg", images[2], [cv2.IMWRITE_JPEG_QUALITY, 60])[1]
    images[5] = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    found = described(images)
    assert found["near_identical"] == [["2.png", "5.png"]]
    assert found["n_near_identical_in_train_and_test"] == 1 and found["n_identical_groups"] == 0


def test_blurred_black_and_blown_out_images_are_named_and_nothing_else():
    images = [textured(i) for i in range(6)]
    images[1] = cv2.GaussianBlur(images[1], (0, 0), 5)
    images[3] = np.zeros_like(images[3])
    images[4] = np.full_like(images[4], 255)
    found = described(images)
    assert list(found["black"]["worst"]) == ["3.png"] and list(found["blown_out"]["worst"]) == ["4.png"]
    assert found["blurred"]["n"] == 3 and "1.png" in found["blurred"]["worst"]  # flat images are not sharp either
    assert found["blurred"]["worst"]["1.png"] < 0.2 and found["n_near_identical_pairs"] == 0


def test_damaged_images_are_reported_and_the_others_judged():
    images = [textured(i) for i in range(6)]

    def read(view: int) -> np.ndarray:
        if view == 2:
            raise DatasetError("2.png: truncated; copy it again")
        return images[view]

    facts = measure_images(6, lambda view: bytes([view]), read)
    found = describe_images(names(), facts, SPLITS)
    assert found["damaged"] == ["2.png: truncated; copy it again"] and found["n_damaged"] == 1
    assert found["blurred"]["n"] == found["black"]["n"] == 0


def test_a_capture_is_described_as_a_whole(capture):
    capture.image(5).write_bytes(capture.image(0).read_bytes())
    capture.content["frames"][6]["transform_matrix"] = capture.content["frames"][1]["transform_matrix"]
    report = report_dataset(capture.write())
    found = json.loads(json.dumps(report.description))
    assert found["views"] == {"train": 4, "val": 1, "test": 2, "unlabelled": 1}
    assert found["problems"][1:] == [
        "1 image file(s) in train and in test",
        "1 test view(s) with the pose of a training view",
        "1 group(s) of identical image files",
    ]
    assert found["pose_check"]["fits"] is None and "not judged" in found["problems"][0]
    assert len(found["fingerprint"]) == 64 and len(found["content_sha256"]) == 64
    assert "camera frusta alone" in found["frame"] and report.estimate is not None


def test_a_damaged_image_is_a_finding_and_not_the_end(capture):
    capture.image(1).write_bytes(capture.image(1).read_bytes()[:-30])
    found = report_dataset(capture.write()).description
    assert found["images"]["n_damaged"] == 1 and "frame_1.jpg" in found["images"]["damaged"][0]
    assert "1 damaged image(s)" in found["problems"] and found["fingerprint"] is None
    assert found["frame"].endswith("from 3 training views")


def test_images_of_several_lenses_are_read_each_with_its_own(capture):
    for index, frame in enumerate(capture.content["frames"]):
        frame["k1"] = 0.01 * (index % 4)
    found = report_dataset(capture.write()).description
    assert found["stored"]["n_cameras"] == 4 and found["images"]["n_damaged"] == 0


def test_fast_judges_no_image(capture):
    capture.image(7).write_bytes(b"no image at all")  # in no list
    found = report_dataset(capture.write(), fast=True).description
    assert "images" not in found and "content_sha256" not in found and found["views"]["train"] == 4


def test_a_content_digest_follows_the_files_and_not_the_place(capture, capture_maker, tmp_path):
    def digest(spec: str) -> str:
        return report_dataset(spec).description["content_sha256"]

    other = capture_maker(tmp_path / "elsewhere")
    first = digest(capture.write())
    assert digest(other.write()) == first
    cv2.imwrite(str(other.image(3)), textured(3)[:30, :40])
    assert digest(other.write()) != first


def test_what_is_no_dataset_and_unknown_options_are_refused(capture, tmp_path):
    with pytest.raises(DatasetError, match="no scene found"):
        report_dataset(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="unknown option 'gt'"):
        report_dataset(capture.write(), gt="sfm")
