"""Contract of every registered pose head."""

from __future__ import annotations

import pytest
import torch

from posemap_fast.apr.heads import HEADS, HeadOptions, PoseHead
from posemap_fast.errors import ConfigError

_CHANNELS = 24


def _final(batch: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, _CHANNELS, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=HEADS.names())
def head(request) -> PoseHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return HEADS.get(request.param)(_CHANNELS, HeadOptions(channels=8, grid=(2, 3), hidden=16))


@pytest.mark.parametrize("size", [(1, 1), (8, 10), (7, 13)])
def test_any_map_size_gives_twelve_numbers_per_image(head, size):
    assert head(_final(3, *size)).shape == (3, 12)


def test_images_of_a_batch_do_not_see_each_other(head):
    final = _final(3, 4, 5)
    torch.testing.assert_close(head(final)[1:2], head(final[1:2]))


def test_gradients_reach_every_parameter_and_the_map(head):
    final = _final(4, 6, 7).requires_grad_()
    head(final).square().mean().backward()
    assert final.grad.abs().sum() > 0
    assert [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_first_predictions_lie_near_the_start(head):
    start = torch.linspace(-1, 1, 12)
    head.start_at(start)
    assert (head(_final(4, 6, 7)) - start).abs().max() < 0.2


def test_state_dict_round_trip(head):
    other = type(head)(_CHANNELS, HeadOptions(channels=8, grid=(2, 3), hidden=16))
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(_final(2, 4, 5)), head(_final(2, 4, 5)))


def test_grid_mlp_knows_where_a_feature_is_and_gap_linear_does_not():
    final = _final(1, 4, 6)
    mirrored = final.flip(3)
    gap = HEADS.get("gap_linear")(_CHANNELS, HeadOptions())
    grid = HEADS.get("grid_mlp")(_CHANNELS, HeadOptions(grid=(2, 3)))
    torch.testing.assert_close(gap(final), gap(mirrored))
    assert (grid(final) - grid(mirrored)).abs().max() > 1e-5


def test_gap_linear_by_hand():
    head = HEADS.get("gap_linear")(_CHANNELS, HeadOptions())
    final = _final(2, 3, 3)
    expected = final.flatten(2).mean(2) @ head.output.weight.T + head.output.bias
    torch.testing.assert_close(head(final), expected)


@pytest.mark.parametrize("wrong", [{"channels": 0}, {"hidden": 0}, {"grid": (0, 5)}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ConfigError, match="must be >= 1"):
        HeadOptions(**wrong)
