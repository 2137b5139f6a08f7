"""The renderer against the equations: deferred projection, gradients to the pose, samples, whole views."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from posemap_fast.geometry import camera_rays
from posemap_fast.render import posemap_shape, render_posemaps, render_views


def rays_of(camera, pose: torch.Tensor, n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.rand(n, 2, generator=torch.Generator().manual_seed(9)) * torch.tensor([48.0, 36.0])
    return camera_rays(camera, pose, pixels.to(pose.dtype))


def test_deferred_and_direct_projection_agree_in_values_and_gradients(exact_map, camera, poses) -> None:
    nerfp, renderer = exact_map
    gradients, values = [], []
    cotangent = None
    for deferred in (True, False):
        pose = poses[0].double().requires_grad_(True)
        rays_o, rays_d = rays_of(camera, pose)
        out = renderer.render_rays(nerfp, rays_o, rays_d, want_rgb=False, want_posemap=True, deferred=deferred)
        # b * opacity and sum of w_i (A h_i + b) are the same number in exact arithmetic
        cotangent = torch.randn_like(out.posemap) if cotangent is None else cotangent
        nerfp.zero_grad()
        (out.posemap * cotangent).sum().backward()
        values.append(out.posemap.detach())
        gradients.append([pose.grad, *(p.grad for p in [*nerfp.pose_parameters(), nerfp.field.table])])
    assert values[0].shape == (40, 256)
    torch.testing.assert_close(*values, rtol=1e-10, atol=1e-12)
    for deferred, direct in zip(*gradients, strict=True):
        torch.testing.assert_close(deferred, direct, rtol=1e-9, atol=1e-11)


def test_deferred_and_direct_projection_agree_in_float32(tiny_map, camera, poses) -> None:
    nerfp, renderer = tiny_map
    rays_o, rays_d = rays_of(camera, poses[0])
    maps, grads = [], []
    for deferred in (True, False):
        nerfp.zero_grad()
        out = renderer.render_rays(nerfp, rays_o, rays_d, want_rgb=False, want_posemap=True, deferred=deferred)
        out.posemap.square().sum().backward()
        maps.append(out.posemap.detach())
        grads.append([p.grad.clone() for p in nerfp.pose_parameters()])
    scale = maps[1].abs().max()
    assert float((maps[0] - maps[1]).abs().max() / scale) < 1e-5
    for a, b in zip(*grads, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


def test_posemap_gradient_to_the_pose_agrees_with_finite_differences(exact_map, camera, poses) -> None:
    nerfp, renderer = exact_map
    nerfp.requires_grad_(False)
    base = poses[0].double()
    rays_o, rays_d = rays_of(camera, base, n=12)
    samples = renderer.render_rays(nerfp, rays_o, rays_d, want_rgb=False, want_posemap=True).samples
    assert samples.t_starts.numel() > 100

    def features(translation: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
        pose = base.clone()
        pose = torch.cat([torch.cat([rotation, translation[:, None]], dim=1), base[3:]], dim=0)
        o, d = rays_of(camera, pose, n=12)
        out = renderer.render_rays(nerfp, o, d, want_rgb=False, want_posemap=True, samples=samples)
        return out.posemap[:, :7]

    translation = base[:3, 3].clone().requires_grad_(True)
    rotation = base[:3, :3].clone().requires_grad_(True)
    # trilinear interpolation has kinks at cell faces: a step of 1e-7 keeps samples from crossing one
    assert torch.autograd.gradcheck(features, (translation, rotation), eps=1e-7, atol=1e-4, rtol=1e-4)


def test_native_rendering_agrees_with_the_reference(tiny_map, frame, camera, poses) -> None:
    nerfp, renderer = tiny_map
    rays_o, rays_d = rays_of(camera, poses[1])
    codes = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    native = renderer.render_rays(nerfp, rays_o, rays_d, appearance=codes, want_posemap=True)
    exact = renderer.render_rays(
        nerfp.with_backbone("reference"), rays_o, rays_d, appearance=codes, want_posemap=True, samples=native.samples
    )
    for name in ("rgb", "depth", "opacity", "posemap", "weights"):
        torch.testing.assert_close(getattr(native, name), getattr(exact, name), rtol=2e-4, atol=2e-5)


def test_samples_without_gradient_equal_samples_with_gradient(tiny_map, camera, poses) -> None:
    nerfp, renderer = tiny_map
    rays_o, rays_d = rays_of(camera, poses[1])
    with torch.no_grad():
        fast = renderer.render_rays(nerfp, rays_o, rays_d, want_posemap=True)
    slow = renderer.render_rays(nerfp, rays_o, rays_d, want_posemap=True)
    assert torch.equal(fast.samples.t_starts, slow.samples.t_starts)
    torch.testing.assert_close(fast.posemap, slow.posemap, rtol=1e-5, atol=1e-6)


def test_one_call_gives_colour_depth_and_posemap_of_the_paper_size(tiny_map, camera, poses) -> None:
    nerfp, renderer = tiny_map
    codes = torch.zeros(3, 3)
    view = render_views(renderer, nerfp, poses, camera, appearance=codes)
    assert view.rgb.shape == (3, 36, 48, 3) and view.depth.shape == (3, 36, 48)
    assert view.posemap is not None and view.posemap.shape == (3, 256, 36 // 16, 48 // 16)
    torch.testing.assert_close(view.posemap, render_posemaps(renderer, nerfp, poses, camera), rtol=1e-5, atol=1e-6)
    assert bool(((view.opacity >= 0) & (view.opacity <= 1.0001)).all())


def test_posemap_never_shrinks_to_nothing() -> None:
    from posemap_fast.geometry import Camera

    assert posemap_shape(Camera(12, 9, 10, 10, 6, 4.5)) == (1, 1)
    assert posemap_shape(Camera(854, 480, 744, 744, 427, 240)) == (30, 53)


def test_rays_that_miss_the_scene_see_nothing(tiny_map) -> None:
    nerfp, renderer = tiny_map
    rays_o = torch.tensor([[50.0, 0.0, 0.0], [0.0, float("nan"), 0.0]])
    rays_d = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    out = renderer.render_rays(nerfp, rays_o, rays_d, appearance=torch.zeros(2, 3), want_posemap=True)
    assert torch.equal(out.opacity, torch.zeros(2)) and torch.equal(out.posemap, torch.zeros(2, 256))


def test_depth_is_in_world_units(tiny_map, frame) -> None:
    nerfp, renderer = tiny_map
    with torch.no_grad():  # an opaque field: everything is hit in the first step
        nerfp.field.density_params.zero_()
        nerfp.field.radiance_spec = dataclasses.replace(nerfp.field.radiance_spec, bias=math.log(1e5))
    out = renderer.render_rays(nerfp, torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 1.0]]), appearance=torch.zeros(1, 3))
    first_step_m = (renderer.near + 0.5 / 48) / frame.scale
    assert float(out.depth) == pytest.approx(first_step_m, rel=1e-3)
