"""How wrong an answer is likely to be: from the network's own spread and from how far its pose is from another.

    log sigma = w . [1, log(d_t + e), log(d_R + e), log sigma_net]        one w for translation, one for rotation

d_t and d_R are the distance (in units of the pose frame) and the angle (radians) from the predicted pose to

- the nearest training pose, where the head regresses it: a regressor knows the places it was trained at, and is worse
  between and beside them;
- the head's own pose, where it is solved for from the scene that the image shows: the two are told by different parts
  of the network, and where they disagree one of them is wrong. (Distances to training poses say nothing there.)

The weights are fitted (Laplace likelihood) on fresh random views from all distances; intervals are scaled by conformal
quantiles on other views.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from posemap_fast.apr import PoseFrame
from posemap_fast.geometry import rotation_angle_deg

__all__ = ["ErrorModel", "scaled_sigma"]

_LEVEL = "0.68"  # that the sigma of an answer stands for
_FLOOR = 0.02  # e: distances below it are all alike
_MAX_SUPPORT = 1024  # training poses kept, evenly spread
_CHUNK = 64  # poses compared with the training poses at a time
_FIT_STEPS = 200
_RIDGE = 1e-3  # on the weights: their inputs may be collinear


def scaled_sigma(factors: Mapping[str, Mapping[str, float]], sigma: torch.Tensor) -> tuple[float | None, float | None]:
    """Sizes that 68 % of errors are meant to stay below: sigma (2,) times the factors of that level; None without."""
    expected = sigma.tolist()
    t, r = (factors.get(key, {}).get(_LEVEL) for key in ("t", "r"))
    return (None, None) if t is None or r is None else (t * expected[0], r * expected[1])


@dataclass(frozen=True)
class ErrorModel:
    """Expected errors of answers; make it with `fit`, store it with `to_dict` and `support`.

    Attributes:
        support: (m, 4, 4) float32 training poses, world frame; with m = 0 distances are those to the head's pose.
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
        head_c2w: torch.Tensor,
        log_sigma: torch.Tensor,
        errors: torch.Tensor,
    ) -> ErrorModel:
        """Model of the errors of some answers.

        Args:
            train_c2w: (m, 4, 4) training poses; m = 0: the poses were not regressed.
            frame: of the network.
            c2w: (n, 4, 4) answers.
            head_c2w: (n, 4, 4) what the network's head alone says.
            log_sigma: (n, 2) of the network, see `PoseHead.log_sigma`, or other evidence.
            errors: (n, 2) true errors in world units and degrees.
        """
        step = max(1, -(-len(train_c2w) // _MAX_SUPPORT))
        blank = cls(train_c2w[::step].float().cpu(), torch.zeros(2, 4, dtype=torch.float64), frame.scale)
        inputs = blank._inputs(c2w, head_c2w, log_sigma)  # (n, 2, 4)
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

    def sigma(self, c2w: torch.Tensor, head_c2w: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
        """(n, 2) expected errors of answers (n, 4, 4), before calibration: world units and degrees; on the CPU."""
        return (self._inputs(c2w, head_c2w, log_sigma) * self.weights).sum(dim=2).exp()

    def first_sigma(
        self,
        factors: Mapping[str, Mapping[str, float]],
        c2w: torch.Tensor,
        head_c2w: torch.Tensor,
        log_sigma: torch.Tensor,
    ) -> tuple[float | None, float | None]:
        """Sizes that 68 % of errors of the first answer are meant to stay below, in world units and degrees.

        Args:
            factors: of the calibration: `t`, `r` -> level, as text -> factor; None is told where that level is missing.
            c2w, head_c2w, log_sigma: as of `sigma`, n >= 1.
        """
        return scaled_sigma(factors, self.sigma(c2w[:1], head_c2w[:1], log_sigma[:1])[0])

    def distances(self, c2w: torch.Tensor, head_c2w: torch.Tensor) -> torch.Tensor:
        """(n, 2) d_t and d_R of answers (n, 4, 4), for a head that said `head_c2w`: pose-frame units and radians."""
        c2w = c2w.detach().float().cpu()
        if len(self.support) == 0:
            return self._apart(c2w, head_c2w.detach().float().cpu())
        found = [self._nearest(part) for part in c2w.split(_CHUNK)]
        return torch.cat(found) if found else torch.zeros(0, 2, dtype=torch.float64)

    def _apart(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """(..., 2) distance and angle between poses (..., 4, 4)."""
        distance = (a[..., :3, 3].double() - b[..., :3, 3].double()).norm(dim=-1) / self.scale
        angle = torch.deg2rad(rotation_angle_deg(a[..., :3, :3], b[..., :3, :3])).double()
        return torch.stack([distance, angle], dim=-1)

    def _nearest(self, c2w: torch.Tensor) -> torch.Tensor:
        apart = self._apart(c2w[:, None], self.support)  # (n, m, 2)
        return apart[torch.arange(len(c2w)), apart.sum(dim=2).argmin(dim=1)]

    def _inputs(self, c2w: torch.Tensor, head_c2w: torch.Tensor, log_sigma: torch.Tensor) -> torch.Tensor:
        """(n, 2, 4): for translation and rotation."""
        far = (self.distances(c2w, head_c2w) + _FLOOR).log()
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
