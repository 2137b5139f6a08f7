"""COLMAP models: axes, places of files, hostile input, and the way there and back."""

from __future__ import annotations

import dataclasses
import math
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from posemap_fast.data import load_scene, parse_capture, parse_colmap, parse_transforms_json, write_colmap_text
from posemap_fast.data.colmap_cameras import CAMERA_MODELS, parameters_of
from posemap_fast.data.transforms_json import write_transforms_json
from posemap_fast.errors import DatasetError
from posemap_fast.geometry import Camera, Lens, invert_c2w

K = (35.0, 36.0, 19.0, 16.0)  # fx, fy, cx, cy of images of 40 x 30


@dataclass
class Model:
    """A COLMAP model made with OpenCV alone: quaternions of rotation vectors, observations of `cv2.projectPoints`."""

    points: np.ndarray
    cameras: list[tuple] = field(default_factory=lambda: [(7, "PINHOLE", 40, 30, K)])
    images: list[tuple] = field(default_factory=list)  # id, quaternion and translation, camera id, name
    seen: dict[str, np.ndarray] = field(default_factory=dict)  # name -> (p, 2) pixels

    def add(self, name: str, rvec: np.ndarray, tvec: np.ndarray, camera_id: int = 7) -> None:
        angle = float(np.linalg.norm(rvec))
        quaternion = (math.cos(angle / 2), *(math.sin(angle / 2) * rvec / angle))
        self.images.append((len(self.images) + 11, (*map(float, quaternion), *map(float, tvec)), camera_id, name))
        matrix = np.array([[K[0], 0, K[2]], [0, K[1], K[3]], [0, 0, 1.0]])
        self.seen[name] = cv2.projectPoints(self.points, rvec, tvec, matrix, None)[0][:, 0]

    def text(self, folder: Path) -> Path:
        """Write the text form."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{i} {model} {w} {h} {' '.join(map(repr, p))}" for i, model, w, h, p in self.cameras]
        (folder / "cameras.txt").write_text("# cameras\n" + "\n".join(lines) + "\n")
        lines = []
        for image_id, pose, camera_id, name in self.images:
            observed = " ".join(f"{x} {y} {i}" for i, (x, y) in enumerate(self.seen[name]))
            lines += [f"{image_id} {' '.join(map(repr, pose))} {camera_id} {name}", observed]
        (folder / "images.txt").write_text("# images\n" + "\n".join(lines) + "\n")
        lines = [f"{i} {x!r} {y!r} {z!r} 1 2 3 0.5 11 {i}" for i, (x, y, z) in enumerate(self.points.tolist())]
        (folder / "points3D.txt").write_text("# points\n" + "\n".join(lines) + "\n")
        return folder

    def binary(self, folder: Path) -> Path:
        """Write the binary form."""
        folder.mkdir(parents=True, exist_ok=True)
        data = struct.pack("<Q", len(self.cameras))
        for camera_id, model, width, height, parameters in self.cameras:
            data += struct.pack("<IiQQ", camera_id, CAMERA_MODELS[model].number, width, height)
            data += struct.pack(f"<{len(parameters)}d", *parameters)
        (folder / "cameras.bin").write_bytes(data)
        data = struct.pack("<Q", len(self.images))
        for image_id, pose, camera_id, name in self.images:
            data += struct.pack("<I7dI", image_id, *pose, camera_id) + name.encode() + b"\0"
            data += struct.pack("<Q", len(self.points))
            data += b"".join(struct.pack("<ddq", *xy, i) for i, xy in enumerate(self.seen[name]))
        (folder / "images.bin").write_bytes(data)
        data = struct.pack("<Q", len(self.points))
        for index, xyz in enumerate(self.points):
            data += struct.pack("<Q3d3BdQ", index, *xyz, 1, 2, 3, 0.5, 1) + struct.pack("<II", 11, index)
        (folder / "points3D.bin").write_bytes(data)
        return folder


def make_pictures(folder: Path, names: list[str]) -> None:
    """Small files of the right size."""
    rng = np.random.default_rng(1)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / name), rng.integers(0, 255, (30, 40, 3), np.uint8))


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """Six images of 20 points; the images lie in tmp_path/images, the model is not yet written."""
    rng = np.random.default_rng(0)
    made = Model(rng.uniform(-1, 1, (20, 3)).astype(np.float32).astype(np.float64))  # exact in float32
    for index in range(6):
        made.add(f"seq/{index}.png", rng.uniform(-0.9, 0.9, 3), np.array([0.2 * index - 0.5, 0.3, 4.0]))
    make_pictures(tmp_path / "images", list(made.seen))
    return made


def reprojection_error(model: Model, lens_and_pose: Callable[[int], tuple[Lens, torch.Tensor]]) -> float:
    """Largest distance in pixels between the model's observations and its points seen through a lens from a pose."""
    worst = 0.0
    for index, observed in enumerate(model.seen.values()):
        lens, c2w = lens_and_pose(index)
        local = (torch.from_numpy(model.points) - c2w[:3, 3]) @ c2w[:3, :3]
        pixels = lens.pixels((local[:, :2] / local[:, 2:]).numpy())
        worst = max(worst, float(np.linalg.norm(pixels - observed, axis=1).max()))
    return worst


