"""Volume renderer: rays -> colour, depth, opacity and PoseMap of a NeRF-P through an occupancy grid.

    march (skip empty cells) -> density, no gradient -> compact (drop what is hidden behind surfaces)
    -> density, colour, pose branch on the survivors -> composite -> deferred projection

Sample positions are x = o + t d with t fixed by marching, so a gradient reaches the pose through o and d,
the hash grid and the weights (Mildenhall et al. 2020, arXiv:2003.08934; PoseMap paper, eqs. 3 and 4).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from posemap_fast.errors import ConfigError
from posemap_fast.geometry import SceneFrame
from posemap_fast.ops import MarchSpec, fused_render
from posemap_fast.render.backends import RENDER_BACKENDS
from posemap_fast.render.occupancy import OccupancyConfig, OccupancyGrid
from posemap_fast.seeding import uniform

__all__ = ["PoseField", "RayOutput", "RenderConfig", "Renderer", "Samples", "TransientField", "TransientOutput"]


class PoseField(Protocol):
    """What is rendered: a radiance field and the projection of its pose branch (`fields.NeRFP` is one)."""

    field: Any  # the field protocol: density, rgb, radiance, pose_hidden

    def project(self, hidden: torch.Tensor, opacity: torch.Tensor) -> torch.Tensor:
        """Composited hidden (n_rays, 64) and opacity (n_rays,) -> PoseMap rows (n_rays, 256)."""
        ...

    def project_per_sample(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden of each sample (n, 64) -> f_i (n, 256)."""
        ...


class TransientField(Protocol):
    """A radiance field and what single images add to it (`fields.NeRFP` with a transient branch is one)."""

    field: Any  # as of `PoseField`
    transient: Any  # (geo, codes of the rays, ray_indices) -> sigma_t, rgb_t, beta of the samples; and `beta_min`


@dataclass(frozen=True)
class RenderConfig:
    """How rays are sampled and composited."""

    backend: str = "native"  # a name in RENDER_BACKENDS, or auto
    steps_per_unit: int = 512  # samples per side of the inner box: the step is 1 / steps_per_unit of it
    cone_angle: float = 0.0  # growth of the step with distance; 1/256 is usual for unbounded scenes
    max_samples: int = 1024  # per ray
    transmittance_eps: float = 1e-3  # samples behind this transmittance are dropped before colours are computed
    early_stop_eps: float = 1e-4  # and compositing ends here
    occupancy: OccupancyConfig = field(default_factory=OccupancyConfig)

    def __post_init__(self) -> None:
        if self.steps_per_unit < 1:
            raise ConfigError(f"steps_per_unit must be >= 1; got {self.steps_per_unit}")


class Samples(NamedTuple):
    """Packed samples of a bundle of rays, in field units; they carry no gradient."""

    ray_offsets: torch.Tensor  # (n_rays + 1,) int64
    ray_indices: torch.Tensor  # (n,) int64
    t_starts: torch.Tensor  # (n,)
    t_ends: torch.Tensor  # (n,)
    n_marched: int  # samples before hidden ones were dropped


class RayOutput(NamedTuple):
    """What a ray sees; `rgb` has no background added."""

    rgb: torch.Tensor  # (n_rays, 3), or (n_rays, 0) when colour was not asked for
    depth: torch.Tensor  # (n_rays,) expected distance along the ray in world units, not divided by opacity
    opacity: torch.Tensor  # (n_rays,)
    posemap: torch.Tensor  # (n_rays, 256), or (n_rays, 0)
    weights: torch.Tensor  # (n,) of each sample; empty after a fused rendering
    samples: Samples  # likewise


class TransientOutput(NamedTuple):
    """What a ray sees of the static scene and of what its image alone shows; no background added."""

    rgb: torch.Tensor  # (n_rays, 3)
    opacity: torch.Tensor  # (n_rays,)
    beta: torch.Tensor  # (n_rays,) uncertainty of rgb, >= beta_min
    sigma_t: torch.Tensor  # (n,) transient density of each sample, 1/unit
    weights: torch.Tensor  # (n,) of both densities
    samples: Samples


class _Density(NamedTuple):
    """What the field says of n samples; no gradient."""

    x: torch.Tensor  # (n, 3)
    sigmas: torch.Tensor  # (n,)
    features: Any  # `FieldFeatures`


_MAX_STEP = math.sqrt(3) / 128  # longest step that a cone angle can grow to: 128 across the unit cube
_LEAST_DENSITY = 1e-10  # a divisor, 1/unit: invisible, and its square is a number


