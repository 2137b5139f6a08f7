"""The pose solved for from a predicted PoseMap: exact where the PoseMap is, differentiable, for every backbone."""

from __future__ import annotations

import math

import pytest
import torch

from posemap_fast.apr import BACKBONES, APRConfig, APRNet, PoseFrame, PoseMapReadout, PoseMapRefiner, build_aprnet
from posemap_fast.apr.posemap_refiner import _log_deviations
from posemap_fast.errors import ConfigError
from posemap_fast.geometry import Camera, camera_rays, make_c2w, rotation_angle_deg, so3_exp

_CELLS = (5, 7)
_CHANNELS = 12
_CAMERA = Camera(140, 100, 120.0, 120.0, 70.0, 50.0)
_FRAME = PoseFrame((1.0, -2.0, 0.5), 1.5)


def _refiner(channels: int = 8) -> PoseMapRefiner:
    torch.manual_seed(0)
    return PoseMapRefiner(6, 10, _CHANNELS, _CELLS, _CAMERA, channels)


def _world(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Poses (n, 4, 4) in the pose frame, points (n, rows, cols, 3) that their cells see, and the PoseMaps of those."""
    generator = torch.Generator().manual_seed(seed)
    rotation = so3_exp(0.2 * torch.randn(n, 3, generator=generator))
    c2w = make_c2w(rotation, 0.3 * torch.randn(n, 3, generator=generator))
    rows, cols = _CELLS
    x, y = (torch.arange(cols) + 0.5) * _CAMERA.width / cols, (torch.arange(rows) + 0.5) * _CAMERA.height / rows
    pixels = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)
    origin, direction = camera_rays(_CAMERA, c2w, pixels)
    depth = 1.5 + 2 * torch.rand(n, rows * cols, 1, generator=generator)
    points = (origin + depth * direction).view(n, rows, cols, 3)
    return c2w, points, _posemaps(points)


def _posemaps(points: torch.Tensor) -> torch.Tensor:
    """A smooth embedding of points: (n, rows, cols, 3) -> (n, C, rows, cols)."""
    mix = torch.randn(3, _CHANNELS, generator=torch.Generator().manual_seed(9))
    return 3 * torch.tanh(0.3 * points @ mix).permute(0, 3, 1, 2)


def _fit(seed: int = 1, n: int = 10, opacity: torch.Tensor | None = None, points=None) -> PoseMapReadout:
    _, seen, posemaps = _world(n)
    solid = torch.ones(n, *_CELLS) if opacity is None else opacity
    return PoseMapReadout.fit(posemaps, seen if points is None else points, solid, seed)


@pytest.fixture(scope="module")
def fitted() -> PoseMapRefiner:
    refiner = _refiner()
    refiner.readout.load_state_dict(_fit(n=60).state_dict())
    return refiner.eval()


def test_the_readout_finds_the_points_of_posemaps_it_was_not_fitted_on(fitted):
    _, points, posemaps = _world(8, seed=1)
    error = (fitted.readout(posemaps) - points.flatten(1, 2)).norm(dim=-1)
    assert error.median() < 0.08
    assert float(fitted.readout.posemap_scale) == pytest.approx(
        float(_world(60)[2].square().sum(1).mean().sqrt()), rel=1e-4
    )


def test_a_perfect_posemap_brings_a_poor_start_to_the_true_pose(fitted, monkeypatch):
    c2w, _, posemaps = _world(8, seed=1)
    monkeypatch.setattr(fitted.posemap, "forward", lambda cells: posemaps / fitted.readout.posemap_scale)
    rotation = c2w[:, :3, :3] @ so3_exp(torch.full((8, 3), 0.08))
    start = torch.cat([rotation, (c2w[:, :3, 3] + 0.15)[..., None]], dim=2).flatten(1)
    with torch.no_grad():
        refined = fitted(torch.zeros(8, 6, 13, 18), torch.zeros(8, 10, 7, 9), start, rotation)
    found = refined.vector12.view(8, 3, 4)
    assert (found[..., 3] - c2w[:, :3, 3]).norm(dim=1).median() < 0.05
    assert rotation_angle_deg(found[..., :3], c2w[:, :3, :3]).median() < 1.0
    assert rotation_angle_deg(rotation, c2w[:, :3, :3]).median() > 7
    torch.testing.assert_close(refined.posemap, posemaps)


def test_the_fit_repeats_for_a_seed_ignores_cells_without_matter_and_refuses_an_empty_map():
    solid = torch.ones(10, *_CELLS)
    solid[:, 0] = 0.1
    spoilt = _world(10)[1].clone()
    spoilt[:, 0] = 1e4
    torch.manual_seed(5)
    first, second, other = _fit(1, opacity=solid), _fit(1, opacity=solid, points=spoilt), _fit(2, opacity=solid)
    for (name, value), again in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, again), name
    assert not torch.equal(first.layers[0].weight, other.layers[0].weight)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert not any(p.requires_grad for p in first.parameters())
    with pytest.raises(ConfigError, match="the map is empty"):
        _fit(opacity=torch.zeros(10, *_CELLS))


def _network(backbone: str = "compact", **changes) -> APRNet:
    size = {"input_size": (48, 64), "feature_dim": 6, "feature_hidden": 4, "feature_stride": 8}
    config = APRConfig(
        backbone=backbone,
        pose_from="posemap",
        posemap_width=8,
        posemap_channels=_CHANNELS,
        posemap_cells=_CELLS,
        **size,
        **changes,
    )
    return build_aprnet(config, _FRAME, camera=_CAMERA)


@pytest.mark.parametrize("backbone", BACKBONES.names())
def test_every_backbone_gives_a_map_at_stride_8_and_learns_its_posemap_from_the_posemaps_loss_alone(backbone):
    net = _network(backbone).train()
    images = torch.rand(2, 3, 51, 77, generator=torch.Generator().manual_seed(0))
    local = net.backbone(net.resized(images)).local
    assert local.shape == (2, net.backbone.local_channels, 6, 8)
    assert local.min() >= 0
    output = net(images)
    assert output.posemap.shape == (2, _CHANNELS, *_CELLS)
    assert output.vector12.shape == output.head12.shape == (2, 12)
    for vectors, c2w in ((output.vector12, output.c2w), (output.head12, output.head_c2w)):
        torch.testing.assert_close(net.pose_frame.decode(vectors), c2w)
    (output.vector12.square().sum() + output.head12.square().sum()).backward(retain_graph=True)
    reached = _reached(net)
    assert {"refiner.confidence.weight", "head.output.weight", "refiner.local.weight"} <= reached
    assert not any("spread" in name or name.startswith("refiner.posemap") for name in reached)
    output.posemap.square().sum().backward()
    assert {"refiner.posemap.weight", "refiner.posemap.bias"} == _reached(net) - reached


@pytest.mark.parametrize("backbone", BACKBONES.names())
def test_a_pass_in_bfloat16_solves_for_the_pose_in_float32(backbone):
    """What the preset `gpu` does: half of the bits in the backbone, none lost in the solver and the rotations."""
    net = _network(backbone).eval()
    images = torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    inside: list[torch.dtype] = []
    net.backbone.register_forward_hook(lambda _, __, output: inside.append(output.local.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = net(images)
        (output.vector12.square().sum() + output.posemap.square().sum()).backward()
    assert inside == [torch.bfloat16]
    found = (output.vector12, output.head12, output.c2w, output.head_c2w, output.log_sigma, output.posemap)
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert all(
        tensor.isfinite().all() for tensor in [*found, *(p.grad for p in net.parameters() if p.grad is not None)]
    )
    for c2w in (output.c2w, output.head_c2w):
        rotation = c2w[:, :3, :3]
        torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).expand(2, 3, 3), rtol=0, atol=1e-5)
    exact = net(images).posemap.detach()
    torch.testing.assert_close(output.posemap.detach(), exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))


def _reached(net: APRNet) -> set[str]:
    return {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}


def test_log_sigma_follows_the_confidences_and_teaches_nothing():
    net = _network().eval()
    images = torch.rand(3, 3, 48, 64)
    with torch.no_grad():
        before = net(images).log_sigma
        net.refiner.confidence.bias += 20
        after = net(images).log_sigma
    assert not net(images).log_sigma.requires_grad
    assert net.spread_parameters() == []
    assert (after < before).all()
    assert (after[:, 0] < before[:, 0] - 1).all()


def test_points_that_fit_half_as_well_double_the_deviation():
    information = torch.diag(torch.rand(6, generator=torch.Generator().manual_seed(0)) + 0.5).expand(2, 6, 6)
    fits, misfits, none = (_log_deviations(information, torch.full((2,), m)) for m in (1e-3, 4e-3, 0.0))
    torch.testing.assert_close(misfits - fits, torch.full((2, 2), math.log(2)), rtol=1e-2, atol=0)
    assert (none < fits).all() and torch.isfinite(none).all()


def test_the_head_learns_from_its_own_loss_alone():
    """The solver starts at the head's pose, but its answer sends no gradient there."""
    net = _network().train()
    net(torch.rand(3, 3, 48, 64)).vector12.square().sum().backward()
    assert net.head.output.weight.grad is None


def test_regress_is_the_pose_of_the_joint_pass_and_the_state_dict_holds_everything():
    net = _network().eval()
    other = build_aprnet(net.config, _FRAME, seed=5, load_weights=False, camera=_CAMERA).eval()
    other.load_state_dict(net.state_dict())
    images = torch.rand(2, 3, 48, 64)
    with torch.no_grad():
        assert torch.equal(net.regress(images), net(images).vector12)
        assert torch.equal(other(images).c2w, net(images).c2w)


def test_what_is_missing_is_said():
    with pytest.raises(ConfigError, match="needs the camera"):
        build_aprnet(APRConfig(pose_from="posemap", posemap_cells=_CELLS), _FRAME)
    with pytest.raises(ConfigError, match="posemap_cells"):
        build_aprnet(APRConfig(pose_from="posemap"), _FRAME, camera=_CAMERA)
