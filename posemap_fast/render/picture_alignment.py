"""Direct alignment: a camera is moved until an image shows points where a picture of the map has seen them.

A rendered picture knows how deep each of its pixels lies, so it is a coloured point cloud. With r_i the difference
between the image, read where point i projects to, and the colour of the point,

    r_i(xi) = I(pi(exp(-xi) X_i)) - C_i,     J_i = grad I  dpi/dX  [[X]_x | -1],     (J^T W J + lambda D) xi = -J^T W r

(xi moves the camera) is solved by Levenberg and Marquardt's steps with Huber's weights (as photometric alignment of
depth images: Kerl et al. 2013; Engel et al., arXiv:1607.02565). No derivative of the renderer is needed: a step costs
one reading of the image, a hundredth of a rendering and its backward pass, and comes closer than tens of steps of
gradient descent (iNeRF, arXiv:2012.05877). What the points hide from each other and what changes with the view is right
at the picture's own pose only, so pictures are rendered anew between the rounds (`render.image_pose`).

Where a map is wrong it is wrong for many pixels together, so residuals are not independent and (J^T W J)^-1 promises
ten times too much. How far parts b of the picture pull the pose apart tells more: the sandwich of a cluster-robust
covariance (Liang and Zeger 1986),

    H = J^T W J,     g_b = sum of J_i^T W r_i over part b,     covariance = H^-1 (sum_b g_b g_b^T) H^-1
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn import functional

from posemap_fast.geometry import Camera, make_c2w, so3_exp

__all__ = ["AlignedPoses", "Picture", "align_to_images", "blurred", "huber", "normalised"]

_HUBER_DELTA = 0.3  # of normalised colours, whose standard deviation is 1
_LEAST_CONTRAST = 0.005  # below it, noise is not taken for a picture
_LEAST_VISIBLE = 0.4  # share of the weight of a picture's points that the image must show
_MARGIN_PX = 1.0  # at the image's border, where it has no gradient
_DAMPING, _LESS, _MORE = 1e-3, 0.3, 10.0  # at first; after a step that helped, and after one that did not
_PARTS = 4  # rows and columns of parts of a picture, whose errors are independent of each other's
_FLOOR = 1e-6  # of eigenvalues of J^T W J with a unit diagonal
_LEAST_SLOPE = 1e-9  # of J^T W J, below which the image has none
_LEAST_SIGMA = 1e-9  # a divisor
_UNKNOWN = 1e6  # standard deviation, in units and radians, of what the image says nothing of


class Picture(NamedTuple):
    """What a map looks like from n poses, as coloured points in the frames of these cameras."""

    rgb: torch.Tensor  # (n, 3, h, w)
    points: torch.Tensor  # (n, h * w, 3) OpenCV camera axes, world units
    weights: torch.Tensor  # (n, h * w) >= 0, how far a point can be trusted


class AlignedPoses(NamedTuple):
    """Ends of an alignment; images do not influence each other."""

    c2w: torch.Tensor  # (n, 4, 4) camera-to-world, world frame
    residual: torch.Tensor  # (n,) Huber distance of image and points, mean over the visible ones
    sigma: torch.Tensor  # (n, 2) standard deviation of the pose, world units and degrees


class _View(NamedTuple):
    """Points seen from a pose."""

    local: torch.Tensor  # (n, p, 3) points in this camera's frame
    inverse_depth: torch.Tensor  # (n, p)
    residuals: torch.Tensor  # (n, 3, p)
    slope_x: torch.Tensor  # (n, 3, p) of the image, per pixel
    slope_y: torch.Tensor
    weights: torch.Tensor  # (n, p), 0 where the image does not show the point
    cost: torch.Tensor  # (n,) infinite where too little is visible


@torch.no_grad()
def align_to_images(
    camera: Camera, picture: Picture, images: torch.Tensor, c2w: torch.Tensor, *, blur_px: float, steps: int
) -> AlignedPoses:
    """Move poses until images agree with pictures that were rendered at them.

    Args:
        camera: of pictures and images, in their pixels.
        picture: rendered at `c2w`.
        images: (n, 3, h, w) float in [0, 1]; mean colour and contrast do not count.
        c2w: (n, 4, 4) float32.
        blur_px: standard deviation of the Gaussian blur of both; a pose may be wrong by some multiples of it.
        steps: of Levenberg and Marquardt.
    Returns:
        AlignedPoses; a pose from where the image shows too little of the points, or that is not finite, stays.
    """
    wanted = normalised(blurred(picture.rgb, blur_px)).flatten(2)
    image = normalised(blurred(images, blur_px))
    layers = torch.cat([image, *_slopes(image)], dim=1)
    turn = torch.eye(3, device=c2w.device).expand(len(c2w), 3, 3)  # relative to the picture's camera
    move = torch.zeros(len(c2w), 3, device=c2w.device)
    view = _look(camera, picture, layers, wanted, turn, move)
    damping = torch.full((len(c2w),), _DAMPING, dtype=torch.float64, device=c2w.device)
    for _ in range(steps):
        hessian, gradient = _normal_equations(camera, view)
        step = _solve(hessian, gradient, damping)
        new_turn, new_move = turn @ so3_exp(step[:, :3]), move + (turn @ step[:, 3:, None])[..., 0]
        new = _look(camera, picture, layers, wanted, new_turn, new_move)
        is_better = (new.cost < view.cost) & torch.isfinite(view.cost)
        damping = torch.where(is_better, damping * _LESS, damping * _MORE).clamp(1e-6, 1e6)
        turn, move = _chosen(is_better, new_turn, turn), _chosen(is_better, new_move, move)
        view = _View(*(_chosen(is_better, a, b) for a, b in zip(new, view, strict=True)))
    rotation, centre = c2w[:, :3, :3], c2w[:, :3, 3]
    end = make_c2w(rotation @ turn, centre + (rotation @ move[..., None])[..., 0])
    return AlignedPoses(end, view.cost, _sigma(camera, view))


def _look(
    camera: Camera,
    picture: Picture,
    layers: torch.Tensor,
    wanted: torch.Tensor,
    turn: torch.Tensor,
    move: torch.Tensor,
) -> _View:
    """Points seen from poses relative to the picture's: `layers` (n, 9, h, w) are the image and its slopes."""
    local = (picture.points - move[:, None]) @ turn
    x, y, z = local.unbind(dim=-1)
    inverse_depth = 1 / z.clamp(min=1e-6)
    u, v = camera.fx * x * inverse_depth + camera.cx, camera.fy * y * inverse_depth + camera.cy
    grid = torch.stack([2 * u / camera.width - 1, 2 * v / camera.height - 1], dim=-1)[:, :, None]
    read = functional.grid_sample(layers, grid, padding_mode="border", align_corners=False)[..., 0]
    is_seen = (z > 0) & (u > _MARGIN_PX) & (u < camera.width - _MARGIN_PX)
    is_seen = is_seen & (v > _MARGIN_PX) & (v < camera.height - _MARGIN_PX)
    weights = picture.weights * is_seen
    residuals = read[:, :3] - wanted
    total, known = weights.sum(dim=1), picture.weights.sum(dim=1)
    cost = (huber(residuals).mean(dim=1) * weights).sum(dim=1) / total.clamp(min=1e-9)
    is_visible = torch.isfinite(cost) & (total > _LEAST_VISIBLE * known)
    return _View(
        local, inverse_depth, residuals, read[:, 3:6], read[:, 6:], weights, cost.masked_fill(~is_visible, math.inf)
    )


