"""Contract of every registered pose head."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from posemap_fast.apr import attention_head
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


def test_gradients_of_the_pose_reach_the_map_and_every_parameter_but_the_spread(head):
    final = _final(4, 6, 7).requires_grad_()
    head(final).square().mean().backward()
    assert final.grad.abs().sum() > 0
    assert all(p.grad is None for p in head.spread.parameters())
    untouched = [name for name, p in head.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == [f"spread.{name}" for name, _ in head.spread.named_parameters()]


def test_gradients_of_log_sigma_reach_the_spread_and_nothing_else(head):
    final = _final(4, 6, 7).requires_grad_()
    head.log_sigma(head.features(final)).square().sum().backward()
    assert final.grad is None
    assert {name for name, p in head.named_parameters() if p.grad is not None} == {
        f"spread.{name}" for name, _ in head.spread.named_parameters()
    }
    assert all(p.grad.any() for p in head.spread.parameters())


@pytest.mark.parametrize("size", [(1, 1), (8, 10), (7, 13)])
def test_pose_and_log_sigma_are_read_off_the_same_features(head, size):
    features = head.features(_final(3, *size))
    assert features.shape == (3, head.output.in_features)
    torch.testing.assert_close(head.output(features), head(_final(3, *size)))
    assert head.log_sigma(features).shape == (3, 2)


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


@pytest.fixture()
def attention() -> PoseHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return HEADS.get("attention")(_CHANNELS, HeadOptions(channels=16, hidden=8, layers=3))


def test_attention_knows_where_a_feature_is(attention, monkeypatch):
    final = _final(1, 4, 6)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    shuffled = final.flatten(2)[..., order].view_as(final)
    with torch.no_grad():
        for moved in (shuffled, final.flip(2), final.flip(3)):
            assert (attention(final) - attention(moved)).abs().max() > 1e-4
        # Counter-value: it is the encoding that tells, attention alone sees a set.
        monkeypatch.setattr(attention_head, "position_encoding", lambda h, w, c, like: like.new_zeros(h * w, c))
        torch.testing.assert_close(attention(final), attention(shuffled))


def test_attention_by_hand(attention):
    """One head at a time, as Vaswani et al. 2017 write it, with the norm before each part."""
    final, head = _final(2, 3, 4), attention.double()
    x = head.squeeze(final.double()).flatten(2).transpose(1, 2)
    x = torch.cat([head.token.expand(2, -1, -1), x + attention_head.position_encoding(3, 4, 16, like=x)], dim=1)
    for layer in head.layers:
        weight, bias = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
        queries, keys, values = functional.linear(layer.norm1(x), weight, bias).chunk(3, dim=2)
        parts = [slice(start, start + 4) for start in range(0, 16, 4)]
        shares = [(queries[..., p] @ keys[..., p].transpose(1, 2) / 2).softmax(dim=2) for p in parts]
        mixed = torch.cat([share @ values[..., p] for share, p in zip(shares, parts, strict=True)], dim=2)
        x = x + layer.self_attn.out_proj(mixed)
        x = x + layer.linear2(functional.relu(layer.linear1(layer.norm2(x))))
    torch.testing.assert_close(head(final.double()), head.output(head.norm(x[:, 0])))
    assert len(head.layers) == 3
    with torch.no_grad():  # torch's fused inference path
        torch.testing.assert_close(head.eval()(final.double()), head.output(head.norm(x[:, 0])))


def test_position_codes_lie_on_shares_of_the_side_and_differ_between_cells():
    like = torch.zeros((), dtype=torch.float64)
    code = attention_head.position_encoding(3, 5, 8, like).view(3, 5, 8)
    assert code.dtype == torch.float64
    middle = [1, math.sin(8 * math.pi), 0, math.cos(8 * math.pi)]  # s = 1/2: sin(f pi/2), cos(f pi/2), f = 1 and 16
    torch.testing.assert_close(code[1, 2], torch.tensor(middle * 2, dtype=torch.float64), atol=1e-5, rtol=0)
    row, column = code[..., :4], code[..., 4:]
    assert torch.equal(row, row[:, :1].expand_as(row)) and torch.equal(column, column[:1].expand_as(column))
    finer = attention_head.position_encoding(9, 15, 8, like).view(9, 15, 8)  # its cells 1, 4, 7 have the same centres
    torch.testing.assert_close(finer[1::3, 1::3], code, atol=1e-5, rtol=0)
    many = attention_head.position_encoding(30, 40, 32, like)
    assert (torch.cdist(many, many) + 9 * torch.eye(len(many))).min() > 0.05


@pytest.mark.parametrize(("channels", "nearest"), [(12, "16"), (3, "8"), (33, "32")])
def test_attention_refuses_channels_that_do_not_divide(channels, nearest):
    with pytest.raises(ConfigError, match=rf"divisible by 8; got {channels}: set it to {nearest}"):
        HEADS.get("attention")(_CHANNELS, HeadOptions(channels=channels))


@pytest.mark.parametrize("wrong", [{"channels": 0}, {"hidden": 0}, {"grid": (0, 5)}, {"layers": 0}])
def test_impossible_sizes_are_refused(wrong):
    with pytest.raises(ConfigError, match="must be >= 1"):
        HeadOptions(**wrong)
