"""Contract of every registered backbone, and the facts that make VGG-16 and the ResNets the published ones."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from posemap_fast.apr.backbones import BACKBONES, VGG16, Backbone, ResNet18, ResNet34
from posemap_fast.errors import ConfigError, FileFormatError, ShapeError

_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

# Index in torchvision's `vgg16().features` -> (out, in) of its 3x3 convolutions: 26 tensors with the biases.
VGG16_CONVOLUTIONS = {
    0: (64, 3),
    2: (64, 64),
    5: (128, 64),
    7: (128, 128),
    10: (256, 128),
    12: (256, 256),
    14: (256, 256),
    17: (512, 256),
    19: (512, 512),
    21: (512, 512),
    24: (512, 512),
    26: (512, 512),
    28: (512, 512),
}

RESNET_BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}


def _images(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def built() -> dict[str, Backbone]:
    """One network of each kind with seeded random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {name: BACKBONES.get(name)("random") for name in BACKBONES}


@pytest.fixture(params=BACKBONES.names())
def backbone(request, built) -> Backbone:
    net = built[request.param]
    net.zero_grad(set_to_none=True)
    return net.eval()


@pytest.mark.parametrize("size", [(32, 48), (45, 61), (64, 33)])
def test_maps_have_the_promised_channels_and_strides_at_odd_sizes_too(backbone, size):
    output = backbone(_images(2, *size))
    maps = [*output.taps, output.final]
    channels = [*backbone.tap_channels, backbone.out_channels]
    strides = [*backbone.tap_strides, backbone.out_stride]
    assert len(maps) == len(channels) == len(strides) == 4
    for tensor, width, stride in zip(maps, channels, strides, strict=True):
        assert tensor.shape[:2] == (2, width)
        for side, full in zip(tensor.shape[2:], size, strict=True):
            assert full // stride <= side <= -(-full // stride)


def test_taps_are_taken_before_the_relu_and_the_final_map_after_it(backbone):
    output = backbone(_images(2, 48, 48))
    for tap in output.taps:
        assert (tap < 0).float().mean() > 0.05
    assert output.final.min() >= 0


def test_without_taps_the_final_map_is_the_same(backbone):
    images = _images(2, 40, 40)
    slim = backbone(images, with_taps=False)
    assert slim.taps == []
    torch.testing.assert_close(slim.final, backbone(images).final)


