"""The transient branch by itself, and what it and the pose branch mean for the state of a NeRF-P."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from posemap_fast.errors import ConfigError, FileFormatError
from posemap_fast.fields import FieldConfig, NeRFP, TransientHead

CONFIG = FieldConfig(
    n_levels=4, log2_hashmap_size=10, base_resolution=4, finest_resolution=32, hidden=16, transient_dim=5
)


def test_values_of_samples_have_the_documented_shapes_and_are_positive() -> None:
    torch.manual_seed(0)
    head = TransientHead(CONFIG)
    geo, codes = 3 * torch.randn(50, 16), 3 * torch.randn(4, 5)
    sigma, rgb, beta = head(geo, codes, torch.arange(50) * 4 // 50)
    assert sigma.shape == beta.shape == (50,) and rgb.shape == (50, 3)
    assert bool((sigma > 0).all()) and bool((beta > 0).all()) and bool(((rgb > 0) & (rgb < 1)).all())


def test_a_sample_depends_on_the_code_of_its_own_ray_only() -> None:
    torch.manual_seed(0)
    head, geo, rays = TransientHead(CONFIG), torch.randn(6, 16), torch.tensor([0, 0, 1, 1, 1, 2])
    codes = torch.randn(3, 5)
    before = head(geo, codes, rays)
    codes[1] += 1
    for a, b in zip(before, head(geo, codes, rays), strict=True):
        changed = (a != b).reshape(6, -1).any(dim=1)
        assert changed.tolist() == [False, False, True, True, True, False]


def test_no_samples_give_empty_values() -> None:
    sigma, rgb, beta = TransientHead(CONFIG)(torch.zeros(0, 16), torch.zeros(2, 5), torch.zeros(0, dtype=torch.int64))
    assert sigma.shape == beta.shape == (0,) and rgb.shape == (0, 3)


def test_an_image_never_seen_has_a_code(frame) -> None:
    nerfp = NeRFP(CONFIG, frame)
    codes = nerfp.transient_code(torch.eye(10))
    assert codes is not None and codes.shape == (10, 5)
    assert NeRFP(dataclasses.replace(CONFIG, transient_dim=0), frame).transient_code(torch.eye(10)) is None


def test_the_branch_is_absent_when_it_is_off_and_changes_no_other_number_when_on(frame) -> None:
    torch.manual_seed(3)
    off = NeRFP(dataclasses.replace(CONFIG, transient_dim=0), frame).state_dict()
    torch.manual_seed(3)
    on = NeRFP(CONFIG, frame).state_dict()
    assert off and not any("transient" in name for name in off)
    assert {name for name in on if not name.startswith("transient")} == set(off)
    assert all(torch.equal(on[name], value) for name, value in off.items())


def test_stage_1_trains_the_branch(frame) -> None:
    nerfp = NeRFP(CONFIG, frame)
    assert nerfp.transient is not None and nerfp.transient_encoder is not None
    trained = {id(p) for p in nerfp.rendering_parameters()}
    assert {id(p) for p in [*nerfp.transient.parameters(), *nerfp.transient_encoder.parameters()]} <= trained


def test_map_switches_backbone_with_its_transient_branch(frame) -> None:
    nerfp = NeRFP(CONFIG, frame)
    other = nerfp.with_backbone("reference").state_dict()
    assert all(torch.equal(other[name], value) for name, value in nerfp.state_dict().items())


def test_no_two_tensors_share_memory(frame) -> None:
    """Or the map could not be written, and training one branch would change the other."""
    mean = torch.rand(10)
    nerfp = NeRFP(CONFIG, frame, mean)
    other = nerfp.with_backbone("reference")
    tensors = [mean, *nerfp.state_dict().values(), *other.state_dict().values()]
    addresses = [tensor.data_ptr() for tensor in tensors if tensor.numel()]
    assert len(set(addresses)) == len(addresses)


def test_negative_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="transient_dim must be >= 0; got -1"):
        dataclasses.replace(CONFIG, transient_dim=-1)


@pytest.mark.parametrize("branch", ["position", "features", "nerf"])
@pytest.mark.parametrize("other_branch", ["position", "nerf"])
def test_maps_with_different_pose_branches_share_the_state_of_stage_1(frame, branch: str, other_branch: str) -> None:
    first = NeRFP(dataclasses.replace(CONFIG, pose_branch=branch), frame)
    second = NeRFP(dataclasses.replace(CONFIG, pose_branch=other_branch, pose_hidden=32), frame)
    pose = [p.clone() for p in second.pose_parameters()]
    state = first.rendering_state()
    second.load_rendering_state(state)
    assert set(first.state_dict()) - set(state) <= {"field.pose_params", "projection.weight", "projection.bias"}
    assert second.rendering_state().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in second.rendering_state().items())
    assert all(torch.equal(a, b) for a, b in zip(pose, second.pose_parameters(), strict=True))


@pytest.mark.parametrize("wrong", ["field.table", "field.pose_params", "unknown"])
def test_a_state_with_other_keys_is_refused_before_anything_changes(frame, wrong: str) -> None:
    nerfp = NeRFP(CONFIG, frame)
    before = {name: value.clone() for name, value in nerfp.state_dict().items()}
    state = {name: value + 1 for name, value in nerfp.rendering_state().items()}
    if wrong in state:
        del state[wrong]
    else:
        state[wrong] = torch.zeros(1)
    with pytest.raises(FileFormatError, match=wrong):
        nerfp.load_rendering_state(state)
    assert all(torch.equal(value, before[name]) for name, value in nerfp.state_dict().items())
