"""V fitted by damped Gauss-Newton steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trpo.config import GaussNewtonFitConfig
from trpo.natural_gradient.conjugate_gradient import CGStatus, conjugate_gradient
from trpo.networks.network import linearize
from trpo.runtime.reduction import AllSum, one_process, total_count
from trpo.value.fit import FitReport
from trpo.value.function import ValueFunction, mean_squared_error


class GaussNewtonFit:
    """A few damped Gauss-Newton steps on the squared error, with the policy's own Jacobian products and CG.

        (JᵀJ/B + λI) x = −Jᵀe/B,   e = V − target        (Nocedal & Wright 2006, §10.3)

    Each step is halved until the loss on the batch falls, and given up (θ restored bitwise) if it never does.
    """

    def __init__(self, settings: GaussNewtonFitConfig, *, all_sum: AllSum = one_process):
        self.settings = settings
        self.all_sum = all_sum

    @torch.no_grad()
    def fit(self, value: ValueFunction, obs: Tensor, target: Tensor, *, progress: float) -> FitReport:
        count = total_count(len(obs), self.all_sum)
        before = loss = mean_squared_error(value, obs, target, self.all_sum)
        for step in range(1, self.settings.iterations + 1):
            new = self._step(value, obs, target, loss, count)
            if not new < loss:
                return FitReport(before, loss, step, refused=1, nonfinite=not math.isfinite(new))
            loss = new
        return FitReport(before, loss, self.settings.iterations, refused=0)

    def _step(self, value: ValueFunction, obs: Tensor, target: Tensor, loss: float, count: float) -> float:
        """One step; the loss after it. Not below `loss`, or NaN, if the step was refused and undone."""
        linearization = linearize(value.network, obs)
        error = linearization.output.squeeze(-1) - target
        descent = self.all_sum(linearization.vjp(-error.unsqueeze(-1))).div_(count)
        if not math.isfinite(float(descent.norm())):
            return math.nan

        def product(v: Tensor) -> Tensor:
            curvature = self.all_sum(linearization.vjp(linearization.jvp(v))).div_(count)
            return curvature.add_(v, alpha=self.settings.damping)

        cg = conjugate_gradient(product, descent, max_iterations=self.settings.cg_iterations)
        if cg.status is CGStatus.NONFINITE:
            return math.nan
        theta = value.theta.vector.clone()
        for k in range(self.settings.backtracks + 1):
            value.theta.assign_(torch.add(theta, cg.x, alpha=0.5**k))
            new = mean_squared_error(value, obs, target, self.all_sum)
            if new < loss:  # False for NaN
                return new
        value.theta.assign_(theta)
        return new

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