def _pulls(camera: Camera, view: _View) -> tuple[torch.Tensor, torch.Tensor]:
    """J^T W J (n, 6, 6), and each point's part (n, p, 6) of J^T W r, for turns and moves in the camera's own axes."""
    x, y, _ = view.local.unbind(dim=-1)
    inverse, zero = view.inverse_depth, torch.zeros_like(x)
    du = camera.fx * torch.stack([inverse, zero, -x * inverse * inverse], dim=-1)  # (n, p, 3): du/dX
    dv = camera.fy * torch.stack([zero, inverse, -y * inverse * inverse], dim=-1)
    du, dv = (torch.cat([torch.linalg.cross(d, view.local), -d], dim=-1) for d in (du, dv))  # X' = X - w x X - t
    jacobian = view.slope_x[..., None] * du[:, None] + view.slope_y[..., None] * dv[:, None]
    weights = view.weights[:, None] * (_HUBER_DELTA / view.residuals.abs().clamp(min=_HUBER_DELTA))
    weighted = jacobian * weights[..., None]
    hessian = weighted.flatten(1, 2).transpose(1, 2) @ jacobian.flatten(1, 2)
    return hessian.double(), (weighted * view.residuals[..., None]).sum(dim=1)


def _normal_equations(camera: Camera, view: _View) -> tuple[torch.Tensor, torch.Tensor]:
    """J^T W J (n, 6, 6) and J^T W r (n, 6), in float64."""
    hessian, pulls = _pulls(camera, view)
    return hessian, pulls.sum(dim=1).double()