@pytest.mark.parametrize("form", ["text", "binary"])
def test_convention_points_fall_where_they_were_observed(tmp_path, model, form):
    getattr(model, form)(tmp_path / "sparse" / "0")
    capture = parse_colmap(tmp_path)
    assert [frame.name for frame in capture.frames] == list(model.seen) and not capture.is_metric
    assert capture.points.dtype == torch.float32 and (capture.points.double().numpy() == model.points).all()
    assert [frame.path for frame in capture.frames] == [tmp_path / "images" / name for name in model.seen]
    frames = capture.frames
    assert reprojection_error(model, lambda i: (frames[i].lens, frames[i].c2w)) < 1e-6
    swapped = Lens(Camera(40, 30, *K[:2], K[3], K[2]))
    assert reprojection_error(model, lambda i: (swapped, frames[i].c2w)) > 2  # cx and cy the wrong way round
    assert reprojection_error(model, lambda i: (frames[i].lens, invert_c2w(frames[i].c2w))) > 2


def test_convention_the_quaternion_is_w_first_and_world_to_camera(tmp_path, model):
    half = math.sqrt(0.5)
    model.images[0] = (1, (half, 0.0, 0.0, half, 1.0, 2.0, 3.0), 7, "seq/0.png")  # turns x into y
    c2w = parse_colmap(model.text(tmp_path)).frames[0].c2w
    expected = torch.tensor([[0, 1, 0, -2], [-1, 0, 0, 1], [0, 0, 1, -3], [0, 0, 0, 1]]).double()  # centre -R^T t
    assert torch.allclose(c2w, expected, atol=1e-15)  # not (1, 2, 3), not the transposed, not half a turn about z


def test_the_scene_of_a_model_is_undistorted_and_split_in_blocks(tmp_path, model):
    model.cameras = [(7, "OPENCV", 40, 30, (*K, -0.1, 0.02, 0.001, -0.002))]
    for index in range(6, 24):
        model.add(f"seq/{index}.png", np.array([0.1, 0.2, 0.01 * index]), np.array([0.1, 0.1, 4.0]))
    make_pictures(tmp_path / "images", list(model.seen))
    scene = load_scene(model.binary(tmp_path / "sparse").parent, max_side=20)
    assert scene.n_views == 24 and scene.camera == Camera(40, 30, *K).resized(20, 15)
    assert scene.names[2] == "seq/2.png" and scene.points is not None


# --- where things lie


@pytest.mark.parametrize("place", [".", "sparse", "sparse/0"])
def test_models_are_found_in_the_folder_in_sparse_and_in_sparse_0(tmp_path, model, place):
    model.text(tmp_path / place)
    assert len(parse_capture(tmp_path).frames) == 6


