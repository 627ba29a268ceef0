"""The value function V(s), the two ways it is fitted to return targets, and its average over updates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trpo.config import AdamFitConfig, Config, GaussNewtonFitConfig
from trpo.native import NativeMlp, adam_step, takes_vectors
from trpo.natural_gradient.conjugate_gradient import CGStatus, conjugate_gradient
from trpo.networks import MLP, BodyAndHead, ClosedForm, Linearization, build_network, in_closed_form, linearize
from trpo.parameters import FlatParameters
from trpo.reduction import AllSum, one_process, total_count


class ValueFunction(nn.Module):
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
    """V̄(s): a value function whose θ is the exponential moving average of V's over updates (Polyak & Juditsky 1992).

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


@dataclass(frozen=True, slots=True)
class FitReport:
    """How a fit went; losses are mean squared errors over the whole batch, before and after."""

    loss_before: float
    loss_after: float
    steps: int  # tried, the refused ones included
    refused: int  # steps undone because a value was not finite or the loss did not fall
    nonfinite: bool = False  # whether NaN or infinity was why


class ValueFit(Protocol):
    """A way to move V towards targets. State (moments, if any) survives from update to update and is checkpointed."""

    def fit(self, value: ValueFunction, obs: Tensor, target: Tensor, *, progress: float) -> FitReport:
        """Fits V(obs [B, D]) to target [B]; `progress` ∈ [0, 1] drives schedules."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class AdamFit:
    """Minibatch Adam on the squared error (Kingma & Ba 2015). A fit that ends non-finite is undone, moments too."""

    def __init__(
        self,
        settings: AdamFitConfig,
        value: ValueFunction,
        *,
        generator: torch.Generator,
        learning_rate: Callable[[float], float],
        all_sum: AllSum = one_process,
    ):
        self.settings = settings
        self.generator = generator
        self.learning_rate = learning_rate
        self.all_sum = all_sum
        self._adam = Adam(value.theta.vector)
        self._linearizations: dict[int, ClosedForm] = {}  # work space by minibatch size; a fit has two at most

    def fit(self, value: ValueFunction, obs: Tensor, target: Tensor, *, progress: float) -> FitReport:
        # Less to do per operation than with `no_grad`, which counts where operations are this small. But only in the
        # latter can autograd be allowed, which other networks need.
        with torch.inference_mode(in_closed_form(value.network)), torch.no_grad():
            return self._fit(value, obs, target, progress)

    def _fit(self, value: ValueFunction, obs: Tensor, target: Tensor, progress: float) -> FitReport:
        learning_rate = self.learning_rate(progress)
        if len(self._linearizations) > 2:  # batches vary in size where rows are resets, and each has sizes of its own
            self._linearizations.clear()
        before = mean_squared_error(value, obs, target, self.all_sum)
        theta, moments = value.theta.vector.clone(), self._adam.state_dict()
        steps = 0
        # Counted over all processes, so that each takes the same number of steps whatever its share.
        total = total_count(len(obs), self.all_sum)
        batches = max(1, int(total) // self.settings.minibatch_size)
        sizes = [len(rows) for rows in target.tensor_split(batches)]
        mlp = value.network if isinstance(value.network, MLP) and in_closed_form(value.network) else None
        # Compiled code sums nothing over processes on the way.
        native = mlp.native if mlp is not None and self.all_sum is one_process else None
        counts = self.all_sum(torch.tensor(sizes, dtype=torch.float64)).tolist()
        for _ in range(self.settings.epochs):
            order = torch.randperm(len(obs), generator=self.generator).to(obs.device)
            # Gathered once an epoch: minibatches are then views.
            shuffled, wanted = obs[order], target[order, None]
            if native and self._adam.epoch(native, value.theta.vector, shuffled, wanted, sizes, learning_rate):
                steps += batches
                continue
            minibatches = zip(shuffled.tensor_split(batches), wanted.tensor_split(batches), strict=True)
            for (x, y), count in zip(minibatches, counts, strict=True):
                if count:  # processes with less than a sample a minibatch all put theirs in the first ones
                    self._step(value, x, y, count, learning_rate)
                    steps += 1
        after = mean_squared_error(value, obs, target, self.all_sum)
        if math.isfinite(after):
            return FitReport(before, after, steps, refused=0)
        value.theta.assign_(theta)
        self._adam.load_state_dict(moments)
        return FitReport(before, before, steps, refused=steps, nonfinite=True)

    def _step(self, value: ValueFunction, obs: Tensor, target: Tensor, count: float, learning_rate: float) -> None:
        """One step on a minibatch, obs [b, D] and target [b, 1], of `count` samples, all processes together."""
        linearization: Linearization | None = self._linearizations.get(len(obs))
        if isinstance(linearization, ClosedForm):
            linearization.move(obs)
        else:
            linearization = linearize(value.network, obs)
            if isinstance(linearization, ClosedForm):
                self._linearizations[len(obs)] = linearization
        error = linearization.output.sub_(target).mul_(2 / count)
        gradient = self.all_sum(linearization.vjp(error))
        self._adam.step(value.theta.vector, gradient, learning_rate)

    def state_dict(self) -> dict[str, Any]:
        return self._adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._adam.load_state_dict(state)


class Adam:
    """Adam (Kingma & Ba 2015, Alg. 1) on one flat vector θ [P]: `torch.optim.Adam` without its overhead per step.

    Its `step` costs several times the arithmetic on a vector of this size, and a fit takes hundreds of steps.
    """

    def __init__(self, theta: Tensor, *, betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-5):
        self.betas = betas
        self.epsilon = epsilon
        self.steps = 0
        self._mean = torch.zeros_like(theta)  # of the gradient
        self._square = torch.zeros_like(theta)  # of its square, both decaying

    def step(self, theta: Tensor, gradient: Tensor, learning_rate: float) -> None:
        """θ ← θ − α m̂ / (√v̂ + ε), in place."""
        beta1, beta2 = self.betas
        epsilon, rate = self._next(learning_rate)
        if takes_vectors(theta, gradient, self._mean, self._square):
            adam_step(theta, gradient, self._mean, self._square, betas=self.betas, epsilon=epsilon, rate=rate)
            return
        self._mean.lerp_(gradient, 1 - beta1)
        self._square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        theta.addcdiv_(self._mean, self._square.sqrt().add_(epsilon), value=-rate)

    def epoch(
        self, native: NativeMlp, theta: Tensor, x: Tensor, y: Tensor, rows: Sequence[int], learning_rate: float
    ) -> bool:
        """All of `step`'s of an epoch in one call, if compiled code can: on E|f(x) − y|² of so many `rows` each."""
        if not native.fits_to(x, y, theta, self._mean, self._square):
            return False
        epsilons, rates = zip(*(self._next(learning_rate) for _ in rows), strict=True)
        vectors = (theta, self._mean, self._square)
        native.adam(x, y, rows, *vectors, betas=self.betas, epsilons=epsilons, rates=rates)
        return True

    def _next(self, learning_rate: float) -> tuple[float, float]:
        """ε and α of the next step with both sides of its fraction times √(1 − β₂ᵗ): a pass less over the vector."""
        self.steps += 1
        beta1, beta2 = self.betas
        correction = math.sqrt(1 - beta2**self.steps)
        return self.epsilon * correction, learning_rate * correction / (1 - beta1**self.steps)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "mean": self._mean.clone(), "square": self._square.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self._mean.copy_(state["mean"])
        self._square.copy_(state["square"])


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


@torch.no_grad()
def mean_squared_error(value: ValueFunction, obs: Tensor, target: Tensor, all_sum: AllSum = one_process) -> float:
    """E[(V(s) − target)²] over all processes."""
    error = (value(obs) - target).square().sum(dtype=torch.float64)
    total, count = all_sum(torch.stack([error, error.new_full((), len(obs))])).tolist()
    return total / count


def explained_variance(prediction: Tensor, target: Tensor, all_sum: AllSum = one_process) -> float:
    """1 − Var[target − prediction] / Var[target]: 1 is perfect, 0 a constant's; NaN for constant targets."""
    error, target = (target - prediction).double(), target.double()
    count = torch.full_like(target.sum(), float(len(target)))
    sums = torch.stack([error.sum(), error.square().sum(), target.sum(), target.square().sum(), count])
    e1, e2, t1, t2, n = all_sum(sums).tolist()
    variance = t2 / n - (t1 / n) ** 2
    return 1 - (e2 / n - (e1 / n) ** 2) / variance if variance > 1e-12 * max(t2 / n, 1e-300) else math.nan


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
