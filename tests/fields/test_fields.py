"""Contract of every registered field backbone, and of NeRF-P around it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from posemap_fast.backends import why_not
from posemap_fast.errors import ConfigError
from posemap_fast.fields import (
    FIELD_BACKBONES,
    AppearanceEncoder,
    Field,
    FieldConfig,
    NeRFP,
    PoseDecoder,
    luminance_histogram,
)

CONFIG = FieldConfig(
    n_levels=4, log2_hashmap_size=10, base_resolution=4, finest_resolution=32, hidden=16, appearance_dim=3
)


DEVICES = {"tcnn": "cuda"}  # of the backbones that do not run on the CPU
HALF_PRECISION = {"tcnn"}  # inside


def build(name: str) -> Field:
    """The backbone on its device; skips with the reason where it cannot run."""
    device = DEVICES.get(name, "cpu")
    reason = why_not(name, torch.device(device))
    if reason:
        pytest.skip(reason)
    field = FIELD_BACKBONES.get(name)(dataclasses.replace(CONFIG, backbone=name))
    with torch.no_grad():
        field.table.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    return field.to(device)


def inputs(n: int = 50, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(n, 3, generator=generator)
    rays_d = torch.nn.functional.normalize(torch.randn(5, 3, generator=generator), dim=1)
    appearance = torch.randn(5, 3, generator=generator)
    return x.to(device), rays_d.to(device), appearance.to(device), (torch.arange(n) * 5 // n).to(device)


@pytest.mark.parametrize("name", FIELD_BACKBONES.names())
def test_backbone_gives_the_shapes_and_ranges_of_the_protocol(name: str) -> None:
    field = build(name)
    x, rays_d, appearance, rays = inputs(device=DEVICES.get(name, "cpu"))
    sigma, features = field.density(x)
    rgb = field.rgb(features, rays_d, appearance, rays)
    assert isinstance(field, Field)
    assert sigma.shape == (50,) and bool((sigma > 0).all())
    assert rgb.shape == (50, 3) and bool(((rgb > 0) & (rgb < 1)).all())
    assert field.pose_hidden(x, features).shape == (50, CONFIG.pose_hidden)
    bounds = {"rtol": 1e-5, "atol": 1e-6}
    for got, want in zip(field.radiance(x, rays_d, appearance, rays)[:2], (sigma, rgb), strict=True):
        torch.testing.assert_close(got, want, **bounds)


@pytest.mark.parametrize("name", FIELD_BACKBONES.names())
def test_backbone_is_differentiable_in_position_and_in_every_parameter(name: str) -> None:
    field = build(name)
    x, rays_d, appearance, rays = inputs(device=DEVICES.get(name, "cpu"))
    x.requires_grad_(True)
    sigma, features = field.density(x)
    total = sigma.sum() + field.rgb(features, rays_d, appearance, rays).sum() + field.pose_hidden(x, features).sum()
    total.backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
    for parameter in field.parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", FIELD_BACKBONES.names())
def test_backbone_reads_the_parameters_of_the_reference_and_agrees_with_it(name: str) -> None:
    reference, other = build("reference"), build(name)
    other.load_state_dict(reference.state_dict())
    results = []
    for field, device in ((reference, "cpu"), (other, DEVICES.get(name, "cpu"))):
        x, rays_d, appearance, rays = inputs(device=device)
        features = field.density(x)[1]
        results.append([*features, field.rgb(features, rays_d, appearance, rays), field.pose_hidden(x, features)])
    bounds = {"rtol": 0.02, "atol": 0.02} if name in HALF_PRECISION else {"rtol": 1e-4, "atol": 1e-5}
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.cpu(), expected, **bounds)


@pytest.mark.parametrize("name", FIELD_BACKBONES.names())
def test_no_samples_give_empty_outputs(name: str) -> None:
    field = build(name)
    sigma, features = field.density(torch.zeros(0, 3, device=DEVICES.get(name, "cpu")))
    assert sigma.shape == (0,) and features.geo.shape[0] == 0


def test_map_switches_backbone_with_its_parameters(frame) -> None:
    nerfp = NeRFP(dataclasses.replace(CONFIG, backbone="native"), frame)
    other = nerfp.with_backbone("reference")
    assert other.config.backbone == "reference"
    for name, value in nerfp.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_parameter_groups_of_the_stages_do_not_overlap(frame) -> None:
    nerfp = NeRFP(CONFIG, frame)
    stage_1 = {id(p) for p in [nerfp.field.table, *nerfp.rendering_parameters()]}
    stage_2 = {id(p) for p in nerfp.pose_parameters()}
    assert not stage_1 & stage_2
    assert stage_1 | stage_2 == {id(p) for p in nerfp.parameters()}


def test_histogram_counts_luminance_in_ten_bins() -> None:
    image = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    image[0, 0, 0] = 255
    image[0, 0, 1] = 128
    rows = luminance_histogram(image)
    expected = torch.tensor([0.5, 0, 0, 0, 0, 0.25, 0, 0, 0, 0.25])
    torch.testing.assert_close(rows[0], expected)
    torch.testing.assert_close(luminance_histogram(image.float() / 255), rows)


def test_appearance_code_is_zero_at_the_mean_histogram_and_varies_around_it() -> None:
    mean = torch.full((10,), 0.1)
    encoder = AppearanceEncoder(4, mean)
    assert torch.equal(encoder(mean[None]), torch.zeros(1, 4))
    assert float(encoder(torch.eye(10)).abs().sum()) > 0


@pytest.mark.parametrize("size", [(1, 1), (7, 10), (30, 53)])
def test_decoder_takes_posemaps_of_any_size(size: tuple[int, int]) -> None:
    assert PoseDecoder()(torch.randn(2, 256, *size)).shape == (2, 12)


@pytest.mark.parametrize("change", [{"n_features_per_level": 3}, {"sh_degree": 5}, {"init_density": 0.0}])
def test_impossible_sizes_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(CONFIG, **change)
