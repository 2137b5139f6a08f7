"""The three pose branches, on every field backbone that runs on the CPU."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from posemap_fast.apr import PoseFrame
from posemap_fast.errors import ConfigError
from posemap_fast.fields import FIELD_BACKBONES, FieldConfig, NeRFP, PoseDecoder
from posemap_fast.geometry import so3_exp
from posemap_fast.render import render_posemaps
from posemap_fast.train import PoseBranchConfig, PoseBranchStage, RVSConfig, ViewSampler

CONFIG = FieldConfig(
    n_levels=4,
    log2_hashmap_size=10,
    base_resolution=4,
    finest_resolution=32,
    hidden=16,
    geo_features=7,
    pose_hidden=8,
    pose_features=24,
    appearance_dim=3,
)
BRANCHES = ("position", "features", "nerf")
N_RAW = 4 * 2 + 1 + 7  # hash features of all levels, density, geo_features
WIDTH = {"position": 8, "features": 8, "nerf": N_RAW}
CHANNELS = {"position": 24, "features": 24, "nerf": N_RAW}


@pytest.fixture(params=BRANCHES)
def branch(request) -> str:
    return request.param


@pytest.fixture(params=[name for name in FIELD_BACKBONES.names() if name != "tcnn"])  # which needs a GPU
def backbone(request) -> str:
    return request.param


def make(branch: str, backbone: str, frame, **changes) -> NeRFP:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        nerfp = NeRFP(dataclasses.replace(CONFIG, pose_branch=branch, backbone=backbone, **changes), frame)
    with torch.no_grad():
        nerfp.field.table.uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    return nerfp


def positions(n: int = 40) -> torch.Tensor:
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(2))


def hidden_at(nerfp: NeRFP, x: torch.Tensor) -> torch.Tensor:
    return nerfp.field.pose_hidden(x, nerfp.field.density(x)[1])


def test_widths_and_channels_are_those_of_the_configuration(branch, backbone, frame) -> None:
    nerfp = make(branch, backbone, frame)
    hidden = hidden_at(nerfp, positions())
    assert hidden.shape == (40, WIDTH[branch])
    assert nerfp.config.posemap_channels == CHANNELS[branch]
    assert nerfp.project(hidden, torch.ones(40)).shape == (40, CHANNELS[branch])
    assert nerfp.project_per_sample(hidden).shape == (40, CHANNELS[branch])
    assert hidden_at(nerfp, positions(0)).shape == (0, WIDTH[branch])


def test_projection_is_linear_with_the_bias_weighted_by_the_opacity(branch, backbone, frame) -> None:
    nerfp = make(branch, backbone, frame)
    hidden, weights = hidden_at(nerfp, positions()), torch.rand(40) / 40
    direct = weights @ nerfp.project_per_sample(hidden)
    deferred = nerfp.project((weights @ hidden)[None], weights.sum()[None])[0]
    torch.testing.assert_close(deferred, direct)


def test_hidden_is_differentiable_in_the_position(branch, backbone, frame) -> None:
    """Native gradients against the reference's, which agree with finite differences in float64."""
    cotangent = torch.randn(40, WIDTH[branch], generator=torch.Generator().manual_seed(3))
    reference = make(branch, "reference", frame)
    gradients = []
    for nerfp in (reference, make(branch, backbone, frame)):
        nerfp.load_state_dict(reference.state_dict())
        x = positions().requires_grad_()
        (hidden_at(nerfp, x) * cotangent).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3)
    if backbone == "reference":
        exact = reference.double()
        x = positions(6).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: hidden_at(exact, x), (x,), eps=1e-7, atol=1e-4)


def test_backbones_read_each_others_parameters_and_agree(branch, backbone, frame) -> None:
    reference, other = make(branch, "reference", frame), make(branch, backbone, frame)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    other.load_state_dict(reference.state_dict())
    torch.testing.assert_close(hidden_at(other, positions()), hidden_at(reference, positions()), rtol=1e-4, atol=1e-5)
    back = other.with_backbone("reference")
    assert torch.equal(hidden_at(back, positions()), hidden_at(reference, positions()))


def test_position_knows_nothing_of_the_field_and_the_others_do(branch, backbone, frame) -> None:
    nerfp = make(branch, backbone, frame)
    before = hidden_at(nerfp, positions())
    with torch.no_grad():
        nerfp.field.table.neg_()
        nerfp.field.density_params.mul_(0.5)
    assert torch.equal(hidden_at(nerfp, positions()), before) == (branch == "position")