def test_of_several_models_the_one_with_most_images_is_taken(tmp_path, model):
    small = dataclasses.replace(model, images=model.images[:2])
    small.text(tmp_path / "sparse" / "0")
    small.binary(tmp_path / "sparse" / "1")
    model.text(tmp_path / "sparse" / "10")
    assert parse_colmap(tmp_path).source == tmp_path / "sparse" / "10" / "images.txt"
    model.binary(tmp_path / "sparse" / "2")
    assert parse_colmap(tmp_path).source == tmp_path / "sparse" / "2" / "images.bin"  # the first of equals
    model.text(tmp_path / "sparse" / "2")
    assert parse_colmap(tmp_path).source == tmp_path / "sparse" / "2" / "images.bin"  # binary before text


def test_images_may_lie_in_the_folder_itself_or_where_the_option_says(tmp_path, model):
    model.text(tmp_path / "sparse")
    (tmp_path / "images").rename(tmp_path / "photos")
    assert parse_colmap(tmp_path, images="photos").frames[0].path == tmp_path / "photos/seq/0.png"
    with pytest.raises(DatasetError, match=r"none of the 6 images is in .*; give their folder with the option images"):
        parse_colmap(tmp_path)
    with pytest.raises(DatasetError, match="pics: no such folder"):
        parse_colmap(tmp_path, images="pics")
    (tmp_path / "photos" / "seq").rename(tmp_path / "seq")
    assert parse_colmap(tmp_path).frames[0].path == tmp_path / "seq/0.png"


def test_images_without_a_file_are_counted_as_skipped(tmp_path, model):
    (tmp_path / "images/seq/3.png").unlink()
    capture = parse_colmap(model.binary(tmp_path))
    assert len(capture.frames) == 5 and capture.skipped == {"their image file is missing": 1}


def test_a_link_out_of_the_dataset_is_refused_unless_the_caller_names_it(tmp_path, model):
    root = tmp_path / "dataset"
    model.text(root)
    (root / "images").symlink_to(tmp_path / "images")
    with pytest.raises(DatasetError, match=r"leads out of .*; say that it is meant with images="):
        parse_colmap(root)
    assert len(parse_colmap(root, images=str(tmp_path / "images")).frames) == 6


def test_a_transforms_json_goes_before_a_model(tmp_path, model, capture):
    capture.write()
    model.text(capture.folder / "sparse" / "0")
    assert parse_capture(capture.folder).source.name == "transforms.json"
    with pytest.raises(DatasetError, match="no COLMAP model here"):
        parse_colmap(tmp_path / "images")


def test_names_may_hold_spaces_and_points_may_be_absent(tmp_path, model):
    model.add("my photo.png", np.ones(3), np.ones(3))
    make_pictures(tmp_path / "images", ["my photo.png"])
    model.text(tmp_path)
    (tmp_path / "points3D.txt").unlink()
    capture = parse_colmap(tmp_path)
    assert capture.frames[0].name == "my photo.png" and capture.points is None


# --- damaged and hostile files


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return damage


