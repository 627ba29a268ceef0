"""V(s), its average over updates, and how well it says what is to come."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from trpo.config import Config
from trpo.networks.mlp import MLP
from trpo.networks.network import BodyAndHead, build_network
from trpo.networks.parameters import FlatModule, FlatParameters
from trpo.runtime.reduction import AllSum, one_process


class ValueFunction(FlatModule):
    """V(s) for normalised observations, in units of scaled reward."""

    def __init__(self, network: MLP | BodyAndHead):
        super().__init__()
        self.network = network
        self.theta = FlatParameters(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # As `Policy.__reduce__`.
        return type(self), (copy.deepcopy(self.network),)

    @property
    def compiled(self) -> bool:
        """Whether compiled code does the network."""
        return isinstance(self.network, MLP) and self.network.compiled

    def forward(self, obs: Tensor) -> Tensor:
        """[B, D] → [B]."""
        return self.network(obs).squeeze(-1)


class AverageValue:
    """V̄(s): a value function whose θ is the exponential moving average of V's over updates (after Polyak & Juditsky
    1992, whose average is uniform).

    A fit follows the noise of its batch as far as V can bend. From one batch to the next that noise is another and
    averages out, while what V has learned stays. Advantages and targets are estimated with V̄; fits go on from V.

    Args:
        value: V before its first fit, which V̄ then equals.
        decay: of the average per update, in [0, 1); 0: V̄ is V as last fitted.
    """

    def __init__(self, value: ValueFunction, decay: float):
        self.decay = decay
        self.updates = 0
        self._value = copy.deepcopy(value)

    @torch.no_grad()
    def __call__(self, obs: Tensor) -> Tensor:
        """[B, D] → [B]."""
        return self._value(obs)

    @torch.no_grad()
    def update(self, value: ValueFunction) -> None:
        """Takes in V as now fitted. The first 1/(1 − decay) fits count alike, the untrained V not at all."""
        self.updates += 1
        weight = max(1 - self.decay, 1 / self.updates)
        self._value.theta.assign_(torch.lerp(self._value.theta.vector, value.theta.vector, weight))

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "theta": self._value.theta.vector.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self._value.theta.assign_(state["theta"])


def build_value(config: Config, obs_dim: int, *, generator: torch.Generator, device: torch.device) -> ValueFunction:
    """A freshly initialised value function for flat observations [D]."""
    settings = config.value
    network = build_network(
        obs_dim,
        1,
        settings,
        key="value",
        head_scale=1.0,
        dtype=getattr(torch, config.dtype),
        device=device,
        generator=generator,
    )
    return ValueFunction(network)


@torch.no_grad()
def mean_squared_error(value: ValueFunction, obs: Tensor, target: Tensor, all_sum: AllSum = one_process) -> float:
    """E[(V(s) − target)²] over all processes."""
    total, count = squared_error(value, obs, target, all_sum).tolist()
    return total / count


@torch.no_grad()
def squared_error(value: ValueFunction, obs: Tensor, target: Tensor, all_sum: AllSum) -> Tensor:
    """Σ (V(s) − target)² and the number of samples, over all processes: [2] float64."""
    error = (value(obs) - target).square().sum(dtype=torch.float64)
    return all_sum(torch.stack([error, error.new_full((), len(obs))]))


def explained_variance(prediction: Tensor, target: Tensor, all_sum: AllSum = one_process) -> float:
    """1 − Var[target − prediction] / Var[target]: 1 is perfect, 0 a constant's; NaN for constant targets."""
    error, target = (target - prediction).double(), target.double()
    count = torch.full_like(target.sum(), float(len(target)))
    sums = torch.stack([error.sum(), error.square().sum(), target.sum(), target.square().sum(), count])
    e1, e2, t1, t2, n = all_sum(sums).tolist()
    variance = t2 / n - (t1 / n) ** 2
    return 1 - (e2 / n - (e1 / n) ** 2) / variance if variance > 1e-12 * max(t2 / n, 1e-300) else math.nan
