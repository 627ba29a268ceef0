"""V fitted by minibatches and Adam."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from trpo.config import AdamFitConfig
from trpo.native import NativeMlp, adam_step, takes_vectors
from trpo.networks.linearization import Linearization
from trpo.networks.mlp import MLP, ClosedForm
from trpo.networks.network import in_closed_form, linearize
from trpo.runtime.cuda_graph import Recorded, Tensors, can_record
from trpo.runtime.reduction import AllSum, one_process, total_count
from trpo.value.fit import FitReport
from trpo.value.function import ValueFunction, squared_error


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
        self._recorded = Recorded(self._blind_epoch, first=True, after=settings.epochs)

    def fit(self, value: ValueFunction, obs: Tensor, target: Tensor, *, progress: float) -> FitReport:
        return self.start(value, obs, target, progress=progress)()

    def start(self, value: ValueFunction, obs: Tensor, target: Tensor, *, progress: float) -> Callable[[], FitReport]:
        """`fit` but for the look at how it went, which what is returned takes: a GPU is waited for only then."""
        # Less to do per operation than with `no_grad`, which counts where operations are this small. But only in the
        # latter can autograd be allowed, which other networks need.
        with torch.inference_mode(in_closed_form(value.network)), torch.no_grad():
            return self._start(value, obs, target, self.learning_rate(progress))

    def _start(
        self, value: ValueFunction, obs: Tensor, target: Tensor, learning_rate: float
    ) -> Callable[[], FitReport]:
        if len(self._linearizations) > 2:  # batches vary in size where rows are resets, and each has sizes of its own
            self._linearizations.clear()
        before = squared_error(value, obs, target, self.all_sum)
        theta, moments = value.theta.vector.clone(), self._adam.state_dict()
        # Counted over all processes, so that each takes the same number of steps whatever its share.
        total = total_count(len(obs), self.all_sum)
        batches = max(1, int(total) // self.settings.minibatch_size)
        sizes = [len(rows) for rows in target.tensor_split(batches)]
        mlp = value.network if isinstance(value.network, MLP) and in_closed_form(value.network) else None
        if self.all_sum is not one_process:
            mlp = None  # neither compiled code nor a graph sums over processes on the way
        epoch = self._replayed_epoch if mlp is not None and can_record(obs.device) else self._epoch
        counts = self.all_sum(torch.tensor(sizes, dtype=torch.float64)).tolist()
        wanted = target.unsqueeze(-1)
        orders = (self._order(len(obs), obs.device) for _ in range(self.settings.epochs))
        native = None if mlp is None else mlp.native
        steps = self._adam.all_at_once(native, value.theta.vector, obs, wanted, orders, sizes, learning_rate)
        if not steps:
            # Gathered once an epoch: minibatches are then views.
            gathered = ((obs.index_select(0, order), wanted.index_select(0, order)) for order in orders)
            steps = sum(epoch(value, x, y, counts, learning_rate) for x, y in gathered)
        after = squared_error(value, obs, target, self.all_sum)
        looked_at = torch.cat([before, after, self._adam.finite().to(after)])

        def finish() -> FitReport:
            sum_before, count, sum_after, _, moments_are_finite = looked_at.tolist()
            loss_before, loss_after = sum_before / count, sum_after / count
            if math.isfinite(loss_after) and moments_are_finite:
                return FitReport(loss_before, loss_after, steps, refused=0)
            value.theta.assign_(theta)
            self._adam.load_state_dict(moments)
            return FitReport(loss_before, loss_before, steps, refused=steps, nonfinite=True)

        return finish

    def _order(self, rows: int, device: torch.device) -> Tensor:
        """A permutation of so many rows, another at every call."""
        if device.type != "cuda":
            return torch.randperm(rows, generator=self.generator).to(device)
        # On the CPU it would take twenty times as long and then be waited for.
        seed = int(torch.randint(1 << 62, (), generator=self.generator))
        return torch.randperm(rows, generator=torch.Generator(device).manual_seed(seed), device=device)

    def _epoch(
        self, value: ValueFunction, obs: Tensor, target: Tensor, counts: Sequence[float], learning_rate: float
    ) -> int:
        """Steps on minibatches of obs [B, D] and target [B, 1] in order, of so many samples of all processes together.

        Returns:
            The number of steps.
        """
        steps = 0
        for x, y, count in zip(obs.tensor_split(len(counts)), target.tensor_split(len(counts)), counts, strict=True):
            if count:  # processes with less than a sample a minibatch all put theirs in the first ones
                gradient = self._gradient(value, x, y, count, self._linearizations)
                self._adam.step(value.theta.vector, gradient, learning_rate)
                steps += 1
        return steps

    def _replayed_epoch(
        self, value: ValueFunction, obs: Tensor, target: Tensor, counts: Sequence[float], learning_rate: float
    ) -> int:
        """The same, recorded."""
        self._recorded(value, len(counts), obs, target, *self._adam.ahead(len(counts), learning_rate))
        return len(counts)

    def _blind_epoch(
        self, value: ValueFunction, batches: int, obs: Tensor, target: Tensor, steps: Tensor, learning_rate: Tensor
    ) -> Tensors:
        """What is recorded; the last two as of `Adam.ahead`."""
        made: dict[int, ClosedForm] = {}  # here, since a recording has no part in what others free
        for x, y in zip(obs.tensor_split(batches), target.tensor_split(batches), strict=True):
            gradient = self._gradient(value, x, y, len(x), made)
            self._adam.fused(value.theta.vector, gradient, steps, learning_rate)
        return ()

    def _gradient(
        self, value: ValueFunction, obs: Tensor, target: Tensor, count: float, made: dict[int, ClosedForm]
    ) -> Tensor:
        """∇_θ of the mean squared error [P] over `count` samples, of which these are this process's.

        `made` holds work space by their number.
        """
        linearization: Linearization | None = made.get(len(obs))
        if isinstance(linearization, ClosedForm):
            linearization.move(obs)
        else:
            linearization = linearize(value.network, obs)
            if isinstance(linearization, ClosedForm):
                made[len(obs)] = linearization
        error = linearization.output.sub_(target).mul_(2 / count)
        return self.all_sum(linearization.vjp(error))

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

    def ahead(self, steps: int, learning_rate: float) -> tuple[Tensor, Tensor]:
        """For so many of `fused`, which are to come: the steps before them [], counted on by each, and α []."""
        before = self._mean.new_full((), float(self.steps), dtype=torch.float32)
        self.steps += steps
        return before, before.new_full((), learning_rate)

    def fused(self, theta: Tensor, gradient: Tensor, steps: Tensor, learning_rate: Tensor) -> None:
        """`step` by torch's own, which is told all numbers on the device: one kernel, and one that counts."""
        beta1, beta2 = self.betas
        adam(
            *([theta], [gradient], [self._mean], [self._square], [], [steps]),
            fused=True,
            beta1=beta1,
            beta2=beta2,
            lr=learning_rate,
            eps=self.epsilon,
            weight_decay=0.0,
            amsgrad=False,
            maximize=False,
        )

    def all_at_once(
        self,
        native: NativeMlp | None,
        theta: Tensor,
        x: Tensor,
        y: Tensor,
        orders: Iterable[Tensor],
        sizes: Sequence[int],
        learning_rate: float,
    ) -> int:
        """All of `step`'s of a fit in one call, on E|f(x) − y|² of minibatches of these sizes in each of the orders.

        Returns:
            The number of steps; 0 where compiled code cannot do it, and `orders` was not touched.
        """
        if native is None or not native.fits_to(x, y, theta, self._mean, self._square):
            return 0
        order = torch.stack([*orders])
        rows = [*sizes] * len(order)
        epsilons, rates = zip(*(self._next(learning_rate) for _ in rows), strict=True)
        vectors = (theta, self._mean, self._square)
        native.adam(x, y, order.view(-1), rows, *vectors, betas=self.betas, epsilons=epsilons, rates=rates)
        return len(rows)

    def _next(self, learning_rate: float) -> tuple[float, float]:
        """ε and α of the next step with both sides of its fraction times √(1 − β₂ᵗ): a pass less over the vector."""
        self.steps += 1
        beta1, beta2 = self.betas
        correction = math.sqrt(1 - beta2**self.steps)
        return self.epsilon * correction, learning_rate * correction / (1 - beta1**self.steps)

    def finite(self) -> Tensor:
        """Whether all moments are: [1] bool."""
        return (self._mean.isfinite() & self._square.isfinite()).all().unsqueeze(0)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "mean": self._mean.clone(), "square": self._square.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self._mean.copy_(state["mean"])
        self._square.copy_(state["square"])