BAD_TEXT = [
    ("cameras.txt", "7 PINHOLE", "x PINHOLE", "line 2: CAMERA_ID: must be a whole number >= 0; got 'x'"),
    ("cameras.txt", "PINHOLE", "FISHY", r"line 2: MODEL: 'FISHY' is not supported \(known: SIMPLE_PINHOLE"),
    ("cameras.txt", "PINHOLE", "EQUIRECTANGULAR", "'EQUIRECTANGULAR' is not supported.*cut panoramas into"),
    ("cameras.txt", " 40 30 ", " 0 30 ", "line 2: WIDTH HEIGHT: must lie between 1 and 65536; got 0 30"),
    ("cameras.txt", " 40 30 ", " 40 99999999999 ", "WIDTH HEIGHT: must lie between 1 and 65536; got 40 99999999999"),
    ("cameras.txt", "35.0 ", "", "line 2: PARAMS: PINHOLE has 4; got 3"),
    ("cameras.txt", "35.0 ", "0.0 ", "line 2: PARAMS: camera: fx must be positive and finite; got 0.0"),
    ("cameras.txt", "35.0 ", "1e400 ", "line 2: PARAMS: must be finite and below 1e.30; got '1e400"),
    ("cameras.txt", "# cameras\n", "7 PINHOLE 4 3 1 1 2 2\n", "line 2: CAMERA_ID: 7 is there already"),
    ("cameras.txt", "7 PINHOLE 40 30", "7 PINHOLE #", "line 2: WIDTH HEIGHT: must be a whole number >= 0; got '#'"),
    ("images.txt", " 7 seq/2.png", " 8 seq/2.png", r"line 6: CAMERA_ID: 8 is not among the cameras \(known: 7\)"),
    ("images.txt", "seq/2.png", "seq/1.png", "line 6: NAME: 'seq/1.png' is already the image of line 4"),
    ("images.txt", "seq/2.png", "seq//./1.png", "line 6: NAME: 'seq/1.png' is already the image of line 4"),
    ("images.txt", "seq/2.png", "../images/seq/2.png", "line 6: NAME: '../images/seq/2.png' leads out of"),
    ("images.txt", "seq/2.png", "/etc/passwd", "line 6: NAME: '/etc/passwd' leads out of"),
    ("images.txt", "seq/2.png", "a\0b", r"line 6: NAME: 'a\\x00b' cannot be a file name"),
    ("images.txt", "seq/2.png", "a\u2028b", r"line 6: NAME: 'a\\u2028b' cannot be a file name"),
    ("images.txt", "seq/2.png", "a" * 3000, "line 6: NAME: '.*' cannot be a file name"),
    ("images.txt", " 7 seq/2.png", "", "line 6: must be IMAGE_ID QW .*; got 8 values"),
    ("images.txt", "0.3 4.0", "nan 4.0", "line 2: QW QX QY QZ TX TY TZ: must be finite .*got '.*nan"),
    ("images.txt", "0.3 4.0", "0,3 4.0", "line 2: QW QX QY QZ TX TY TZ: must be numbers"),
    ("images.txt", "# images\n", "9 0 0 0 0 1 2 3 7 b.png\n\n", "line 1: QW QX QY QZ: a quaternion of norm 0"),
    ("images.txt", "# images\n", "9 1 0 0 0 1 2 3 7 b.png\n", "line 2: POINTS2D: must be triples"),
    ("points3D.txt", " 1 2 3 ", " 1 2\n", "line 2: must be POINT3D_ID X Y Z R G B ERROR TRACK; got 6 values"),
    ("points3D.txt", "# points\n", "5 1 1e39 1 0 0 0 0\n", "line 1: X Y Z: must be finite and below 1e.30"),
    ("points3D.txt", "# points\n", "5 1 x 1 0 0 0 0\n", "line 1: X Y Z: must be numbers; got '1 x 1'"),
]


@pytest.mark.parametrize(("name", "old", "new", "message"), BAD_TEXT, ids=[f"{c[0][:3]}-{c[3][:40]}" for c in BAD_TEXT])
def test_bad_text_is_one_line_with_file_line_value_and_mend(tmp_path, model, name, old, new, message):
    replaced(name, old, new)(model.text(tmp_path))
    with pytest.raises(DatasetError, match=message) as caught:
        parse_colmap(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / name}: line ") and "; " in text and text.splitlines() == [text]


def test_text_that_is_none_is_refused(tmp_path, model):
    (model.text(tmp_path) / "images.txt").write_bytes(b"# images\n11 1 0 0 0 0 0 0 7 \xff.png\n\n")
    with pytest.raises(DatasetError, match=r"images.txt: line 2: not UTF-8 text"):
        parse_colmap(tmp_path)


