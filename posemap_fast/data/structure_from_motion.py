"""Poses, lens and sparse points from images alone, by COLMAP through pycolmap (optional; runs on the CPU).

Features (SIFT), matches of image pairs, incremental mapping (Schoenberger and Frahm, CVPR 2016), and a Capture of the
largest model with its world turned upright. Features and matches stay in a database, so what was interrupted goes on.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posemap_fast.data.capture import Capture, Frame, natural_order
from posemap_fast.data.colmap_cameras import CameraRecord, lens_of
from posemap_fast.errors import ConfigError, DatasetError
from posemap_fast.geometry import invert_c2w, so3_exp
from posemap_fast.optional import PYCOLMAP
from posemap_fast.progress import NoProgress, ProgressMeter

__all__ = ["MATCHING", "SFM_LENSES", "KnownDistance", "Reconstruction", "SfmConfig", "StructureFromMotion", "up_to_z"]

SFM_LENSES = {"radial": "SIMPLE_RADIAL", "opencv": "OPENCV", "fisheye": "OPENCV_FISHEYE"}
MATCHING = ("auto", "sequential", "exhaustive")
_EXHAUSTIVE_UP_TO = 200  # images; every pair is affordable, and finds each return to a place
_OVERLAP = 10  # neighbours on each side in sequential matching, and as many at distances 16, 32, ...
_N_LOOP = 50  # images, spread over the sequence, that are matched with each other to close loops
_BLOCK = 20  # images; pairs are matched in blocks of 20 x 20, one step of the progress bar each
_LEAST_IMAGES = 3


@dataclass(frozen=True)
class SfmConfig:
    """What the reconstruction depends on."""

    lens: str = "radial"  # a name in SFM_LENSES
    matching: str = "auto"  # a name in MATCHING; auto: exhaustive up to 200 images
    max_features: int = 4096  # per image, about; the time of matching grows faster than their number
    n_threads: int = -1  # -1: all cores
    seed: int = 0  # of every RANSAC; several threads still differ in the last digits

    def __post_init__(self) -> None:
        for key, known in (("lens", SFM_LENSES), ("matching", MATCHING)):
            if getattr(self, key) not in known:
                raise ConfigError(f"{key}: must be one of {', '.join(known)}; got '{getattr(self, key)}'")
        if self.n_threads == 0 or self.n_threads < -1 or self.max_features < 100:
            raise ConfigError(
                f"n_threads must be -1 or positive and max_features at least 100; got {self.n_threads} and "
                f"{self.max_features}"
            )


@dataclass(frozen=True)
class KnownDistance:
    """A measured distance between the camera centres of two images, which gives the model its scale."""

    first: str  # image names
    second: str
    metres: float


@dataclass(frozen=True)
class Reconstruction:
    """What came out; `capture` is metric only where a distance was known."""

    capture: Capture
    unregistered: list[str]  # images without a pose
    reprojection_error_px: float  # mean over all observations
    n_points: int
    n_models: int  # the images of the smaller ones count as unregistered


def up_to_z(c2w: torch.Tensor) -> torch.Tensor:
    """(3, 3) rotation of the world that turns the mean up of cameras (n, 4, 4) to +z, by the smallest angle.

    The identity when the cameras do not agree on an up (the mean of the unit vectors is shorter than 0.3).
    """
    up = -c2w[:, :3, 1].double().mean(0)
    if float(up.norm()) < 0.3:
        return torch.eye(3, dtype=torch.float64)
    up, z = torch.nn.functional.normalize(up, dim=0), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    axis = torch.linalg.cross(up, z)
    angle = torch.atan2(axis.norm(), up[2])
    if float(axis.norm()) < 1e-9:  # up is +z already, or -z
        axis = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    return so3_exp(torch.nn.functional.normalize(axis, dim=0) * angle)


def pairs_of(n_images: int, matching: str) -> list[list[tuple[int, int]]]:
    """Index pairs (i < j) to match, in blocks of neighbouring images.

    Sequential: each image with its neighbours, with images at distances of powers of two, and images spread over the
    whole sequence with each other.
    """
    is_exhaustive = matching == "exhaustive" or (matching == "auto" and n_images <= _EXHAUSTIVE_UP_TO)
    distances = {*range(1, _OVERLAP + 1), *(2**k for k in range(4, 4 + _OVERLAP))}
    spread = {round(i) for i in np.linspace(0, n_images - 1, min(n_images, _N_LOOP))}
    blocks: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for i in range(n_images):
        for j in range(i + 1, n_images):
            if is_exhaustive or j - i in distances or (i in spread and j in spread):
                blocks.setdefault((i // _BLOCK, j // _BLOCK), []).append((i, j))
    return list(blocks.values())


class StructureFromMotion:
    """The steps of one reconstruction; call `extract`, `match`, `map` and `result` in this order, or where it stopped.

    Args:
        images: folder of the images.
        names: their names in the order of recording.
        workspace: folder for the database and the models.
        config: what the result depends on.
        has_one_camera: whether all images come from one camera with one zoom.
        meter: shows progress.
    Raises:
        BackendError: pycolmap is not installed.
    """

    def __init__(
        self,
        images: Path,
        names: Sequence[str],
        workspace: Path,
        config: SfmConfig,
        has_one_camera: bool = True,
        meter: ProgressMeter | None = None,
    ):
        self._colmap: Any = PYCOLMAP.load()
        self._images, self._names, self._config = images, list(names), config
        self._workspace = workspace
        self.database, self.models = workspace / "database.db", workspace / "models"
        self._has_one_camera, self._meter = has_one_camera, meter or NoProgress()

    @contextlib.contextmanager
    def _running(self, step: str) -> Iterator[None]:
        """COLMAP's log is silent but for errors, its random numbers start anew, its exceptions become ours."""
        level = self._colmap.logging.minloglevel
        self._colmap.logging.minloglevel = int(self._colmap.logging.Level.ERROR)
        self._colmap.set_random_seed(self._config.seed)
        try:
            yield
        except (RuntimeError, ValueError, IndexError) as error:
            first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise DatasetError(f"{self._images}: {step} failed: {first_line}; start again in another folder") from error
        finally:
            self._colmap.logging.minloglevel = level

    def extract(self, is_resumed: bool = False) -> int:
        """Find the features of all images; returns their number."""
        colmap, config = self._colmap, self._config
        if not is_resumed:
            self._workspace.mkdir(parents=True, exist_ok=True)
            self.database.unlink(missing_ok=True)
        options = colmap.FeatureExtractionOptions()
        options.num_threads, options.sift.max_num_features = config.n_threads, config.max_features
        mode = colmap.CameraMode.SINGLE if self._has_one_camera else colmap.CameraMode.PER_IMAGE
        with self._running("feature extraction"), self._meter.task("features", total=len(self._names)) as task:
            for start in range(0, len(self._names), _BLOCK):
                names = self._names[start : start + _BLOCK]
                reader = colmap.ImageReaderOptions()
                reader.camera_model = SFM_LENSES[config.lens]
                if self._has_one_camera:
                    reader.existing_camera_id = self._camera_id()
                colmap.extract_features(
                    self.database, self._images, names, mode, reader, options, device=colmap.Device.cpu
                )
                task.update(start + len(names))
            with self._opened() as database:
                return database.num_keypoints()

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        database = self._colmap.Database.open(self.database)
        try:
            yield database
        finally:
            database.close()

    def _camera_id(self) -> int:
        """The camera that the first images got; -1 before that."""
        with self._opened() as database:
            return min((camera.camera_id for camera in database.read_all_cameras()), default=-1)

    def match(self, is_resumed: bool = False) -> int:
        """Match image pairs and verify them by two-view geometry; returns the number of pairs that passed."""
        colmap, config = self._colmap, self._config
        matching, verification = colmap.FeatureMatchingOptions(), colmap.TwoViewGeometryOptions()
        matching.num_threads, verification.ransac.random_seed = config.n_threads, config.seed
        pairing = colmap.ImportedPairingOptions()
        pairing.match_list_path = self._workspace / "pairs.txt"
        blocks, n_done = pairs_of(len(self._names), config.matching), 0
        with self._running("matching"):
            if not is_resumed:
                with self._opened() as database:
                    database.clear_matches()
                    database.clear_two_view_geometries()
            with self._meter.task("matches", total=sum(map(len, blocks))) as task:
                for block in blocks:
                    lines = [f"{self._names[i]} {self._names[j]}\n" for i, j in block]
                    pairing.match_list_path.write_text("".join(lines), encoding="utf-8")
                    colmap.match_image_pairs(self.database, matching, pairing, verification, colmap.Device.cpu)
                    n_done += len(block)
                    task.update(n_done)
            with self._opened() as database:
                return int((np.array(database.read_two_view_geometry_num_inliers()[1]) > 0).sum())

    def map(self) -> int:
        """Incremental mapping from an initial pair; the models go to workspace/models. Returns their number.

        Raises:
            DatasetError: no pair of images fits together, or only a handful of images does.
        """
        colmap, config = self._colmap, self._config
        shutil.rmtree(self.models, ignore_errors=True)
        self.models.mkdir(parents=True)
        options = colmap.IncrementalPipelineOptions()
        options.num_threads = options.mapper.num_threads = config.n_threads
        options.random_seed = options.mapper.random_seed = options.triangulation.random_seed = config.seed
        options.min_model_size = _LEAST_IMAGES
        n_images, n_done = len(self._names), 2

        def registered() -> None:
            nonlocal n_done
            n_done += 1
            task.update(min(n_done, n_images))

        with self._running("mapping"), self._meter.task("poses", total=n_images) as task:
            models = colmap.incremental_mapping(
                self.database, self._images, self.models, options, next_image_callback=registered
            )
        if not models:
            raise DatasetError(
                f"{self._images}: the images do not fit together to a model; film slowly and sideways, in good light, "
                "so that each view overlaps the last; or take more frames, or --matching exhaustive"
            )
        return len(models)

    def result(self, sparse: Path, known: KnownDistance | None = None) -> Reconstruction:
        """The largest model, its world upright (mean camera up is +z) and scaled; written to `sparse`, too.

        Args:
            sparse: folder for the COLMAP model in the world of the capture.
            known: sets the scale; without it the unit is arbitrary.
        Raises:
            DatasetError: the images of `known` have no pose or the same place.
        """
        with self._running("reading the models"):
            models = [self._colmap.Reconstruction(path) for path in sorted(self.models.iterdir()) if path.is_dir()]
            model = max(models, key=lambda found: found.num_reg_images())
            names = {image.name: _c2w(image) for image in (model.image(i) for i in model.reg_image_ids())}
            rotation = up_to_z(torch.stack(list(names.values())))
            turn = self._colmap.Rotation3d(rotation.numpy())
            model.transform(self._colmap.Sim3d(_scale(names, known), turn, np.zeros(3)))
            sparse.mkdir(parents=True, exist_ok=True)
            model.write(sparse)
        frames = [_frame(self._images, model.image(i)) for i in model.reg_image_ids()]
        points = np.array([model.point3D(i).xyz for i in sorted(model.point3D_ids())], np.float32).reshape(-1, 3)
        capture = Capture(
            name=self._images.parent.name,
            source=self._images,
            frames=sorted(frames, key=lambda frame: natural_order(frame.name)),
            is_metric=known is not None,
            points=torch.from_numpy(points),
        )
        unregistered = [name for name in self._names if name not in names]
        error = float(model.compute_mean_reprojection_error())
        return Reconstruction(capture, unregistered, error, len(points), len(models))


