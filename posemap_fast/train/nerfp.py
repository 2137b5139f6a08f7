"""Stage 1: the rendering branch of NeRF-P (colour and density) from posed images.

Each step draws pixels of random training images, marches their rays through the occupancy grid, and fits colour;
the number of rays follows the samples per ray so that the work of a step stays constant (Müller et al. 2022).
A random background makes transparency visible to the loss, so that closed rooms become opaque.

With a transient branch (`FieldConfig.transient_dim` > 0) the loss is that of NeRF-W on both densities together: what
single images show goes into the transient one, which no later rendering uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from posemap_fast.data import NO_BORDER, Border, ImageStack
from posemap_fast.errors import ConfigError
from posemap_fast.fields import NeRFP, luminance_histogram
from posemap_fast.geometry import Camera, camera_rays
from posemap_fast.losses import distortion_loss, huber, mse, nerf_in_the_wild
from posemap_fast.render import RayOutput, Renderer
from posemap_fast.render.renderer import TransientOutput
from posemap_fast.seeding import integers, step_generator, uniform

__all__ = ["FieldStage", "FieldTrainConfig", "TrainingViews"]


@dataclass(frozen=True)
class FieldTrainConfig:
    """Schedule of stage 1."""

    steps: int = 1500
    samples_per_step: int = 1 << 16  # marched samples per step, on average
    max_rays: int = 1 << 14  # per step
    lr_table: float = 2e-2  # Adam, hash table
    lr_mlp: float = 6e-3  # Adam, MLPs and appearance code
    lr_final: float = 0.03  # learning rate at the end, relative; exponential decay over the second half
    loss: Literal["huber", "mse"] = "mse"  # without a transient branch; with one, that of NeRF-W
    huber_delta: float = 0.1  # colour difference where Huber turns linear
    coarse: tuple[float, float] = (0.1, 0.3)  # shares of the steps at which the marching step is halved, from 4x
    distortion: float = 0.0  # weight of the distortion loss (Barron et al. 2022); 0 = off
    transient_weight: float = 0.01  # of the mean transient density (NeRF-W, Eq. 13), with a transient branch

    def __post_init__(self) -> None:
        for name in ("steps", "samples_per_step", "max_rays"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1; got {getattr(self, name)}")


@dataclass
class TrainingViews:
    """Images with poses, as the stages use them."""

    images: ImageStack  # (n, H, W, 3) uint8
    c2w: torch.Tensor  # (n, 4, 4) float32
    camera: Camera
    histograms: torch.Tensor  # (n, 10)
    border: Border = NO_BORDER  # of the images, that shows nothing of the scene

    @classmethod
    def of(
        cls, images: torch.Tensor | ImageStack, c2w: torch.Tensor, camera: Camera, border: Border = NO_BORDER
    ) -> TrainingViews:
        """Bundle images with their luminance histograms; poses become float32."""
        stack = ImageStack.of(images)
        return cls(stack, c2w.float(), camera, luminance_histogram(stack), border)

    def to(self, device: torch.device) -> TrainingViews:
        """The same on `device`."""
        moved = (self.images.to(device), self.c2w.to(device))
        return TrainingViews(*moved, self.camera, self.histograms.to(device), self.border)

    def __len__(self) -> int:
        return len(self.images)


class FieldStage:
    """Trains `nerfp` but for its pose branch, and keeps the renderer's occupancy grid up to date.

    A transient branch takes the mean of its histograms from `views`.
    """

    name = "field"

    def __init__(self, config: FieldTrainConfig, nerfp: NeRFP, renderer: Renderer, views: TrainingViews, seed: int):
        self.config = config
        self.n_steps = config.steps
        self.nerfp = nerfp
        self.renderer = renderer
        self.views = views
        self.seed = seed
        self.n_rays = min(config.max_rays, max(256, config.samples_per_step // 64))
        self.totals = {"rays": 0.0, "samples": 0.0}
        if nerfp.transient_encoder is not None:
            nerfp.transient_encoder.mean_histogram.copy_(views.histograms.mean(dim=0))
        self.optimizer = torch.optim.Adam(
            [
                {"params": nerfp.field.grid_parameters(), "lr": config.lr_table},
                {"params": nerfp.rendering_parameters(), "lr": config.lr_mlp},
            ],
            betas=(0.9, 0.99),
            eps=1e-15,
            fused=True,
        )
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]

    def _learning_rate(self, k: int) -> float:
        """Relative rate: constant in the first third, then exponential down to `lr_final`."""
        progress = max(0.0, (k / self.n_steps - 1 / 3) * 1.5)
        return self.config.lr_final**progress

    def _coarseness(self, k: int) -> float:
        """4, 2, then 1: few long steps while the occupancy grid is still full of fog, which buys more rays."""
        first, second = (share * self.n_steps for share in self.config.coarse)
        return 4.0 if k < first else 2.0 if k < second else 1.0

    def step(self, k: int) -> dict[str, float]:
        """One step of Adam on a batch of random pixels."""
        generator = step_generator(self.seed, "field", k)
        self.renderer.set_coarseness(self._coarseness(k))
        if k % self.renderer.config.occupancy.update_every == 0:
            self.renderer.occupancy.update(k, lambda x: self.nerfp.field.density(x)[0], generator)
        for group, base in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = base * self._learning_rate(k)
        index, rays_o, rays_d, target = self._draw(generator)
        out = self._render(index, rays_o, rays_d, generator)
        background = uniform(generator, *target.shape, device=target.device)
        colour = out.rgb + (1 - out.opacity[:, None]) * background
        square = mse(colour, target)
        if isinstance(out, TransientOutput):
            loss = nerf_in_the_wild(colour, target, out.beta, out.sigma_t, self.config.transient_weight)
        else:
            loss = square if self.config.loss == "mse" else huber(colour, target, self.config.huber_delta)
        if self.config.distortion > 0:
            spread = distortion_loss(out.weights, out.samples.t_starts, out.samples.t_ends, out.samples.ray_offsets)
            loss = loss + self.config.distortion * spread
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._follow_samples(out.samples.n_marched, target.shape[0])
        psnr = -10 * torch.log10(square.detach().clamp(min=1e-10))
        return {
            "loss": float(loss.detach()),
            "psnr_db": float(psnr),
            "rays": float(target.shape[0]),
            "samples_per_ray": out.samples.n_marched / target.shape[0],
        }

    def _render(
        self, index: torch.Tensor, rays_o: torch.Tensor, rays_d: torch.Tensor, generator: torch.Generator
    ) -> RayOutput | TransientOutput:
        """The rays as the images `index` (n,) show them."""
        appearance = self.nerfp.appearance_code(self.views.histograms)
        appearance = None if appearance is None else appearance[index]
        transient = self.nerfp.transient_code(self.views.histograms)
        if transient is None:
            return self.renderer.render_rays(self.nerfp, rays_o, rays_d, appearance=appearance, generator=generator)
        return self.renderer.render_transient(
            self.nerfp, rays_o, rays_d, appearance=appearance, transient=transient[index], generator=generator
        )

    def _draw(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random pixels within the border: view index (n,), world rays (n, 3) twice, and colour (n, 3) in [0, 1]."""
        views, border = self.views, self.views.border
        height, width = views.camera.height, views.camera.width
        rows, cols = height - border.top - border.bottom, width - border.left - border.right
        drawn = integers(generator, len(views) * rows * cols, self.n_rays, views.c2w.device)
        index, pixel = drawn // (rows * cols), drawn % (rows * cols)
        x, y = border.left + pixel % cols, border.top + pixel // cols
        target = views.images.pixels((index * height + y) * width + x).float() / 255
        xy = torch.stack([x, y], dim=1) + 0.5
        eye = torch.eye(4, device=drawn.device)[None]
        local = camera_rays(views.camera, eye, xy)[1][0]  # (n, 3) in camera axes
        rotation, centre = views.c2w[index, :3, :3], views.c2w[index, :3, 3]
        return index, centre, torch.einsum("nij,nj->ni", rotation, local), target

    def _follow_samples(self, n_samples: int, n_rays: int) -> None:
        """Adapt the number of rays so that a step marches `samples_per_step` samples."""
        self.totals["rays"] += n_rays
        self.totals["samples"] += n_samples
        wanted = self.config.samples_per_step * n_rays / max(1, n_samples)
        smoothed = 0.9 * self.n_rays + 0.1 * wanted
        self.n_rays = int(min(self.config.max_rays, max(64, smoothed)))

    def state_dict(self) -> dict[str, Any]:
        """Field without the pose branch, occupancy grid, optimizer and counters."""
        return {
            "nerfp": self.nerfp.rendering_state(),
            "occupancy": self.renderer.occupancy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "n_rays": self.n_rays,
            "totals": self.totals,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.nerfp.load_rendering_state(state["nerfp"])
        self.renderer.occupancy.load_state_dict(state["occupancy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.n_rays = state["n_rays"]
        self.totals = state["totals"]
