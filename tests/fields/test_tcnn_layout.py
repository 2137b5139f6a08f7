"""How the grid and the networks look to tiny-cuda-nn: levels, flat parameters, paddings and config dictionaries."""

from __future__ import annotations

import pytest
import torch

from posemap_fast.errors import BackendError
from posemap_fast.fields.tcnn_layout import (
    from_tcnn_params,
    from_tcnn_table,
    grid_resolutions,
    n_tcnn_params,
    network_config,
    padded_dims,
    per_level_scale,
    to_tcnn_params,
    to_tcnn_table,
)
from posemap_fast.ops import HashGridSpec, MLPSpec


@pytest.mark.parametrize("finest", range(128, 8193, 16 * 31))
def test_levels_do_not_depend_on_how_the_gpu_rounds_exp2(finest: int) -> None:
    spec = HashGridSpec(16, 2, 19, 16, finest)
    growth = per_level_scale(spec)
    for error in (-(2.0**-22), 0.0, 2.0**-22):  # the documented error of ex2.approx
        found = grid_resolutions(growth, spec, error)
        for theirs, ours in zip(found, spec.resolutions, strict=True):
            assert theirs == ours or min(theirs, ours) ** 3 > 2**19


def test_growth_of_two_stays_two() -> None:
    assert per_level_scale(HashGridSpec(8, 2, 19, 16, 16 * 2**7)) == 2.0


def test_a_whole_number_of_cells_is_not_rounded_up_to_the_next() -> None:
    spec = HashGridSpec(5, 2, 19, 16, 64)  # scales 15, 21.6, 31, 44.3, 63
    assert spec.resolutions == (16, 23, 32, 46, 64)
    assert grid_resolutions(per_level_scale(spec), spec, 2.0**-22) == [16, 23, 32, 46, 64]


@pytest.mark.parametrize("spec", [HashGridSpec(4, 8, 10, 4, 32), HashGridSpec(1, 2, 14, 16, 16)], ids=str)
def test_table_conversion_round_trips(spec: HashGridSpec) -> None:
    table = torch.rand(spec.n_entries, spec.n_features_per_level)
    flat = to_tcnn_table(table)
    assert flat.data_ptr() == table.data_ptr() and flat.shape == (table.numel(),)
    assert torch.equal(from_tcnn_table(flat, spec), table)


NETWORKS = [MLPSpec((32, 64, 16)), MLPSpec((47, 64, 64, 3)), MLPSpec((20, 8, 8)), MLPSpec((5, 100, 100, 100, 17))]


@pytest.mark.parametrize("spec", NETWORKS, ids=str)
def test_network_conversion_round_trips_and_zeroes_what_it_adds(spec: MLPSpec) -> None:
    params = torch.rand(spec.n_params) + 1.0
    flat = to_tcnn_params(params, spec)
    assert flat.shape == (n_tcnn_params(spec),)
    assert int((flat != 0).sum()) == spec.n_params
    assert torch.equal(from_tcnn_params(flat, spec), params)
    assert torch.equal(from_tcnn_params(torch.where(flat == 0, 9.0, flat), spec), params)


def test_network_matrices_are_row_major_with_rows_and_columns_added_at_the_end() -> None:
    spec = MLPSpec((2, 3, 1))
    params = torch.arange(1.0, 10.0)
    first, last = to_tcnn_params(params, spec).split([16 * 16, 16 * 16])
    assert first.view(16, 16)[:3, :2].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert last.view(16, 16)[0, :3].tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("hidden", "neurons", "otype"),
    [(8, 16, "FullyFusedMLP"), (64, 64, "FullyFusedMLP"), (128, 128, "FullyFusedMLP"), (100, 112, "CutlassMLP")],
)
def test_network_type_follows_the_hidden_width(hidden: int, neurons: int, otype: str) -> None:
    config = network_config(MLPSpec((7, hidden, hidden, 3)))
    assert (config["n_neurons"], config["otype"], config["n_hidden_layers"]) == (neurons, otype, 2)


@pytest.mark.parametrize("dims", [(4, 3), (4, 16, 32, 3)])
def test_networks_that_tiny_cuda_nn_has_no_form_for_are_refused(dims: tuple[int, ...]) -> None:
    with pytest.raises(BackendError, match="hidden layers of one width"):
        padded_dims(MLPSpec(dims))
