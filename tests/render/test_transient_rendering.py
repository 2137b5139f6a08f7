"""Two media along a ray: against the closed form, NeRF-W's sum of two alphas, and the static rendering."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from posemap_fast.fields import FieldFeatures, NeRFP
from posemap_fast.geometry import camera_rays

RGB_S, RGB_T = (0.9, 0.5, 0.1), (0.2, 0.3, 0.8)


def with_transient(nerfp: NeRFP) -> NeRFP:
    """The same field with an untrained transient branch of width 4."""
    torch.manual_seed(4)
    other = NeRFP(dataclasses.replace(nerfp.config, transient_dim=4), nerfp.frame)
    missing = other.load_state_dict(nerfp.state_dict(), strict=False).missing_keys
    assert missing and all(name.startswith("transient") for name in missing)
    return other.to(nerfp.field.table.dtype)


def rays_of(camera, pose: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.rand(n, 2, generator=torch.Generator().manual_seed(9)) * torch.tensor([48.0, 36.0])
    return camera_rays(camera, pose, pixels.to(pose.dtype))


def fog(sigma_s: float, sigma_t: float, beta: float) -> SimpleNamespace:
    """A field of constant density and colour everywhere, in both media."""

    def radiance(x, rays_d, appearance, ray_indices):
        return x.new_full((len(x),), sigma_s), x.new_tensor(RGB_S).expand(len(x), 3), FieldFeatures(x, x)

    def transient(geo, codes, ray_indices):
        n = len(geo)
        return geo.new_full((n,), sigma_t), geo.new_tensor(RGB_T).expand(n, 3), geo.new_full((n,), beta)

    transient.beta_min = 0.1  # type: ignore[attr-defined]
    density = lambda x: (x.new_full((len(x),), sigma_s), FieldFeatures(x, x))  # noqa: E731
    return SimpleNamespace(field=SimpleNamespace(density=density, radiance=radiance), transient=transient)


def nerf_in_the_wild_rgb(sigma_s: float, sigma_t: float, length: float, n: int) -> torch.Tensor:
    """NeRF-W, Eq. 5, with n samples on a ray through the fog."""
    step = length / n
    transmittance = torch.exp(-(sigma_s + sigma_t) * step * torch.arange(n, dtype=torch.float64))[:, None]
    alphas = [1 - math.exp(-sigma * step) for sigma in (sigma_s, sigma_t)]
    colour = sum(a * torch.tensor(c, dtype=torch.float64) for a, c in zip(alphas, (RGB_S, RGB_T), strict=True))
    return (transmittance * colour).sum(dim=0)


def test_two_fogs_have_the_closed_form_which_the_sum_of_two_alphas_approaches(tiny_map) -> None:
    sigma_s, sigma_t, beta = 2.0, 3.0, 0.7
    rays = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, 1.0]])
    out = tiny_map[1].render_transient(fog(sigma_s, sigma_t, beta), *rays, appearance=None, transient=torch.zeros(1, 4))
    length = float(out.samples.t_ends[-1] - out.samples.t_starts[0])
    assert length > 0.4
    opacity, share = 1 - math.exp(-(sigma_s + sigma_t) * length), sigma_t / (sigma_s + sigma_t)
    mean = torch.tensor([(1 - share) * s + share * t for s, t in zip(RGB_S, RGB_T, strict=True)])
    torch.testing.assert_close(out.opacity, torch.tensor([opacity]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.rgb[0], opacity * mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.beta, torch.tensor([opacity * share * beta + 0.1]), rtol=1e-5, atol=1e-6)
    errors = [
        float((nerf_in_the_wild_rgb(sigma_s, sigma_t, length, n) - out.rgb[0]).abs().max()) for n in (50, 100, 5000)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)  # of first order in the length of a sample
    assert errors[2] < 1e-3


def test_without_transient_density_the_static_scene_is_seen_with_full_trust(tiny_map, camera, poses) -> None:
    nerfp, renderer = with_transient(tiny_map[0]), tiny_map[1]
    with torch.no_grad():
        nerfp.transient.layers[-1].weight.zero_()
        nerfp.transient.layers[-1].bias.copy_(torch.tensor([-40.0, 0, 0, 0, 3.0]))
    rays, codes = rays_of(camera, poses[0], 40), torch.randn(40, 3)
    out = renderer.render_transient(nerfp, *rays, appearance=codes, transient=torch.randn(40, 4))
    static = renderer.render_rays(nerfp, *rays, appearance=codes)
    assert torch.equal(out.samples.t_starts, static.samples.t_starts)
    torch.testing.assert_close(out.rgb, static.rgb, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out.opacity, static.opacity, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(out.beta, torch.full((40,), 0.1))


def test_static_rendering_does_not_ask_the_transient_branch(tiny_map, camera, poses) -> None:
    plain, renderer = tiny_map
    nerfp = with_transient(plain)
    rays, codes = rays_of(camera, poses[0], 40), torch.randn(40, 3)
    for a, b in zip(
        renderer.render_rays(plain, *rays, appearance=codes, want_posemap=True)[:4],
        renderer.render_rays(nerfp, *rays, appearance=codes, want_posemap=True)[:4],
        strict=True,
    ):
        assert torch.equal(a, b)


def test_every_parameter_of_the_branch_gets_a_gradient_from_colour_and_from_beta(tiny_map, camera, poses) -> None:
    nerfp, renderer = with_transient(tiny_map[0]), tiny_map[1]
    rays = rays_of(camera, poses[0], 40)
    histograms = torch.rand(40, 10, generator=torch.Generator().manual_seed(1))
    for name in ("rgb", "beta"):
        nerfp.zero_grad()
        codes = nerfp.transient_code(histograms)
        out = renderer.render_transient(nerfp, *rays, appearance=torch.randn(40, 3), transient=codes)
        getattr(out, name).square().sum().backward()
        for parameter in [*nerfp.transient.parameters(), *nerfp.transient_encoder.parameters(), nerfp.field.table]:
            assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0


def test_gradient_to_the_codes_agrees_with_finite_differences(exact_map, camera, poses) -> None:
    nerfp, renderer = with_transient(exact_map[0]), exact_map[1]
    rays = rays_of(camera, poses[0].double(), 2)
    appearance = torch.randn(2, 3, dtype=torch.float64)

    def outputs(codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = renderer.render_transient(nerfp, *rays, appearance=appearance, transient=codes)
        return out.rgb, out.opacity, out.beta

    codes = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    assert torch.autograd.gradcheck(outputs, (codes,), eps=1e-6, atol=1e-6)


def test_rays_that_miss_the_scene_have_the_least_beta(tiny_map) -> None:
    nerfp, renderer = with_transient(tiny_map[0]), tiny_map[1]
    rays = torch.tensor([[50.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    out = renderer.render_transient(nerfp, *rays, appearance=torch.zeros(1, 3), transient=torch.zeros(1, 4))
    assert out.sigma_t.shape == (0,) and torch.equal(out.opacity, torch.zeros(1))
    assert torch.equal(out.beta, torch.full((1,), 0.1))
