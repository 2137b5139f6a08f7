"""APRNet: every backbone with every head, one pass for pose and features, frozen norms, a batch overfitted."""

from __future__ import annotations

import itertools

import pytest
import torch

from posemap_fast.apr import BACKBONES, HEADS, APRConfig, APRNet, PoseFrame, build_aprnet
from posemap_fast.errors import ConfigError, ShapeError
from posemap_fast.geometry import make_c2w, mean_pose, rotation_angle_deg, so3_exp
from posemap_fast.losses import pose_l2

_SIZE = (48, 64)
_FRAME = PoseFrame((1.0, -2.0, 0.5), 1.5)


def _config(backbone: str = "compact", head: str = "grid_mlp", **changes) -> APRConfig:
    options = {"feature_dim": 6, "feature_hidden": 4, "feature_stride": 8, "input_size": _SIZE, **changes}
    return APRConfig(backbone=backbone, head=head, **options)


def _images(batch: int, height: int = _SIZE[0], width: int = _SIZE[1], seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def _poses(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rotation = so3_exp(0.4 * torch.randn(n, 3, generator=generator, dtype=torch.float64))
    return make_c2w(rotation, torch.randn(n, 3, generator=generator, dtype=torch.float64) + 2)


@pytest.fixture(scope="module", params=list(itertools.product(BACKBONES.names(), HEADS.names())), ids="-".join)
def net(request) -> APRNet:
    return build_aprnet(_config(*request.param), _FRAME)


def test_shapes_of_poses_and_features_at_odd_image_sizes(net):
    with torch.no_grad():
        output = net.eval()(_images(2, 51, 77), n_features=2)
    assert output.vector12.shape == (2, 12)
    assert output.c2w.shape == (2, 4, 4)
    assert output.features.shape == (3, 2, 6, 6, 8)


def test_gradients_of_one_joint_pass_reach_every_parameter_and_the_images_but_not_the_spread(net):
    images = _images(3).requires_grad_()
    output = net.train()(images, n_features=3)
    weights = torch.rand(output.features.shape, generator=torch.Generator().manual_seed(5))
    (output.vector12.square().mean() + (output.features * weights).square().mean()).backward()
    assert _reached(net) == {name for name, _ in net.named_parameters()} - _spread(net)
    assert images.grad.abs().sum() > 0
    net.zero_grad(set_to_none=True)


def test_log_sigma_sends_its_gradient_to_the_spread_and_nowhere_else(net):
    images = _images(3).requires_grad_()
    log_sigma = net.train()(images).log_sigma
    assert log_sigma.shape == (3, 2)
    log_sigma.square().sum().backward()
    assert _reached(net) == _spread(net) != set()
    assert images.grad is None
    net.zero_grad(set_to_none=True)


def _reached(net: APRNet) -> set[str]:
    """Names of the parameters that a gradient other than zero has come to."""
    return {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}


def _spread(net: APRNet) -> set[str]:
    return {name for name, _ in net.named_parameters() if name.startswith("head.spread.")}


def test_inference_does_not_run_the_feature_branch(net, monkeypatch):
    def forbidden(*arguments: object) -> None:
        raise AssertionError("the feature branch ran")

    monkeypatch.setattr(net.feature_branch, "forward", forbidden)
    with torch.no_grad():
        assert net.eval()(_images(1)).features is None


def test_regress_and_features_equal_the_joint_pass(net):
    images = _images(2)
    with torch.no_grad():
        output = net.eval()(images, n_features=2)
        torch.testing.assert_close(net.regress(images), output.vector12)
        torch.testing.assert_close(net.features(images), output.features)
        torch.testing.assert_close(_FRAME.decode(output.vector12), output.c2w)


def test_state_dict_round_trip_without_reading_weights_again(net):
    other = build_aprnet(net.config, _FRAME, seed=9, load_weights=False)
    assert not torch.equal(other.eval().regress(_images(2)), net.eval().regress(_images(2)))
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(other(_images(2)).c2w, net(_images(2)).c2w)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, second = build_aprnet(_config(), _FRAME, seed=1), build_aprnet(_config(), _FRAME, seed=1)
    assert torch.equal(torch.rand(4), expected)
    other = build_aprnet(_config(), _FRAME, seed=2)
    for (name, value), again in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(value, again), name
    assert not torch.equal(first.head.output.weight, other.head.output.weight)


def test_a_new_network_predicts_about_the_mean_pose(net):
    mean = mean_pose(_poses(30))
    fresh = build_aprnet(net.config, _FRAME, mean_c2w=mean)
    with torch.no_grad():
        c2w = fresh.eval()(_images(4)).c2w.double()
    assert (c2w[:, :3, 3] - mean[:3, 3]).norm(dim=1).max() < 0.5
    assert rotation_angle_deg(c2w[:, :3, :3], mean[:3, :3].expand(4, 3, 3)).max() < 20


def test_frozen_norms_keep_their_statistics_and_make_batches_of_one_possible():
    net = build_aprnet(_config(), _FRAME).train()
    net.freeze_batch_norm()
    net.eval()
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items() if "running" in name}
    image = _images(1)
    joint = net(torch.cat([image, _images(3, seed=1)]), n_features=4)
    alone = net(image, n_features=1)
    assert before
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    torch.testing.assert_close(alone.vector12, joint.vector12[:1], rtol=1e-4, atol=1e-5)
    assert net.training
    assert net.backbone.training
    norm_parameters = [p for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()]
    assert not any(p.requires_grad for p in norm_parameters)


def test_images_are_resized_with_antialiasing():
    """Stripes finer than the network's pixels become grey; sampled without antialiasing they would be all white."""
    net, seen = build_aprnet(_config(), _FRAME).eval(), []
    net.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    columns = torch.arange(4 * _SIZE[1]) % 4
    stripes = ((columns == 1) | (columns == 2)).float().expand(1, 3, 4 * _SIZE[0], -1)
    with torch.no_grad():
        net.regress(stripes)
    assert seen[0].shape == (1, 3, *_SIZE)
    torch.testing.assert_close(seen[0][..., 1:-1], torch.full((1, 3, _SIZE[0], _SIZE[1] - 2), 0.5), atol=0.1, rtol=0)


def test_feature_stride_one_is_dfnets_order_and_larger_strides_average_before_the_wide_convolution():
    net = build_aprnet(_config("vgg16", feature_stride=1, feature_kernel=5), _FRAME).eval()
    branch, image = net.feature_branch, _images(1)
    with torch.no_grad():
        taps = net.backbone(image).taps
        features = net.features(image)
        for level, tap in enumerate(taps):
            adapted = branch.norm[level](branch.mix[level](torch.relu(branch.squeeze[level](tap))))
            if level:
                adapted = torch.nn.functional.interpolate(adapted, size=_SIZE, mode="bilinear")
            torch.testing.assert_close(features[level], adapted)
        small = branch(taps, (12, 16))
        pooled = torch.nn.functional.avg_pool2d(torch.relu(branch.squeeze[0](taps[0])), 4)
        torch.testing.assert_close(small[0], branch.norm[0](branch.mix[0](pooled)))


def test_one_tiny_batch_can_be_overfitted():
    poses = _poses(8)
    frame = PoseFrame.from_poses(poses, "auto")
    net = build_aprnet(_config(), frame, mean_pose(poses)).train()
    images, targets = _images(8), frame.encode(poses).float()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    for _ in range(30):
        optimizer.zero_grad()
        pose_l2(net(images).vector12, targets).backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        c2w = net(images).c2w.double()
    assert (c2w[:, :3, 3] - poses[:, :3, 3]).norm(dim=1).median() < 0.05 * frame.scale
    assert rotation_angle_deg(c2w[:, :3, :3], poses[:, :3, :3]).median() < 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "vgg19"}, "did you mean 'vgg16'"),
        ({"head": "grid"}, "unknown apr head"),
        ({"input_size": (8, 64)}, "too small for compact"),
        ({"input_size": (0, 64)}, "input_size"),
        ({"feature_kernel": 4}, "odd"),
        ({"feature_stride": 0}, "feature_stride"),
        ({"weights": "nowhere.pth"}, "no file nowhere.pth"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_aprnet(_config(**changes), _FRAME)


def test_byte_images_are_refused_before_they_are_resized():
    net = build_aprnet(_config(), _FRAME)
    with pytest.raises(ShapeError, match="divide by 255"):
        net(torch.zeros(1, 3, 100, 100, dtype=torch.uint8))
    with pytest.raises(ShapeError, match="must have shape"):
        net(torch.zeros(3, 100, 100))