def test_gradients_reach_every_parameter_and_the_images(backbone):
    images = _images(2, 48, 64).requires_grad_()
    output = backbone.train()(images)
    sum(tensor.square().mean() for tensor in [*output.taps, output.final]).backward()
    assert images.grad.abs().sum() > 0
    assert [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_evaluation_is_repeatable_and_leaves_the_input_alone(backbone):
    images = _images(1, 48, 48)
    before = images.clone()
    with torch.no_grad():
        assert torch.equal(backbone(images).final, backbone(images).final)
    assert torch.equal(images, before)


def test_state_dict_round_trip(backbone):
    other = BACKBONES.get(next(name for name in BACKBONES if BACKBONES.get(name) is type(backbone)))(None)
    other.load_state_dict(backbone.state_dict())
    images = _images(1, 48, 48)
    assert torch.equal(other.eval()(images).final, backbone(images).final)


def test_input_is_normalised_inside_forward(backbone):
    seen: list[torch.Tensor] = []
    first = next(module for module in backbone.modules() if isinstance(module, torch.nn.Conv2d))
    handle = first.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = _images(1, 32, 32)
    backbone(images)
    handle.remove()
    torch.testing.assert_close(seen[0], (images - _MEAN) / _STD)


def test_bytes_grey_images_and_tiny_images_are_refused(backbone):
    with pytest.raises(ShapeError, match="divide by 255"):
        backbone(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ShapeError, match="must have shape"):
        backbone(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ShapeError, match="at least"):
        backbone(torch.zeros(1, 3, backbone.min_size - 1, 64))


def test_an_unknown_backbone_lists_the_near_names():
    with pytest.raises(ConfigError, match="did you mean 'vgg16'"):
        BACKBONES.get("vgg-16")


def test_vgg16_has_the_keys_and_shapes_of_torchvision(built):
    expected = {}
    for index, (out_channels, in_channels) in VGG16_CONVOLUTIONS.items():
        expected[f"features.{index}.weight"] = (out_channels, in_channels, 3, 3)
        expected[f"features.{index}.bias"] = (out_channels,)
    assert len(expected) == 26
    assert {key: tuple(value.shape) for key, value in built["vgg16"].state_dict().items()} == expected


def test_vgg16_equals_the_published_plan_written_out(built):
    net = built["vgg16"].eval()
    images = _images(1, 64, 64)
    x = (images - _MEAN) / _STD
    taps = []
    with torch.no_grad():
        for index in VGG16_CONVOLUTIONS:
            x = functional.conv2d(x, net.features[index].weight, net.features[index].bias, padding=1)
            if index in (2, 14, 28):  # conv1_2, conv3_3, conv5_3
                taps.append(x)
            x = functional.relu(x)
            if index in (2, 7, 14, 21, 28):
                x = functional.max_pool2d(x, 2)
        output = net(images)
    torch.testing.assert_close(output.final, x)
    for tap, wanted in zip(output.taps, taps, strict=True):
        torch.testing.assert_close(tap, wanted)


def test_vgg16_random_weights_keep_the_signal_alive(built):
    with torch.no_grad():
        output = built["vgg16"].eval()(_images(1, 64, 64))
    assert 1e-3 < output.final.std() < 1e3
    assert isinstance(built["vgg16"], VGG16)


def _resnet_shapes(n_blocks: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of torchvision's ResNet of basic blocks, without its classifier."""
    convolutions = {"conv1": (64, 3, 7, 7)}
    norms = {"bn1": 64}
    before = 64
    for stage, (width, n) in enumerate(zip((64, 128, 256, 512), n_blocks, strict=True), start=1):
        for block in range(n):
            prefix = f"layer{stage}.{block}"
            convolutions |= {f"{prefix}.conv1": (width, before, 3, 3), f"{prefix}.conv2": (width, width, 3, 3)}
            norms |= {f"{prefix}.bn1": width, f"{prefix}.bn2": width}
            if width != before:
                convolutions[f"{prefix}.downsample.0"] = (width, before, 1, 1)
                norms[f"{prefix}.downsample.1"] = width
            before = width
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in convolutions.items()}
    for name, width in norms.items():
        shapes |= {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
        shapes[f"{name}.num_batches_tracked"] = ()
    return shapes


# torchvision documents 11689512 and 21797672 parameters, of which its classifier has 512 * 1000 + 1000.
@pytest.mark.parametrize(("name", "n_parameters"), [("resnet18", 11_176_512), ("resnet34", 21_284_672)])
def test_resnet_has_the_keys_and_shapes_of_torchvision(built, name, n_parameters):
    net = built[name]
    expected = _resnet_shapes(RESNET_BLOCKS[name])
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in net.parameters()) == n_parameters


def test_a_torchvision_shaped_resnet18_file_loads_and_its_classifier_is_ignored(built, tmp_path):
    state = {key: torch.full_like(value, 2) for key, value in built["resnet18"].state_dict().items()}
    classifier = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save({**state, **classifier}, tmp_path / "resnet18.pth")
    net = ResNet18(str(tmp_path / "resnet18.pth"))
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_a_file_without_the_counters_of_batches_loads_and_one_without_a_weight_does_not(built, tmp_path):
    state = {key: value for key, value in built["resnet18"].state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pth")
    loaded = ResNet18(str(tmp_path / "old.pth")).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    counters = [value for key, value in loaded.items() if "num_batches" in key]
    assert len(counters) == 20 and not any(counters) and all(value.dtype == torch.int64 for value in counters)
    del state["bn1.running_mean"]
    torch.save(state, tmp_path / "old.pth")
    with pytest.raises(FileFormatError, match=r"missing bn1\.running_mean; give"):
        ResNet18(str(tmp_path / "old.pth"))


@pytest.mark.parametrize("kind", [ResNet18, ResNet34])
def test_resnet_asks_for_torchvisions_checkpoint(monkeypatch, kind):
    asked: list[str] = []

    def download(url: str, **options: object) -> dict[str, torch.Tensor]:
        asked.append(url)
        return kind(None).state_dict()

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    kind("imagenet")
    file = {ResNet18: "resnet18-f37072fd.pth", ResNet34: "resnet34-b627a593.pth"}[kind]
    assert asked == [f"https://download.pytorch.org/models/{file}"]


def _conv_norm(net: Backbone, conv: str, norm: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    weight, statistics = net.get_submodule(conv).weight, net.get_submodule(norm)
    x = functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
    return functional.batch_norm(
        x, statistics.running_mean, statistics.running_var, statistics.weight, statistics.bias, eps=1e-5
    )


@pytest.mark.parametrize("name", RESNET_BLOCKS)
def test_resnet_equals_the_published_plan_written_out(built, name):
    net = copy.deepcopy(built[name]).train()
    images = _images(2, 70, 64)
    with torch.no_grad():
        net(images)  # statistics of its own, so that a norm in the wrong place is seen
        output = net.eval()(images)
        stem = _conv_norm(net, "conv1", "bn1", (images - _MEAN) / _STD, stride=2)
        x = functional.max_pool2d(functional.relu(stem), 3, stride=2, padding=1)
        ends = []  # of the stages, before the ReLU
        for stage, n in enumerate(RESNET_BLOCKS[name], start=1):
            for block in range(n):
                stride = 2 if stage > 1 and block == 0 else 1
                prefix = f"layer{stage}.{block}"
                y = functional.relu(_conv_norm(net, f"{prefix}.conv1", f"{prefix}.bn1", x, stride))
                y = _conv_norm(net, f"{prefix}.conv2", f"{prefix}.bn2", y)
                if stride == 2:
                    x = _conv_norm(net, f"{prefix}.downsample.0", f"{prefix}.downsample.1", x, stride)
                sums = x + y
                x = functional.relu(sums)
            ends.append(sums)
    torch.testing.assert_close(output.final, x)
    for tap, wanted in zip(output.taps, [stem, ends[1], ends[3]], strict=True):
        torch.testing.assert_close(tap, wanted)


def test_resnet_takes_small_portrait_images(built):
    output = built["resnet18"].eval()(_images(1, 96, 72))
    assert [tuple(tap.shape[2:]) for tap in output.taps] == [(48, 36), (12, 9), (3, 3)]
    assert output.final.shape == (1, 512, 3, 3)


def test_resnet_random_weights_keep_the_signal_alive(built):
    with torch.no_grad():
        output = built["resnet34"].train()(_images(2, 64, 64))
    assert 1e-3 < output.final.std() < 1e3
