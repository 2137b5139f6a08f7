"""COLMAP's camera models: the same pixels as pycolmap and OpenCV, and the way there and back."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from posemap_fast.data.colmap_cameras import CAMERA_MODELS, CameraRecord, lens_of, parameters_of
from posemap_fast.geometry import LENSES, Camera, Lens


def parameters_for(name: str) -> tuple[float, ...]:
    """Plausible parameters of a camera of 640 x 480, different in every place."""
    shape = CAMERA_MODELS[name]
    extra = {"FOV": (0.9,), "EUCM": (0.6, 1.1)}.get(name, tuple(0.05 / (n + 1) for n in range(shape.n_extra)))
    return (*(500.0, 510.0)[: shape.n_focal], 330.0, 235.0, *extra)


def lens_for(name: str, parameters: tuple[float, ...] | None = None) -> Lens:
    return lens_of(CameraRecord("cameras.txt: line 1", 1, name, 640, 480, parameters or parameters_for(name)))


@pytest.mark.parametrize("is_zero", [False, True], ids=["bent", "zero_extra"])
@pytest.mark.parametrize("name", CAMERA_MODELS)
def test_camera_models_are_pycolmaps(name, is_zero):
    pycolmap = pytest.importorskip("pycolmap")
    parameters = parameters_for(name)
    if is_zero and name != "FOV":  # pycolmap's own series of FOV near 0 has a wrong sign
        parameters = (*parameters[: CAMERA_MODELS[name].n_focal + 2], *(0.0,) * CAMERA_MODELS[name].n_extra)
    camera = pycolmap.Camera(model=name, width=640, height=480, params=parameters)
    assert int(camera.model) == CAMERA_MODELS[name].number
    xy = np.random.default_rng(3).uniform(-0.8, 0.8, (50, 2))
    found = lens_for(name, parameters).pixels(xy)
    assert np.abs(found - camera.img_from_cam(np.c_[xy, np.ones(50)])).max() < 1e-9
    assert np.isfinite(found).all()


def test_no_camera_model_of_pycolmap_is_unknown_but_the_panorama():
    pycolmap = pytest.importorskip("pycolmap")
    assert set(pycolmap.CameraModelId.__members__) - set(CAMERA_MODELS) <= {"INVALID", "EQUIRECTANGULAR"}


@pytest.mark.parametrize("name", ["OPENCV", "FULL_OPENCV", "OPENCV_FISHEYE"])
def test_the_order_of_distortion_parameters_is_opencvs(name):
    parameters = parameters_for(name)
    xyz = np.random.default_rng(3).uniform(-0.6, 0.6, (1, 30, 3))
    xyz[..., 2] = 1
    matrix = np.array([[500.0, 0, 330], [0, 510, 235], [0, 0, 1]])
    project = cv2.fisheye.projectPoints if name == "OPENCV_FISHEYE" else cv2.projectPoints
    expected = project(xyz, np.zeros(3), np.zeros(3), matrix, np.array(parameters[4:]))[0].reshape(-1, 2)
    assert np.abs(lens_for(name).pixels(xyz[0, :, :2]) - expected).max() < 1e-9


def test_division_model_reverses_its_definition():
    lens = lens_for("DIVISION", (500.0, 500.0, 320.0, 240.0, -0.3))
    bent = (lens.pixels(np.array([[0.5, -0.3], [0.0, 0.0]])) - [320, 240]) / 500
    back = bent / (1 - 0.3 * (bent**2).sum(1, keepdims=True))
    assert np.allclose(back, [[0.5, -0.3], [0, 0]], atol=1e-12)
    unseen = lens_for("DIVISION", (500.0, 500.0, 320.0, 240.0, 0.3)).pixels(np.array([[2.0, 0.0]]))
    assert np.isnan(unseen).all()


@pytest.mark.parametrize("name", CAMERA_MODELS)
def test_every_lens_can_be_written_as_a_camera_and_read_again(name):
    lens = lens_for(name)
    assert lens_for(*parameters_of(lens)) == lens


def test_every_lens_model_has_a_colmap_camera():
    camera = Camera(640, 480, 500.0, 510.0, 330.0, 235.0)
    for name in LENSES:
        for count in LENSES.get(name).n_coefficients:
            lens = Lens(camera, name, (0.1,) * count)
            xy = np.array([[0.3, -0.2]])
            assert np.allclose(lens_for(*parameters_of(lens)).pixels(xy), lens.pixels(xy), atol=1e-9), (name, count)