def _c2w(image: Any) -> torch.Tensor:
    w2c = torch.eye(4, dtype=torch.float64)
    w2c[:3] = torch.from_numpy(np.array(image.cam_from_world().matrix()))
    return invert_c2w(w2c)


def _frame(folder: Path, image: Any) -> Frame:
    camera = image.camera
    record = CameraRecord(
        f"camera {camera.camera_id}",
        camera.camera_id,
        camera.model_name,
        camera.width,
        camera.height,
        tuple(float(value) for value in camera.params),
    )
    return Frame(image.name, folder / image.name, _c2w(image), lens_of(record))


def _scale(c2w: dict[str, torch.Tensor], known: KnownDistance | None) -> float:
    """Metres per unit of the model; 1 when no distance is known."""
    if known is None:
        return 1.0
    for name in (known.first, known.second):
        if name not in c2w:
            raise DatasetError(f"known distance: {name} is no image with a pose; see the names in transforms.json")
    distance = float((c2w[known.first][:3, 3] - c2w[known.second][:3, 3]).norm())
    extent = max(float((pose[:3, 3] - c2w[known.first][:3, 3]).norm()) for pose in c2w.values())
    if distance < 1e-3 * extent or known.first == known.second:
        raise DatasetError(f"known distance: {known.first} and {known.second} were taken at one place; choose others")
    return known.metres / distance
