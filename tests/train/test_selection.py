"""Answers of a network for many images, and how sure it is of them."""

from __future__ import annotations

import pytest
import torch

from posemap_fast.apr import APRConfig, APRNet, PoseFrame, build_aprnet
from posemap_fast.train import predict, predict_poses
from posemap_fast.train.selection import network_input


@pytest.fixture
def net() -> APRNet:
    found = build_aprnet(APRConfig(input_size=(32, 32)), PoseFrame((1.0, 2.0, 3.0), 0.5))
    with torch.no_grad():
        found.head.spread[2].weight.normal_(generator=torch.Generator().manual_seed(1))
    return found


def images(n: int) -> torch.Tensor:
    return torch.randint(0, 255, (n, 24, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("is_training", [True, False])
def test_chunks_give_what_single_images_give_in_evaluation(net: APRNet, is_training: bool) -> None:
    net.train(is_training)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found = predict(net, images(5), batch=2)
    assert net.training is is_training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())  # statistics too
    net.eval()
    with torch.no_grad():
        for k, image in enumerate(images(5)):
            output = net(network_input(image[None]))
            torch.testing.assert_close(found.c2w[k], output.c2w[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.head_c2w[k], output.head_c2w[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.log_sigma[k], output.log_sigma[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(predict_poses(net, images(5), batch=2), found.c2w)


def test_no_image_has_no_answer(net: APRNet) -> None:
    found = predict(net, images(0))
    assert found.c2w.shape == found.head_c2w.shape == (0, 4, 4) and found.log_sigma.shape == (0, 2)
