"""The normalised pose frame: there and back, automatic scale, gradients."""

from __future__ import annotations

import json
import math

import pytest
import torch

from posemap_fast.apr import PoseFrame
from posemap_fast.errors import ConfigError, ShapeError
from posemap_fast.geometry import make_c2w, so3_exp


def _poses(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rotation = so3_exp(torch.randn(n, 3, generator=generator, dtype=torch.float64))
    return make_c2w(rotation, 4 * torch.randn(n, 3, generator=generator, dtype=torch.float64) + 7).to(dtype)


def test_decode_inverts_encode():
    poses = _poses(20)
    frame = PoseFrame.from_poses(poses, "auto")
    torch.testing.assert_close(frame.decode(frame.encode(poses)), poses, rtol=0, atol=1e-12)


def test_convention_the_vector_is_row_major_and_the_translation_centred_and_divided():
    pose = make_c2w(torch.eye(3), torch.tensor([3.0, 5.0, 9.0]))
    vector = PoseFrame((1.0, 1.0, 1.0), 2.0).encode(pose)
    assert vector.tolist() == [1, 0, 0, 1, 0, 1, 0, 2, 0, 0, 1, 4]


def test_a_metric_frame_only_centres():
    poses = _poses(9)
    frame = PoseFrame.from_poses(poses)
    assert frame.scale == 1
    assert frame.center == pytest.approx(poses[:, :3, 3].mean(0).tolist())
    torch.testing.assert_close(frame.encode(poses)[:, 3::4].mean(0), torch.zeros(3, dtype=torch.float64))


def test_the_automatic_scale_gives_unit_spread_and_follows_the_unit_of_the_scene():
    poses = _poses(50)
    frame = PoseFrame.from_poses(poses, "auto")
    spread = frame.encode(poses)[:, 3::4].square().sum(1).mean().sqrt()
    assert spread.item() == pytest.approx(1)
    millimetres = poses.clone()
    millimetres[:, :3, 3] *= 1000
    assert PoseFrame.from_poses(millimetres, "auto").scale == pytest.approx(1000 * frame.scale)


def test_cameras_on_one_spot_get_scale_one():
    assert PoseFrame.from_poses(torch.eye(4).repeat(3, 1, 1), "auto").scale == 1


def test_decode_makes_a_rotation_of_any_matrix():
    generator = torch.Generator().manual_seed(3)
    c2w = PoseFrame((0.0, 0.0, 0.0), 3.0).decode(torch.randn(16, 12, generator=generator))
    identity = torch.eye(3).expand(16, 3, 3)
    torch.testing.assert_close(c2w[:, :3, :3] @ c2w[:, :3, :3].transpose(1, 2), identity, rtol=0, atol=1e-5)
    assert torch.linalg.det(c2w[:, :3, :3]).min() > 0.99
    assert torch.equal(c2w[:, 3], torch.tensor([0.0, 0.0, 0.0, 1.0]).expand(16, 4))


def test_decode_passes_gradcheck():
    vector = PoseFrame().encode(_poses(3)) + 0.1 * torch.randn(
        3, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    assert torch.autograd.gradcheck(PoseFrame((1.0, 2.0, 3.0), 2.5).decode, (vector.requires_grad_(),))


def test_dictionary_round_trip_through_json():
    frame = PoseFrame((0.1, -2.0, 3e5), 0.37)
    assert PoseFrame.from_dict(json.loads(json.dumps(frame.to_dict()))) == frame


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_impossible_frames_are_refused(scale):
    with pytest.raises(ShapeError, match="scale"):
        PoseFrame(scale=scale)
    with pytest.raises(ShapeError, match="center"):
        PoseFrame((math.nan, 0.0, 0.0))


def test_unknown_scale_words_and_no_poses_are_refused():
    with pytest.raises(ConfigError, match="'auto'"):
        PoseFrame.from_poses(_poses(2), "automatic")
    with pytest.raises(ShapeError, match="at least one pose"):
        PoseFrame.from_poses(torch.zeros(0, 4, 4))
