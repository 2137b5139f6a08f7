"""How wrong an answer is likely to be: from the network's own spread and from how far its pose is from training poses.

    log sigma = w . [1, log(d_t + e), log(d_R + e), log sigma_net]        one w for translation, one for rotation

d_t and d_R are the distance (in units of the pose frame) and the angle (radians) from the predicted pose to the nearest
training pose: a regressor knows the places it was trained at, and is worse between and beside them. One that solves
for the pose from the scene that it sees is not, and is fitted without them. The weights are fitted (Laplace
likelihood) on fresh random views from all distances; intervals are scaled by conformal quantiles on other views.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from posemap_fast.apr import PoseFrame
from posemap_fast.geometry import rotation_angle_deg

__all__ = ["ErrorModel"]

_FLOOR = 0.02  # e: distances below it are all alike
_MAX_SUPPORT = 1024  # training poses kept, evenly spread
_CHUNK = 64  # poses compared with the training poses at a time
_FIT_STEPS = 200
_RIDGE = 1e-3  # on the weights: their inputs may be collinear


@dataclass(frozen=True)
class ErrorModel:
    """Expected errors of answers; make it with `fit`, store it with `to_dict` and `support`.

    Attributes:
        support: (m, 4, 4) float32 training poses, world frame.
        weights: (2, 4) float64, for translation and rotation.
        scale: world units per unit of the pose frame.
    """

    support: torch.Tensor
    weights: torch.Tensor
    scale: float

    @classmethod
    def fit(
        cls,
        train_c2w: torch.Tensor,
        frame: PoseFrame,
        c2w: torch.Tensor,
        log_sigma: torch.Tensor,
        errors: torch.Tensor,
        with_distances: bool = True,
    ) -> ErrorModel:
        """Model of the errors of some answers.

        Args:
            train_c2w: (m, 4, 4) training poses, m >= 1.
            frame: of the network.
            c2w: (n, 4, 4) answers.
            log_sigma: (n, 2) of the network, see `PoseHead.log_sigma`.
            errors: (n, 2) true errors in world units and degrees.
            with_distances: False: d_t and d_R have weight 0.
        """
        step = -(-len(train_c2w) // _MAX_SUPPORT)
        blank = cls(train_c2w[::step].float().cpu(), torch.zeros(2, 4, dtype=torch.float64), frame.scale)
        inputs = blank._inputs(c2w, log_sigma)  # (n, 2, 4)
        if not with_distances:
            inputs[..., 1:3] = 0  # no gradient: their weights stay 0
        wanted = errors.double().cpu().clamp(min=1e-9)
        weights = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=_FIT_STEPS, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            logs = (inputs * weights).sum(dim=2)
            loss = (wanted * torch.exp(-logs) + logs).mean() + _RIDGE * weights[:, 1:].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return cls(blank.support, weights.detach(), frame.scale)

    def sigma(self, c2w: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
        """(n, 2) expected errors of answers (n, 4, 4), before calibration: world units and degrees; on the CPU."""
        return (self._inputs(c2w, log_sigma) * self.weights).sum(dim=2).exp()

    def novelty(self, c2w: torch.Tensor) -> torch.Tensor:
        """(n, 2) distance and angle (pose-frame units, radians) from poses (n, 4, 4) to the nearest training pose."""
        found = [self._novelty(part) for part in c2w.detach().float().cpu().split(_CHUNK)]
        return torch.cat(found) if found else torch.zeros(0, 2, dtype=torch.float64)

    def _novelty(self, c2w: torch.Tensor) -> torch.Tensor:
        distance = torch.cdist(c2w[:, :3, 3].double(), self.support[:, :3, 3].double()) / self.scale
        shape = (len(c2w), len(self.support), 3, 3)
        a, b = c2w[:, None, :3, :3].expand(shape), self.support[None, :, :3, :3].expand(shape)
        angle = torch.deg2rad(rotation_angle_deg(a.reshape(-1, 3, 3), b.reshape(-1, 3, 3))).double().view(shape[:2])
        nearest = (distance + angle).argmin(dim=1, keepdim=True)
        return torch.cat([distance.gather(1, nearest), angle.gather(1, nearest)], dim=1)

    def _inputs(self, c2w: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
        """(n, 2, 4): for translation and rotation."""
        far = (self.novelty(c2w) + _FLOOR).log()
        ones = torch.ones_like(far[:, :1])
        own = log_sigma.detach().double().cpu()
        return torch.stack([torch.cat([ones, far, own[:, k : k + 1]], dim=1) for k in range(2)], dim=1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, but for the support."""
        return {"weights": self.weights.tolist(), "scale": self.scale}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], support: torch.Tensor) -> ErrorModel:
        """Inverse of `to_dict`."""
        return cls(support, torch.tensor(values["weights"], dtype=torch.float64), float(values["scale"]))
