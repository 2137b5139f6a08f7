"""Winograd convolutions are the direct ones, whatever the size of the map; networks keep their state dict."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from posemap_fast.apr import BACKBONES, APRConfig, PoseFrame, WinogradConv2d, build_aprnet, use_winograd

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(n_in: int = 128, n_out: int = 160, bias: bool = True) -> tuple[nn.Conv2d, WinogradConv2d]:
    torch.manual_seed(0)
    direct = nn.Conv2d(n_in, n_out, 3, padding=1, bias=bias).double()
    return direct, WinogradConv2d(direct)


# Multiples of a tile, all remainders, one row or column, several images, few tiles, and more than fit a chunk.
@pytest.mark.parametrize(
    "size",
    [(1, 20, 20), (1, 21, 22), (2, 23, 17), (3, 1, 97), (1, 98, 1), (5, 9, 12), (1, 3, 4), (1, 150, 200), (0, 20, 20)],
)
@pytest.mark.parametrize("is_last", [True, False])
def test_it_is_the_direct_convolution(size: tuple[int, int, int], is_last: bool) -> None:
    n, height, width = size
    direct, fast = pair()
    x = torch.randn(n, 128, height, width, dtype=torch.float64)
    if is_last:
        x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fast(x), direct(x), rtol=1e-9, atol=1e-9)


def test_it_takes_a_view_without_bias_and_single_precision() -> None:
    direct, _ = pair(bias=False)
    direct = direct.float()
    x = torch.randn(2, 256, 40, 60)[:, ::2, 3:-2, 5:-6]
    expected = direct(x)
    found = WinogradConv2d(direct)(x)
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 3e-6 * expected.norm()


def test_what_is_not_finite_stays_within_reach() -> None:
    direct, fast = pair()
    x = torch.randn(1, 128, 24, 24, dtype=torch.float64)
    x[0, 3, 9, 9] = float("nan")
    found, expected = fast(x), direct(x)
    assert found[0, :, 8:11, 8:11].isnan().all()
    far = torch.ones(24, 24, dtype=torch.bool)
    far[4:16, 4:16] = False  # tiles whose inputs hold it
    torch.testing.assert_close(found[0, :, far], expected[0, :, far], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backbone", sorted(BACKBONES))
def test_networks_answer_the_same_and_keep_their_state_dict(backbone: str) -> None:
    net = build_aprnet(APRConfig(backbone=backbone, input_size=(96, 128)), PoseFrame()).eval()
    net.head.output.weight.data.mul_(1e4)  # else every image is at the mean pose
    images = torch.rand(2, 3, 96, 128)
    fast = use_winograd(copy.deepcopy(net))
    assert any(isinstance(module, WinogradConv2d) for module in fast.modules())
    assert list(fast.state_dict()) == list(net.state_dict())
    for name, values in net.state_dict().items():
        assert torch.equal(fast.state_dict()[name], values)
    with torch.no_grad():
        expected, found = net(images).vector12, fast(images).vector12
    assert (expected - expected[:1]).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(128, 128, 3, stride=2, padding=1),
        nn.Conv2d(128, 128, 3),
        nn.Conv2d(128, 128, 3, padding=1, groups=2),
        nn.Conv2d(128, 128, 3, padding=2, dilation=2),
        nn.Conv2d(128, 128, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(128, 128, 5, padding=2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.Conv2d(128, 128, 3, padding=1, dtype=torch.bfloat16),
    ],
)
def test_others_are_left_alone(other: nn.Conv2d) -> None:
    assert type(use_winograd(nn.Sequential(other))[0]) is nn.Conv2d  # type: ignore[index]
