"""Photometric augmentation: off is nothing, each change does what it says, and none leaves [0, 1] or makes a NaN."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
import torch

from posemap_fast.apr import AugmentConfig, augment, augment_images
from posemap_fast.errors import ConfigError, ShapeError
from posemap_fast.seeding import step_generator

_EVERYTHING = AugmentConfig(gain=0.4, contrast=0.5, gamma=0.6, colour=0.3, blur_px=1.5, noise=0.1, erase=0.3)
_NAMES = [item.name for item in fields(AugmentConfig)]
_MILD = {**dict.fromkeys(_NAMES, 0.2), "blur_px": 3.0}  # one at a time; keep values of 0.3 to 0.5 inside (0, 1)


def _images(batch: int = 4, height: int = 24, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def _augmented(images: torch.Tensor, step: int = 0, **ranges: float) -> torch.Tensor:
    config = AugmentConfig(**ranges) if ranges else _EVERYTHING
    return augment_images(images, config, step_generator(0, "test", step))


def _same_image(n: int) -> torch.Tensor:
    """n copies of one image between 0.3 and 0.5, so that mild changes stay inside [0, 1]."""
    return (0.3 + 0.2 * _images(1)).repeat(n, 1, 1, 1)


def test_all_ranges_zero_give_the_very_object_and_draw_nothing():
    images, generator = _images(), step_generator(0, "test")
    assert augment_images(images, AugmentConfig(), generator) is images
    assert torch.equal(generator.get_state(), step_generator(0, "test").get_state())


@pytest.mark.parametrize("name", _NAMES)
def test_one_range_is_enough_to_switch_it_on(name):
    assert not AugmentConfig(**{name: 0.3}).is_off
    images = _images()
    before = images.clone()
    assert not torch.equal(_augmented(images, **{name: 0.3}), images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (24, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_type_and_range_are_kept(size, dtype):
    images = _images(3, *size).to(dtype)
    for step in range(5):
        changed = _augmented(images, step)
        assert changed.shape == images.shape
        assert changed.dtype == dtype
        assert changed.min() >= 0 and changed.max() <= 1
    assert _augmented(images[:0]).shape == (0, 3, *size)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("ranges", [{}, *({name: 0.3} for name in _NAMES)], ids=["all", *_NAMES])
def test_the_memory_format_is_kept_and_does_not_change_the_values(memory_format, ranges):
    images = _images().contiguous(memory_format=memory_format)
    changed = _augmented(images, **ranges)
    assert changed.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(changed, _augmented(_images(), **ranges), atol=1e-6, rtol=1e-6)


def test_the_generator_decides():
    assert torch.equal(_augmented(_images()), _augmented(_images()))
    assert not torch.equal(_augmented(_images()), _augmented(_images(), step=1))


@pytest.mark.parametrize("name", _NAMES)
def test_images_of_a_batch_are_changed_each_in_its_own_way(name):
    changed = _augmented(_same_image(6), **{name: _MILD[name]}).flatten(1)
    assert (torch.cdist(changed, changed) + torch.eye(6)).min() > 1e-4


def test_switching_one_change_off_leaves_the_draws_of_the_others():
    images = _same_image(5)
    gained = _augmented(images, gain=0.2)
    both = _augmented(images, gain=0.2, erase=0.4)
    kept = both != 0.5
    assert 0.5 < kept.float().mean() < 1
    assert torch.equal(both[kept], gained[kept])


def test_gain_multiplies_each_image_by_one_factor_within_the_range():
    images = _same_image(200)
    factors = (_augmented(images, gain=0.5) / images).flatten(1)
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
    assert 0.5 <= factors.min() < 0.55 and 1.45 < factors.max() <= 1.5


def test_colour_multiplies_each_channel_by_a_factor_of_its_own():
    images = _same_image(100)
    factors = (_augmented(images, colour=0.3) / images).flatten(2)  # (100, 3, n)
    torch.testing.assert_close(factors, factors[:, :, :1].expand_as(factors))
    assert 0.7 <= factors.min() < 0.72 and 1.28 < factors.max() <= 1.3
    assert abs(torch.corrcoef(factors[:, :, 0].T)[0, 1]) < 0.3


def test_contrast_scales_about_the_mean():
    images = _same_image(100)
    changed = _augmented(images, contrast=0.5)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(changed.mean(dim=(1, 2, 3), keepdim=True), mean)
    factors = changed.flatten(1).std(dim=1) / images.flatten(1).std(dim=1)
    torch.testing.assert_close(changed, mean + (images - mean) * factors[:, None, None, None])
    assert 0.5 <= factors.min() < 0.55 and 1.45 < factors.max() <= 1.5


def test_gamma_is_a_power_within_the_log_range_that_keeps_black_and_white():
    images = _same_image(100)
    exponents = (_augmented(images, gamma=0.5).log() / images.log()).flatten(1)
    torch.testing.assert_close(exponents, exponents[:, :1].expand_as(exponents), atol=1e-4, rtol=0)
    assert -0.501 <= exponents.log().min() < -0.45 and 0.45 < exponents.log().max() <= 0.501
    ends = torch.tensor([0.0, 1.0]).repeat(20, 3, 4, 1)
    torch.testing.assert_close(_augmented(ends, gamma=0.5), ends, atol=1 / 255, rtol=0)


def test_blur_of_a_point_is_a_gaussian_within_the_range():
    images = torch.zeros(60, 3, 31, 33)
    images[:, :, 15, 16] = 1
    point = _augmented(images, blur_px=2.0)[:, 0].double()
    torch.testing.assert_close(point.sum(dim=(1, 2)), torch.ones(60, dtype=torch.float64), atol=1e-6, rtol=0)
    distance = torch.arange(31) - 15
    variance = (point.sum(dim=2) * distance.square()).sum(dim=1)
    torch.testing.assert_close(
        variance, (point.sum(dim=1) * (torch.arange(33) - 16).square()).sum(dim=1), atol=1e-5, rtol=0
    )
    assert variance.min() < 0.2 and 1.8 < variance.max().sqrt() <= 2.001
    widest = variance.argmax()
    gaussian = torch.exp(-0.5 * distance.double().square() / variance[widest])
    torch.testing.assert_close(point[widest].sum(dim=1), gaussian / gaussian.sum(), atol=1e-4, rtol=0)


def test_blur_keeps_a_flat_image_up_to_its_borders():
    flat = torch.full((8, 3, 6, 9), 0.7)
    torch.testing.assert_close(_augmented(flat, blur_px=4.0), flat)


def test_noise_is_normal_and_at_most_as_strong_as_asked():
    images = torch.full((100, 3, 20, 30), 0.5)
    noise = (_augmented(images, noise=0.05) - images).flatten(1).double()
    spread = noise.std(dim=1)
    assert spread.min() < 0.01 and 0.045 < spread.max() < 0.051
    standard = noise / spread[:, None]
    assert noise.mean(dim=1).abs().max() < 0.05 * 5 / math.sqrt(1800)
    assert standard[spread > 0.01].abs().lt(1).double().mean() == pytest.approx(0.6827, abs=0.01)
    assert abs((standard[:, :-1] * standard[:, 1:]).mean()) < 0.02


def test_erase_covers_one_grey_rectangle_of_at_most_the_share():
    images = torch.full((300, 3, 30, 40), 0.2)
    changed = _augmented(images, erase=0.4)
    mask = changed != 0.2
    assert torch.equal(mask[:, 0], mask[:, 1]) and torch.equal(mask[:, 0], mask[:, 2])
    assert torch.all(changed[mask] == 0.5)
    rows, columns = mask[:, 0].any(dim=2), mask[:, 0].any(dim=1)
    assert torch.equal(mask[:, 0], rows[:, :, None] & columns[:, None])  # a product of rows and columns ...
    for sides in (rows, columns):  # ... each of them one run
        assert sides.int().diff(dim=1).abs().sum(dim=1).max() <= 2
    share = mask[:, 0].float().mean(dim=(1, 2))
    assert share.max() <= 0.4
    assert share.max() > 0.35 and share.mean() == pytest.approx(0.2, abs=0.03)
    assert rows[:, 0].any() and rows[:, -1].any() and columns[:, 0].any() and columns[:, -1].any()


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_black_and_white_images_give_no_nan_and_finite_gradients(level):
    for step in range(20):
        images = torch.full((4, 3, 8, 9), level, requires_grad=True)
        changed = _augmented(images, step, gain=1, contrast=1, gamma=2, colour=1, blur_px=3, noise=1, erase=0.5)
        changed.sum().backward()
        assert changed.isfinite().all()
        assert images.grad.isfinite().all()


@pytest.mark.parametrize("draw", [0.0, 1 - 2.0**-24])
def test_the_rarest_draws_are_finite_too(monkeypatch, draw):
    monkeypatch.setattr(augment, "uniform", lambda generator, *shape, device: torch.full(shape, draw))
    images = _images()
    assert _augmented(images).isfinite().all()
    assert torch.equal(_augmented(images, blur_px=2.0), images) == (draw == 0)  # width 0 is no blur
    noise = augment._normal(step_generator(0, "test"), images)
    assert 5 < noise.abs().min() and noise.abs().max() < 5.5


@pytest.mark.parametrize("name", _NAMES)
def test_gradients_are_those_of_the_change(name):
    images = (0.3 + 0.2 * _images(2, 4, 5)).double().requires_grad_()
    torch.autograd.gradcheck(lambda x: _augmented(x, **{name: _MILD[name]}), images)


def test_gradients_reach_every_value_that_is_neither_clamped_nor_erased():
    images = _images().requires_grad_()
    changed = _augmented(images, gain=0.9, erase=0.4)
    changed.sum().backward()
    cut = (changed == 1) | (changed == 0.5)
    assert 0 < cut.float().mean() < 1
    assert torch.equal(images.grad == 0, cut)


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_impossible_ranges_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"{name} must be in \[0, .*; got {value}"):
        AugmentConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("gain", 1.1), ("gamma", 2.5), ("erase", 0.6), ("blur_px", 51.0)])
def test_ranges_beyond_the_largest_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"got {value}; 0 switches it off"):
        AugmentConfig(**{name: value})


def test_bytes_and_other_shapes_are_refused_even_when_off():
    for config in (_EVERYTHING, AugmentConfig()):
        with pytest.raises(ShapeError, match="divide by 255"):
            augment_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), config, step_generator(0, "test"))
        with pytest.raises(ShapeError, match="must have shape"):
            augment_images(torch.zeros(3, 8, 8), config, step_generator(0, "test"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_images_without_a_synchronisation():
    images = _images()
    on_device = images.cuda()
    expected = _augmented(images)
    before = torch.cuda.get_sync_debug_mode()
    _augmented(on_device)  # first calls may set up libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        changed = _augmented(on_device)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    torch.testing.assert_close(changed.cpu(), expected, atol=1e-5, rtol=1e-5)
