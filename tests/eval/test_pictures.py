"""PCA pictures and embedded images."""

from __future__ import annotations

import base64
import math

import cv2
import numpy as np
import torch

from posemap_fast.eval import pca_image
from posemap_fast.eval.pictures import as_uint8, difference_image, jpeg_uri, png_uri


def random_maps(n: int = 3, channels: int = 16, h: int = 5, w: int = 7) -> torch.Tensor:
    return torch.randn(n, channels, h, w, generator=torch.Generator().manual_seed(0))


def test_the_first_colour_is_the_direction_of_largest_variance() -> None:
    maps = 0.01 * random_maps()
    signal = torch.linspace(-1, 1, 3 * 5 * 7).reshape(3, 5, 7)
    maps[:, 4] += signal
    red = pca_image(maps)[..., 0]
    assert abs(np.corrcoef(red.flatten(), signal.flatten())[0, 1]) > 0.999


def test_equal_features_get_equal_colours_across_views() -> None:
    maps = random_maps()
    maps[2] = maps[0].flip(-1)
    picture = pca_image(maps)
    torch.testing.assert_close(picture[2], picture[0].flip(1))


def test_turning_the_feature_space_changes_no_colour_but_its_sign() -> None:
    maps = random_maps(channels=6).double() * torch.tensor([9.0, 5.0, 3.0, 1.0, 0.5, 0.1]).double()[None, :, None, None]
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double()).Q
    a, b = pca_image(maps), pca_image(torch.einsum("ij,njhw->nihw", turn, maps))
    same = [
        torch.allclose(b[..., k], a[..., k], atol=1e-5) or torch.allclose(b[..., k], 1 - a[..., k], atol=1e-5)
        for k in range(3)
    ]
    assert all(same)


def test_few_channels_constant_maps_bad_cells_and_no_maps_are_drawn() -> None:
    assert pca_image(random_maps(channels=2)).shape == (3, 5, 7, 3)
    assert torch.isfinite(pca_image(torch.ones(1, 4, 2, 2))).all()
    assert pca_image(torch.zeros(0, 8, 3, 4)).shape == (0, 3, 4, 3)
    maps = random_maps()
    maps[0, 0, 0, 0] = math.nan
    picture = pca_image(maps)
    assert picture[0, 0, 0].tolist() == [0, 0, 0]
    assert torch.isfinite(picture).all()


def decoded(uri: str) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(uri.split(",")[1]), dtype=np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]


def test_embedded_images_are_rgb_again_when_decoded() -> None:
    image = torch.zeros(16, 24, 3)
    image[..., 0] = 1.0
    assert (decoded(png_uri(image)) == as_uint8(image)).all()
    assert np.abs(decoded(jpeg_uri(image)).astype(int) - as_uint8(image)).max() < 8


def test_values_outside_the_range_are_clamped_and_nan_is_black() -> None:
    assert as_uint8(torch.tensor([[[-1.0, 2.0, math.nan]]])).tolist() == [[[0, 255, 0]]]


def test_a_difference_takes_bytes_and_floats_alike() -> None:
    a = torch.full((2, 2, 3), 51, dtype=torch.uint8)
    torch.testing.assert_close(
        difference_image(a, torch.full((2, 2, 3), 0.1)), torch.full((2, 2, 3), 0.4), atol=0.01, rtol=0
    )