class Renderer:
    """Renders rays given in world coordinates.

    Args:
        config: sampling.
        frame: world to unit cube; its `aabb` bounds the rays and `n_cascades` the grid.
        near: distance from the camera at which rays start, field units.
    """

    def __init__(self, config: RenderConfig, frame: SceneFrame, near: float):
        self.config = config
        self.frame = frame
        self.near = near
        self.backend = RENDER_BACKENDS.get(config.backend)
        self.march_spec = self._march_spec(1.0)
        self.occupancy = OccupancyGrid(config.occupancy, frame.n_cascades, self.march_spec.step_min)

    def _march_spec(self, coarseness: float) -> MarchSpec:
        step = coarseness * 2.0 ** (1 - self.frame.n_cascades) / self.config.steps_per_unit
        return MarchSpec(
            resolution=self.config.occupancy.resolution,
            n_cascades=self.frame.n_cascades,
            step_min=step,
            step_max=max(step, _MAX_STEP),
            cone_angle=self.config.cone_angle,
            max_samples=self.config.max_samples,
        )

    def set_coarseness(self, coarseness: float) -> None:
        """March with steps `coarseness` times as long as configured (early in training); 1 is the normal state."""
        self.march_spec = self._march_spec(coarseness)

    def at_coarseness(self, coarseness: float) -> Renderer:
        """A renderer of the same map, occupancy grid included, that marches with longer steps."""
        other = copy.copy(self)
        other.set_coarseness(coarseness)
        return other

    def to_field(self, rays_o: torch.Tensor, rays_d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """World origins and unit directions -> field origins and unit directions, both (n, 3)."""
        return self.frame.to_field(rays_o), self.frame.directions(rays_d)

    @torch.no_grad()
    def march(self, origins: torch.Tensor, directions: torch.Tensor, generator: torch.Generator | None) -> Samples:
        """Samples in occupied cells along rays in field coordinates; jittered when a generator is given."""
        n_rays = origins.shape[0]
        jitter = None if generator is None else uniform(generator, n_rays, device=origins.device).to(origins.dtype)
        result = self.backend.march(
            origins.detach().contiguous(),
            directions.detach().contiguous(),
            *self._range(origins),
            self.frame.aabb.to(origins),
            self.occupancy.bitfield,
            self.march_spec,
            jitter,
        )
        return _with_indices(result.ray_offsets, result.t_starts, result.t_ends)

    def render_rays(
        self,
        nerfp: PoseField,
        rays_o: torch.Tensor,
        rays_d: torch.Tensor,
        *,
        appearance: torch.Tensor | None = None,
        want_rgb: bool = True,
        want_posemap: bool = False,
        generator: torch.Generator | None = None,
        samples: Samples | None = None,
        deferred: bool = True,
        per_sample: bool = True,
    ) -> RayOutput:
        """Render a bundle of rays.

        Args:
            nerfp: the field; float32, or float64 on the reference backbone.
            rays_o, rays_d: (n_rays, 3) world frame, directions of unit length; may require grad.
            appearance: (n_rays, dim) codes, None when the field has no appearance code.
            want_rgb, want_posemap: which heads to evaluate.
            generator: jitters the first sample of each ray (training); None = fixed lattice.
            samples: use these instead of marching (their t values are taken as they are).
            deferred: composite the hidden pose feature and project once per ray; False = the direct form.
            per_sample: whether `weights` and `samples` are wanted; without them and without a gradient a GPU renders
                in one launch (`ops.fused_render`, weights and activations in half precision).
        Returns:
            RayOutput; differentiable in the field's parameters and in the rays.
        """
        origins, directions = self.to_field(rays_o, rays_d)
        if not (per_sample or torch.is_grad_enabled() or samples is not None or generator is not None) and deferred:
            fused = self._render_fused(nerfp, origins, directions, appearance, want_rgb, want_posemap)
            if fused is not None:
                return fused
        field = nerfp.field
        needs_grad = torch.is_grad_enabled() and (
            origins.requires_grad or directions.requires_grad or any(p.requires_grad for p in field.grid_parameters())
        )
        known = None
        if samples is None:
            samples, known = self._march_seen(field, origins, directions, generator, want_density=not needs_grad)
        view = (directions, appearance, samples.ray_indices)
        if known is not None:
            x, sigmas, features = known
        else:
            x = _positions(origins, directions, samples)
        if want_rgb and known is None:
            sigmas, colours, features = field.radiance(x, *view)
        else:
            if known is None:
                sigmas, features = field.density(x)
            colours = field.rgb(features, *view) if want_rgb else sigmas.new_zeros(sigmas.shape[0], 3)
        hidden = None
        if want_posemap:
            hidden = field.pose_hidden(x, features)
            hidden = hidden if deferred else nerfp.project_per_sample(hidden)
        out = self.backend.composite(
            sigmas, samples.t_starts, samples.t_ends, colours, samples.ray_offsets, hidden, self.config.early_stop_eps
        )
        posemap = out.features
        if want_posemap and deferred:
            posemap = nerfp.project(posemap, out.opacity)
        rgb = out.rgb if want_rgb else out.rgb[:, :0]
        return RayOutput(rgb, out.depth / self.frame.scale, out.opacity, posemap, out.weights, samples)

    def render_transient(
        self,
        nerfp: TransientField,
        rays_o: torch.Tensor,
        rays_d: torch.Tensor,
        *,
        appearance: torch.Tensor | None,
        transient: torch.Tensor,
        generator: torch.Generator | None = None,
    ) -> TransientOutput:
        """Render a bundle of rays with the transient branch: what the training images show.

        Densities add. Where they are constant along a sample, its light is exactly that of one medium with

            sigma = sigma_s + sigma_t,   c = (sigma_s c_s + sigma_t c_t) / sigma,   beta = sigma_t beta_t / sigma

        composited as usual. NeRF-W (arXiv:2008.02268, Eq. 5) sums two alphas under the transmittance of both,
        alpha_s c_s + alpha_t c_t, which is the first order of this in sigma times the length of the sample.

        Args:
            nerfp: a field with a transient branch.
            rays_o, rays_d, appearance, generator: as for `render_rays`.
            transient: (n_rays, transient_dim) codes.
        Returns:
            TransientOutput; differentiable in the parameters and in the rays.
        """
        origins, directions = self.to_field(rays_o, rays_d)
        # Nothing that the ray sees is lost by asking the static density alone: the other one only hides more.
        samples, _ = self._march_seen(nerfp.field, origins, directions, generator, want_density=False)
        x, rays = _positions(origins, directions, samples), samples.ray_indices
        sigma_s, rgb_s, features = nerfp.field.radiance(x, directions, appearance, rays)
        sigma_t, rgb_t, beta = nerfp.transient(features.geo, transient, rays)
        sigmas = sigma_s + sigma_t
        share = sigma_t / sigmas.clamp(min=_LEAST_DENSITY)
        out = self.backend.composite(
            sigmas,
            samples.t_starts,
            samples.t_ends,
            torch.lerp(rgb_s, rgb_t, share[:, None]),
            samples.ray_offsets,
            (share * beta)[:, None],
            self.config.early_stop_eps,
        )
        beta_ray = out.features[:, 0] + nerfp.transient.beta_min
        return TransientOutput(out.rgb, out.opacity, beta_ray, sigma_t, out.weights, samples)

    def _render_fused(
        self,
        nerfp: PoseField,
        origins: torch.Tensor,
        directions: torch.Tensor,
        appearance: torch.Tensor | None,
        want_rgb: bool,
        want_posemap: bool,
    ) -> RayOutput | None:
        """One launch for everything; None where the field, the backend or the device has no such kernel."""
        make = getattr(nerfp.field, "fused", None)
        if make is None or self.config.backend != "native" or origins.dtype != torch.float32:
            return None
        field = make(want_posemap)
        if field is None:
            return None
        found = fused_render(
            field,
            origins,
            directions,
            *self._range(origins),
            self.frame.aabb,
            self.occupancy.bitfield,
            self.march_spec,
            appearance=appearance,
            early_stop_eps=max(self.config.transmittance_eps, self.config.early_stop_eps),
        )
        if found is None:
            return None
        rgb = found.rgb if want_rgb else found.rgb[:, :0]
        posemap = nerfp.project(found.hidden, found.opacity) if want_posemap else found.hidden
        none = origins.new_empty(0)
        samples = Samples(origins.new_zeros(len(origins) + 1, dtype=torch.int64), none.long(), none, none, 0)
        return RayOutput(rgb, found.depth / self.frame.scale, found.opacity, posemap, none, samples)

    def _range(self, origins: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Near and far of each ray, field units."""
        return origins.new_full((len(origins),), self.near), origins.new_full((len(origins),), 1e4)

    @torch.no_grad()
    def _march_seen(
        self,
        field: Any,
        origins: torch.Tensor,
        directions: torch.Tensor,
        generator: torch.Generator | None,
        want_density: bool,
    ) -> tuple[Samples, _Density | None]:
        """Marched samples without those behind the field's surfaces, and what was found there if that is wanted."""
        marched = self.march(origins, directions, generator)
        x = _positions(origins, directions, marched)
        sigmas, features = field.density(x)
        samples, kept = self._drop_hidden(sigmas, marched)
        return samples, _Density(x[kept], sigmas[kept], features.select(kept)) if want_density else None

    def _drop_hidden(self, sigmas: torch.Tensor, samples: Samples) -> tuple[Samples, torch.Tensor]:
        """The samples that can be seen from the camera, and their indices."""
        kept = self.backend.compact(
            sigmas, samples.t_starts, samples.t_ends, samples.ray_offsets, self.config.transmittance_eps
        )
        packed = _with_indices(kept.ray_offsets, samples.t_starts[kept.indices], samples.t_ends[kept.indices])
        return packed._replace(n_marched=samples.t_starts.numel()), kept.indices


def _with_indices(ray_offsets: torch.Tensor, t_starts: torch.Tensor, t_ends: torch.Tensor) -> Samples:
    counts = ray_offsets[1:] - ray_offsets[:-1]
    indices = torch.repeat_interleave(counts, output_size=t_starts.numel())
    return Samples(ray_offsets, indices, t_starts, t_ends, t_starts.numel())


def _positions(origins: torch.Tensor, directions: torch.Tensor, samples: Samples) -> torch.Tensor:
    """Midpoints of the samples in the unit cube, (n, 3)."""
    middle = (0.5 * (samples.t_starts + samples.t_ends))[:, None].to(origins.dtype)
    return origins[samples.ray_indices] + directions[samples.ray_indices] * middle