def _solve(hessian: torch.Tensor, gradient: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
    """(n, 6) float32 damped step; zero where there is none."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    damped = hessian + torch.diag_embed(damping[:, None] * diagonal + 1e-12)
    step, _ = torch.linalg.solve_ex(damped, -gradient[..., None])
    return torch.nan_to_num(step[..., 0], nan=0.0, posinf=0.0, neginf=0.0).float()


def _sigma(camera: Camera, view: _View) -> torch.Tensor:
    """Standard deviations (n, 2) of translation and rotation; large where the image says nothing."""
    hessian, pulls = _pulls(camera, view)
    rows, cols = (_PARTS * torch.arange(size, device=pulls.device) // size for size in (camera.height, camera.width))
    part = (_PARTS * rows[:, None] + cols).flatten()
    parts = pulls.new_zeros(len(pulls), _PARTS**2, 6).index_add_(1, part, pulls).double()
    unit = (hessian.diagonal(dim1=1, dim2=2) + 1e-30).rsqrt()  # so that metres and radians count alike
    scales = unit[:, :, None] * unit[:, None, :]
    eye = torch.eye(6, dtype=hessian.dtype, device=hessian.device)
    inverse, _ = torch.linalg.inv_ex(hessian * scales + _FLOOR * eye)
    inverse = inverse * scales
    variances = (inverse @ parts.transpose(1, 2) @ parts @ inverse).diagonal(dim1=1, dim2=2)
    sigma = torch.stack([variances[:, 3:].sum(dim=1), variances[:, :3].sum(dim=1)], dim=1).clamp(min=0).sqrt()
    sigma = torch.nan_to_num(sigma, nan=_UNKNOWN, posinf=_UNKNOWN).clamp(_LEAST_SIGMA, _UNKNOWN)
    tells = torch.isfinite(view.cost) & (hessian.diagonal(dim1=1, dim2=2).amin(dim=1) > _LEAST_SLOPE)
    sigma = torch.where(tells[:, None], sigma, torch.full_like(sigma, _UNKNOWN))
    return torch.stack([sigma[:, 0], torch.rad2deg(sigma[:, 1])], dim=1).float()


def _chosen(choice: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(choice.reshape(-1, *[1] * (a.dim() - 1)), a, b)


def huber(residuals: torch.Tensor) -> torch.Tensor:
    """Huber's distance of differences between normalised colours, element by element."""
    return functional.huber_loss(residuals, torch.zeros_like(residuals), reduction="none", delta=_HUBER_DELTA)


def normalised(images: torch.Tensor) -> torch.Tensor:
    """(n, 3, h, w) without the mean colour, and with a standard deviation of 1 over all channels."""
    overall = images.mean(dim=(1, 2, 3), keepdim=True)
    contrast = (images - overall).square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return (images - images.mean(dim=(2, 3), keepdim=True)) / (contrast + _LEAST_CONTRAST)


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur of (n, 3, h, w) with replicated borders; `sigma` in px."""
    reach = max(1, math.ceil(2.5 * sigma))
    x = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = functional.pad(images, (reach,) * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)


def _slopes(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Central differences (n, 3, h, w) along x and y."""
    padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
    return (
        0.5 * (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]),
        0.5 * (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]),
    )
