"""How occupancy bits and packed samples look to nerfacc: axes, levels, boxes and chunks."""

from __future__ import annotations

import pytest
import torch

from posemap_fast.ops import MarchSpec, pack_bits
from posemap_fast.ops.reference.march import cell_index, is_occupied
from posemap_fast.render.nerfacc_layout import (
    binaries_of,
    finest_level,
    level_aabbs,
    offsets_of_counts,
    packed_info_of,
)


def random_bits(spec: MarchSpec) -> torch.Tensor:
    return pack_bits(torch.rand(spec.n_cells, generator=torch.Generator().manual_seed(1)), 0.5)


def test_binaries_are_indexed_by_level_x_y_z() -> None:
    spec = MarchSpec(resolution=8, n_cascades=2)
    bits = random_bits(spec)
    binaries = binaries_of(bits, spec)
    assert binaries.shape == (2, 8, 8, 8) and binaries.dtype == torch.bool and binaries.is_contiguous()
    for level, x, y, z in [(0, 1, 2, 3), (1, 7, 0, 5), (0, 6, 6, 1), (1, 0, 7, 7)]:
        index = ((level * 8 + z) * 8 + y) * 8 + x
        assert bool(binaries[level, x, y, z]) == bool(bits[index // 8] >> (index % 8) & 1)


def test_binaries_agree_with_the_occupancy_of_points() -> None:
    spec = MarchSpec(resolution=16, n_cascades=3)
    bits = random_bits(spec)
    points = torch.rand(500, 3, generator=torch.Generator().manual_seed(4))
    expected = is_occupied(bits, cell_index(points, torch.zeros(500), spec))
    binaries, aabbs = binaries_of(bits, spec), level_aabbs(spec, bits.device)
    for point, occupied in zip(points, expected, strict=True):
        level = int(((point >= aabbs[:, :3]) & (point <= aabbs[:, 3:])).all(1).nonzero()[0])  # the first that holds it
        unit = (point - aabbs[level, :3]) / (aabbs[level, 3:] - aabbs[level, :3])
        x, y, z = (unit * 16).long().tolist()
        assert bool(binaries[level, x, y, z]) == bool(occupied)


def test_level_boxes_double_outwards_to_the_unit_cube() -> None:
    boxes = level_aabbs(MarchSpec(n_cascades=3), torch.device("cpu"))
    expected = [[0.375] * 3 + [0.625] * 3, [0.25] * 3 + [0.75] * 3, [0.0] * 3 + [1.0] * 3]
    assert boxes.tolist() == expected and boxes.dtype == torch.float32


@pytest.mark.parametrize(("step", "level"), [(1 / 100, 0), (1 / 64, 0), (1 / 60, 1), (1 / 20, 2), (1 / 2, 2)])
def test_levels_with_cells_shorter_than_the_step_are_left_out(step: float, level: int) -> None:
    assert finest_level(MarchSpec(resolution=16, n_cascades=3, step_min=step, step_max=step)) == level


def test_offsets_and_packed_info_are_two_forms_of_one_thing() -> None:
    counts = torch.tensor([2, 0, 3])
    offsets = offsets_of_counts(counts)
    assert offsets.tolist() == [0, 2, 2, 5]
    assert packed_info_of(offsets).tolist() == [[0, 2], [2, 0], [2, 3]]
    assert offsets_of_counts(counts[:0]).tolist() == [0] and packed_info_of(torch.tensor([0])).shape == (0, 2)
