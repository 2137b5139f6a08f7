"""The triplet loss: its four pairings, its two distances, its margin."""

from __future__ import annotations

import pytest
import torch

from posemap_fast.errors import ConfigError, ShapeError
from posemap_fast.losses import hardest_pairing, triplet_loss

_EPSILON = 1e-6


def _random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _constant(values: list[float]) -> torch.Tensor:
    """Features (1, B, 1, 1, 1) that hold one number per view."""
    return torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1, 1)


def _by_definition(anchor: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor, axis: int) -> float:
    near = (anchor - positive + _EPSILON).square().sum(axis).sqrt()
    far = (anchor - negative + _EPSILON).square().sum(axis).sqrt()
    return (near - far + 1).clamp_min(0).mean().item()


# Views (b = 0, 1, 2) as single numbers; each set makes another pairing the nearest of the four.
# Index: 0 rendered/next real, 1 real/next rendered, 2 rendered/next rendered, 3 real/next real.
CASES = {
    0: ([0.0, 1.0, 2.0], [1.1, 2.1, 0.1]),
    1: ([1.1, 2.1, 0.1], [0.0, 1.0, 2.0]),
    2: ([0.0, 0.1, 0.2], [5.0, 9.0, 14.0]),
    3: ([5.0, 9.0, 14.0], [0.0, 0.1, 0.2]),
}


def _pairing(index: int, rendered: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Written out again, view by view: the negative of view b is view b - 1."""
    previous = [view - 1 for view in range(rendered.shape[1])]
    anchor, positive = (rendered, real) if index in (0, 2) else (real, rendered)
    negative = real if index in (0, 3) else rendered
    return anchor, positive, negative[:, previous]


@pytest.mark.parametrize("index", sorted(CASES))
def test_the_hardest_of_the_four_pairings_is_taken(index):
    rendered, real = (_constant(values) for values in CASES[index])
    assert hardest_pairing(rendered, real) == index
    expected = _by_definition(*_pairing(index, rendered, real), axis=2)
    others = [_by_definition(*_pairing(other, rendered, real), axis=2) for other in CASES if other != index]
    assert triplet_loss(rendered, real).item() == pytest.approx(expected, rel=1e-12)
    assert all(abs(expected - other) > 1e-3 for other in others)


@pytest.mark.parametrize(("distance", "axis"), [("channels", 2), ("width", 4)])
def test_the_distance_runs_over_the_named_axis(distance, axis):
    rendered, real = _random(0, 3, 4, 6, 2, 5), _random(1, 3, 4, 6, 2, 5)
    index = hardest_pairing(rendered, real)
    expected = _by_definition(*_pairing(index, rendered, real), axis=axis)
    assert triplet_loss(rendered, real, distance=distance).item() == pytest.approx(expected, rel=1e-12)


def test_the_two_distances_differ():
    rendered, real = _random(0, 2, 3, 6, 2, 5), _random(1, 2, 3, 6, 2, 5)
    assert triplet_loss(rendered, real).item() != pytest.approx(triplet_loss(rendered, real, distance="width").item())


def test_equal_domains_with_far_views_cost_nothing_and_the_margin_sets_how_far():
    views = _constant([0.0, 3.0, 9.0])
    assert triplet_loss(views, views.clone()).item() == 0
    # distances to the negatives are 9, 3 and 6
    assert triplet_loss(views, views.clone(), margin=4.0).item() == pytest.approx(1 / 3, abs=1e-5)


def test_collapsed_features_cost_the_margin():
    same = torch.ones(3, 2, 4, 2, 2)
    assert triplet_loss(same, same.clone()).item() == pytest.approx(1)


@pytest.mark.parametrize("distance", ["channels", "width"])
def test_triplet_passes_gradcheck_in_both_domains(distance):
    # Three views: with two, pairings 0 and 1 tie exactly and finite differences jump between them.
    rendered, real = _random(2, 2, 3, 3, 2, 2).requires_grad_(), _random(3, 2, 3, 3, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, p: triplet_loss(a, p, distance=distance), (rendered, real))


def test_one_view_or_other_shapes_are_refused():
    with pytest.raises(ShapeError, match="two views"):
        triplet_loss(torch.zeros(3, 1, 4, 2, 2), torch.zeros(3, 1, 4, 2, 2))
    with pytest.raises(ShapeError, match="levels, B, C, h, w"):
        triplet_loss(torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2))
    with pytest.raises(ConfigError, match="channels, width"):
        triplet_loss(torch.zeros(1, 2, 4, 2, 2), torch.zeros(1, 2, 4, 2, 2), distance="height")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_compared_in_float32(dtype):
    rendered, real = (_random(seed, 2, 3, 4, 2, 2).to(dtype) for seed in (1, 2))
    assert torch.equal(triplet_loss(rendered, real), triplet_loss(rendered.float(), real.float()))
    assert hardest_pairing(rendered, real) == hardest_pairing(rendered.float(), real.float())