def test_nerf_is_what_the_field_has_and_learns_nothing(backbone, frame) -> None:
    nerfp = make("nerf", backbone, frame)
    features = nerfp.field.density(positions())[1]
    hidden = hidden_at(nerfp, positions())
    assert torch.equal(hidden, torch.cat([features.encoding, features.geo], dim=1))
    assert torch.equal(nerfp.project(hidden, torch.rand(40)), hidden)
    assert torch.equal(nerfp.project_per_sample(hidden), hidden)
    assert sum(p.numel() for p in nerfp.pose_parameters()) == 0 and nerfp.projection is None


def test_posemap_has_a_gradient_in_the_pose(branch, backbone, frame, tiny_map, poses, camera) -> None:
    nerfp, renderer = make(branch, backbone, frame), tiny_map[1]
    turn = torch.zeros(3, 3, requires_grad=True)
    move = torch.zeros(3, 3, requires_grad=True)
    moved = torch.cat(
        [torch.cat([so3_exp(turn) @ poses[:, :3, :3], (poses[:, :3, 3] + move)[..., None]], dim=2), poses[:, 3:]], dim=1
    )
    maps = render_posemaps(renderer, nerfp, moved, camera)
    assert maps.shape == (3, CHANNELS[branch], 2, 3)
    maps.square().sum().backward()
    for gradient in (turn.grad, move.grad):
        assert bool(gradient.isfinite().all()) and bool((gradient.norm(dim=1) > 0).all())


@pytest.mark.parametrize("n_octaves", [1, 2, 5])
def test_position_is_encoded_in_sines_of_the_lowest_octaves(n_octaves: int, frame) -> None:
    """With one hidden unit per input and weights of the identity, the branch shows relu(encoding)."""
    n_inputs = 4 + 6 * n_octaves
    nerfp = make("position", "reference", frame, pose_octaves=n_octaves, pose_hidden=n_inputs)
    assert nerfp.field.pose_params.numel() == 2 * n_inputs**2
    with torch.no_grad():
        nerfp.field.pose_params.copy_(torch.eye(n_inputs).flatten().repeat(2))
    x = torch.tensor([[0.75, 0.25, 0.5]])  # u = 0.5, -0.5, 0
    expected = [1, 0.5, -0.5, 0]
    for k in range(n_octaves):
        angles = [math.pi * 2**k * u for u in (0.5, -0.5, 0)]
        expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    wanted = torch.tensor(expected).clamp(min=0)[None]
    torch.testing.assert_close(hidden_at(nerfp, x), wanted, rtol=0, atol=1e-5)


def test_two_octaves_where_the_configuration_leaves_it_open(frame) -> None:
    assert make("position", "reference", frame).field.pose_mlp.dims[0] == 4 + 6 * 2


@pytest.mark.parametrize("n_octaves", [-1, 11])
def test_octaves_out_of_range_are_refused(n_octaves: int) -> None:
    with pytest.raises(ConfigError, match="pose_octaves must be 0 to 10"):
        dataclasses.replace(CONFIG, pose_octaves=n_octaves)


def test_stage_2_trains_the_branch_and_the_decoder_and_resumes(branch, frame, tiny_map, poses, camera) -> None:
    renderer, whole, cut = tiny_map[1], make(branch, "native", frame), make(branch, "native", frame)
    sampler = ViewSampler(RVSConfig(max_translation=0.1), poses, renderer)
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    torch.manual_seed(0)
    decoders = [PoseDecoder(whole.config.posemap_channels) for _ in range(3)]
    for decoder in decoders[1:]:
        decoder.load_state_dict(decoders[0].state_dict())

    def stage(nerfp: NeRFP, decoder: PoseDecoder) -> PoseBranchStage:
        config = PoseBranchConfig(steps=3, batch=2)
        return PoseBranchStage(
            config, nerfp, decoder, PoseFrame.from_poses(poses, "auto"), renderer, camera, sampler, 0
        )

    straight, first = stage(whole, decoders[0]), stage(cut, decoders[1])
    for k in range(3):
        straight.step(k)
    first.step(0)
    second = stage(make(branch, "native", frame), decoders[2])
    second.load_state_dict(first.state_dict())
    for k in (1, 2):
        second.step(k)
    changed = {name for name, value in whole.state_dict().items() if not torch.equal(value, start[name])}
    learnt = {"field.pose_params", "projection.weight", "projection.bias"}
    assert changed == (set() if branch == "nerf" else learnt)
    for ours, theirs in ((whole, second.nerfp), (decoders[0], decoders[2])):
        for name, value in ours.state_dict().items():
            assert torch.equal(theirs.state_dict()[name], value), name
    assert not torch.equal(decoders[0].state_dict()[name], decoders[1].state_dict()[name])