def patched(name: str, offset: int, code: str, value: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        struct.pack_into(code, data, offset, value)
        (folder / name).write_bytes(data)

    return damage


def resized(name: str, change: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data + bytes(change) if change > 0 else data[:change])

    return damage


BAD_BINARY = [
    (patched("cameras.bin", 0, "<Q", 10**12), "cameras.bin: byte 8: claims 1000000000000 cameras, but only 56 bytes"),
    (patched("images.bin", 0, "<Q", 10**12), "images.bin: byte 8: claims 1000000000000 images"),
    (patched("points3D.bin", 0, "<Q", 10**12), "points3D.bin: byte 8: claims 1000000000000 points"),
    (patched("points3D.bin", 0, "<Q", 19), "points3D.bin: byte 1129: 59 bytes follow the last record"),
    (patched("points3D.bin", 0, "<Q", 21), "points3D.bin: byte 1188: the file ends after 1188 bytes, amid a record"),
    (patched("points3D.bin", 8 + 43, "<Q", 2**63), r"points3D.bin: byte 59: claims \d+ track elements"),
    (patched("points3D.bin", 8 + 8, "<d", math.nan), "points3D.bin: byte 8: X Y Z: must be finite .*got nan"),
    (patched("images.bin", 8 + 64 + 10, "<Q", 2**61), r"images.bin: byte 90: claims \d+ 2D points"),
    (patched("images.bin", 8 + 4, "<d", math.inf), r"images.bin: byte 8: QW .* must be finite .*got \[inf"),
    (patched("images.bin", 8 + 60, "<I", 3), "images.bin: byte 8: CAMERA_ID: 3 is not among the cameras"),
    (patched("images.bin", 8 + 64, "<B", 255), "images.bin: byte 72: NAME: not UTF-8 text"),
    (patched("images.bin", 8 + 64, "<B", 10), r"images.bin: byte 8: NAME: '\\neq/0.png' cannot be a file name"),
    (patched("images.bin", 8 + 64, "<B", 0), "images.bin: byte "),
    (patched("cameras.bin", 8 + 4, "<i", 99), "cameras.bin: byte 8: MODEL: 'number 99' is not supported"),
    (patched("cameras.bin", 8 + 4, "<i", -1), "cameras.bin: byte 8: MODEL: 'number -1' is not supported"),
    (patched("cameras.bin", 8 + 8, "<Q", 2**40), "cameras.bin: byte 8: WIDTH HEIGHT: must lie between"),
    (patched("cameras.bin", 8 + 24, "<d", -1.0), "cameras.bin: byte 8: PARAMS: camera: fx must be positive"),
    (patched("cameras.bin", 8 + 24, "<d", math.nan), "cameras.bin: byte 8: PARAMS: must be finite"),
    (resized("cameras.bin", 4), "cameras.bin: byte 64: 4 bytes follow the last record"),
    (resized("images.bin", -30), "images.bin: byte .*: claims 20 2D points, but only 450 bytes follow"),
    (resized("points3D.bin", -1188), "points3D.bin: the file is empty"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_BINARY, ids=[message[:50] for _, message in BAD_BINARY])
def test_bad_binaries_are_refused_with_the_byte_and_without_memory(tmp_path, model, damage, message):
    damage(model.binary(tmp_path))
    tracemalloc.start()
    with pytest.raises(DatasetError, match=message) as caught:
        parse_colmap(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 and str(caught.value).splitlines() == [str(caught.value)]


# --- there and back


def assert_same(a, b) -> None:
    assert [frame.name for frame in a.frames] == [frame.name for frame in b.frames]
    for left, right in zip(a.frames, b.frames, strict=True):
        assert (left.c2w - right.c2w).abs().max() < 1e-6 and left.lens.camera == right.lens.camera
        assert left.lens.pixels(np.array([[0.3, 0.2]])) == pytest.approx(right.lens.pixels(np.array([[0.3, 0.2]])))
    assert (a.points is None and b.points is None) or torch.equal(a.points, b.points)


def there_and_back(source, folder: Path) -> None:
    """transforms.json -> COLMAP text -> transforms.json, images where they were."""
    root = source.source.parent
    write_colmap_text(folder, source, {frame.name: frame.name for frame in source.frames})
    model = parse_colmap(folder, images=str(root))
    assert_same(source, model)
    write_transforms_json(folder, model, {frame.name: frame.name for frame in model.frames})
    for frame in source.frames:
        (folder / frame.name).parent.mkdir(exist_ok=True)
        shutil.copyfile(frame.path, folder / frame.name)
    assert_same(source, parse_transforms_json(folder))


@pytest.mark.parametrize("distorted", [False, True])
def test_transforms_json_survives_the_way_through_a_model(tmp_path, capture, distorted):
    capture.content["fl_x"] = 100 / 3  # no short decimal
    if distorted:
        capture.content["frames"][3] |= {"k1": 0.1, "k2": -0.05 / 3, "p1": 0.001, "p2": 0.002, "k3": 0.01}
        capture.content["frames"][5] |= {"k1": 0.1, "is_fisheye": True}
    np.savez(capture.folder / "points.npz", xyz=np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32))
    (tmp_path / "model").mkdir()
    there_and_back(parse_capture(capture.write()), tmp_path / "model")


@pytest.mark.dataset
def test_the_fox_survives_the_way_through_a_model(tmp_path, real_scenes):
    there_and_back(parse_capture(real_scenes / "fox"), tmp_path)


def test_names_that_colmap_would_cut_are_not_written(tmp_path, model):
    capture = parse_colmap(model.text(tmp_path))
    with pytest.raises(DatasetError, match=r"'my photo.png'.*ends a name at a space; rename"):
        write_colmap_text(tmp_path, capture, dict.fromkeys(model.seen, "my photo.png"))


def test_pycolmap_reads_what_is_written(tmp_path, model):
    pycolmap = pytest.importorskip("pycolmap")
    model.cameras.append((9, "FULL_OPENCV", 40, 30, (*K, *(0.01 * n for n in range(1, 9)))))
    model.add("b.png", np.array([0.1, -2.0, 0.3]), np.array([1.0, 2.0, 3.0]), camera_id=9)
    make_pictures(tmp_path / "images", ["b.png"])
    capture = parse_colmap(model.binary(tmp_path))
    (tmp_path / "out").mkdir()
    write_colmap_text(tmp_path / "out", capture, {frame.name: frame.name for frame in capture.frames})
    read = pycolmap.Reconstruction(tmp_path / "out")
    assert {image.name for image in read.images.values()} == {*model.seen}
    frames = {frame.name: frame for frame in capture.frames}
    for image in read.images.values():
        frame = frames[image.name]
        w2c = torch.from_numpy(image.cam_from_world().matrix())
        assert torch.allclose(w2c, invert_c2w(frame.c2w)[:3], atol=1e-12)
        assert tuple(image.camera.params) == parameters_of(frame.lens)[1]
    assert sorted(p.xyz.tolist() for p in read.points3D.values()) == sorted(model.points.tolist())


@pytest.mark.parametrize("form", ["write_text", "write_binary"])
def test_models_written_by_pycolmap_are_read(tmp_path, form):
    pycolmap = pytest.importorskip("pycolmap")
    options = pycolmap.SyntheticDatasetOptions()
    options.num_cameras_per_rig, options.camera_width, options.camera_height = 2, 40, 30
    options.camera_params = [*(50.0, 17.0, 14.0), 0.05]
    made = pycolmap.synthesize_dataset(options)
    getattr(made, form)(tmp_path)  # with rigs and frames
    images = {image.name: image for image in made.images.values()}
    make_pictures(tmp_path / "images", list(images))
    capture = parse_colmap(tmp_path)
    assert {frame.name for frame in capture.frames} == set(images) and len(images) == 20
    points = {key: torch.from_numpy(point.xyz) for key, point in made.points3D.items()}
    assert torch.allclose(capture.points.sum(0).double(), torch.stack([*points.values()]).sum(0), atol=1e-3)
    for frame in capture.frames:
        observed = [point for point in images[frame.name].points2D if point.has_point3D()]
        world = torch.stack([points[point.point3D_id] for point in observed])
        local = ((world - frame.c2w[:3, 3]) @ frame.c2w[:3, :3]).numpy()
        pixels = frame.lens.pixels(local[:, :2] / local[:, 2:])
        assert len(observed) > 5 and np.abs(pixels - [point.xy for point in observed]).max() < 1e-6
