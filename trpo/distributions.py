"""Action distributions as stateless functions of a parameter array η.

A distribution object holds only static shape. The old policy is therefore one stored tensor η_old [B, K], and all that
TRPO needs of π is a formula in η: log π, its gradient (the score), the KL divergence and its Hessian (the Fisher
metric). Shapes: `B` samples, `K` parameters per sample, `A` action components; any leading shape may stand for `B`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol, Self

import torch
from gymnasium import spaces
from torch import Tensor, nn

from trpo.errors import EnvError
from trpo.native import NativeOrdinal


class Distribution(Protocol):
    """A family π(a | η). All methods are pure; every sample is treated independently."""

    param_dim: int
    action_dim: int
    noise_dim: int  # Z
    action_dtype: torch.dtype | None  # None: the dtype of η

    def on(self, device: torch.device) -> Self:
        """The same family for η on another device."""

    def noise(self, *shape: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws the N(0, 1) numbers behind `sample` for `shape` actions: [*shape, Z]."""

    def sample(self, eta: Tensor, noise: Tensor) -> Tensor:
        """a ~ π(· | η), a deterministic function of η [B, K] and `noise` [B, Z]: actions [B, A]."""

    def mode(self, eta: Tensor) -> Tensor:
        """The action without noise [B, A]: the most likely one, or where actions have an order the mean."""

    def log_prob(self, eta: Tensor, action: Tensor) -> Tensor:
        """log π(a | η) [B], the joint density (or probability) over action components."""

    def score(self, eta: Tensor, action: Tensor) -> Tensor:
        """∇_η log π(a | η) [B, K]."""

    def entropy(self, eta: Tensor) -> Tensor:
        """H(π(· | η)) [B] in nats."""

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """KL(π_p ‖ π_q) [B] in nats, summed over action components (the joint KL)."""

    def metric(self, eta: Tensor) -> Callable[[Tensor], Tensor]:
        """u ↦ M(η) u [B, K]: M = ∇²_q KL(π_η ‖ π_q) at q = η = E[score scoreᵀ], the Fisher information in η.

        What does not depend on u is computed once.
        """


class _NormalNoise:
    """What is random in an action is N(0, 1), so that noise of any family can be coloured in time."""

    noise_dim: int  # Z

    def on(self, device: torch.device) -> Self:
        """See `Distribution.on`."""
        return self

    def noise(self, *shape: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(*shape, self.noise_dim, generator=generator, device=like.device, dtype=like.dtype)


class DiagonalGaussian(_NormalNoise):
    """π(a | η) = N(μ, diag σ²) with η = (μ, log σ), K = 2A."""

    action_dtype: torch.dtype | None = None

    def __init__(self, action_dim: int):
        self.action_dim = self.noise_dim = action_dim
        self.param_dim = 2 * action_dim

    def sample(self, eta: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = eta.chunk(2, -1)
        return torch.addcmul(mean, log_std.exp(), noise)

    def mode(self, eta: Tensor) -> Tensor:
        return eta[..., : self.action_dim]

    def log_prob(self, eta: Tensor, action: Tensor) -> Tensor:
        mean, log_std = eta.chunk(2, -1)
        z = (action - mean) * (-log_std).exp()
        return -(0.5 * z.square() + log_std).sum(-1) - 0.5 * self.action_dim * math.log(2 * math.pi)

    def score(self, eta: Tensor, action: Tensor) -> Tensor:
        mean, log_std = eta.chunk(2, -1)
        inv_std = (-log_std).exp()
        z = (action - mean) * inv_std
        return torch.cat([z * inv_std, z.square() - 1], -1)

    def entropy(self, eta: Tensor) -> Tensor:
        return eta[..., self.action_dim :].sum(-1) + 0.5 * self.action_dim * math.log(2 * math.pi * math.e)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """Σ_a log(σ_q/σ_p) + (σ_p² + (μ_p − μ_q)²) / 2σ_q² − ½, arranged so that it is exactly 0 at p = q."""
        mean_p, log_std_p = p.chunk(2, -1)
        mean_q, log_std_q = q.chunk(2, -1)
        d = log_std_p - log_std_q
        z = (mean_p - mean_q) * (-log_std_q).exp()
        return (0.5 * (torch.expm1(2 * d) + z.square()) - d).sum(-1)

    def metric(self, eta: Tensor) -> Callable[[Tensor], Tensor]:
        """M = diag(1/σ², 2): the metric of the Gaussian in (μ, log σ)."""
        precision = (-2 * eta[..., self.action_dim :]).exp()
        diagonal = torch.cat([precision, torch.full_like(precision, 2.0)], -1)
        return lambda u: diagonal * u


class Ordinal(_NormalNoise):
    """Each component takes one of n values in order, evenly spaced over a bounded Box (Tang & Agrawal 2020).

        log p_i = i η_0 + Σ_{1 ≤ j ≤ i} η_j + const,   i = 0 … n − 1

    η holds a tilt η_0 and the n − 1 differences of neighbouring logits for each component, K = A n. The differences
    alone could be any categorical distribution, and an undamped natural gradient would not notice how it is written.
    Damping does: the tilt shifts the mean, where the Fisher information is large and damping takes little; a difference
    moves the values above it against those below; and what bends the distribution out of shape is damped most.

    Args:
        space: bounds of the actions, finite.
        bins: n ≥ 2.
        device: where η will be. For η elsewhere constants are copied at each use, and the copy is waited for.
    """

    action_dtype: torch.dtype | None = None  # actions are the values themselves

    def __init__(self, space: spaces.Box, bins: int, *, device: torch.device | str = "cpu"):
        self.space, self.bins = space, bins
        self.action_dim = self.noise_dim = math.prod(space.shape)
        self.param_dim = self.action_dim * bins
        low, high = (
            torch.as_tensor(bound.ravel(), dtype=torch.float64).to(device) for bound in (space.low, space.high)
        )
        self._low, self._width = low, (high - low) / (bins - 1)
        self.native = NativeOrdinal(self._low, self._width, bins)
        # C [n, n]: how far each parameter of a component raises each logit; the tilt is the sum of all differences.
        above = torch.ones(bins - 1, bins, dtype=torch.float64).triu(1)
        self._raises = torch.cat([above.sum(0, keepdim=True), above]).to(device)

    def on(self, device: torch.device) -> Ordinal:
        return Ordinal(self.space, self.bins, device=device)

    def tells_apart(self, dtype: torch.dtype) -> bool:
        """Whether each value is found again in actions of this dtype: far from 0 neighbours may be one number."""
        here, index = self.on(torch.device("cpu")), torch.arange(self.bins).unsqueeze(-1)
        found = here._index(here._value(index.to(dtype)))
        return bool(((found == index) | (here._width == 0)).all())

    def sample(self, eta: Tensor, noise: Tensor) -> Tensor:
        """Where Φ(noise) falls among the cumulated probabilities."""
        if (compiled := self.native.sample(eta, noise)) is not None:
            return compiled
        p = self._probabilities(eta)
        index = (p.cumsum(0)[:-1] < torch.special.ndtr(noise)).sum(0)
        return self._value(index + 0 * p[0])  # comparisons would turn what is not a number into the lowest value

    def mode(self, eta: Tensor) -> Tensor:
        """The mean: between two values, where the most likely one would jump from one to the next."""
        p = self._probabilities(eta)
        return self._value(torch.einsum("n,n...->...", torch.arange(self.bins, device=p.device).to(p), p))

    def log_prob(self, eta: Tensor, action: Tensor) -> Tensor:
        index = self._index(action).unsqueeze(0)
        return self._log_probabilities(eta).gather(0, index).squeeze(0).sum(-1)

    def score(self, eta: Tensor, action: Tensor) -> Tensor:
        """C (1[a] − p)."""
        one_hot = torch.arange(self.bins, device=eta.device).view(-1, *[1] * action.dim()) == self._index(action)
        return self._pull(one_hot.to(eta.dtype) - self._probabilities(eta))

    def entropy(self, eta: Tensor) -> Tensor:
        log_p = self._log_probabilities(eta)
        return -(log_p.exp() * log_p).sum(0).sum(-1)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        log_p, log_q = self._log_probabilities(p), self._log_probabilities(q)
        return (log_p.exp() * (log_p - log_q)).sum(0).sum(-1)

    def metric(self, eta: Tensor) -> Callable[[Tensor], Tensor]:
        """M = C (diag(p) − ppᵀ) Cᵀ for each component: the categorical's metric, pulled back through logits = Cᵀη."""
        p = self._probabilities(eta)

        def product(u: Tensor) -> Tensor:
            if (compiled := self.native.metric(p, u)) is not None:
                return compiled
            v = self._logits(u)
            return self._pull(p * (v - (p * v).sum(0)))

        return product

    def normal(self, std: float) -> Tensor:
        """η [K] of normal distributions around the middle of the bounds, cut at the bounds.

        Their σ is `std`, in the unit of the actions, but at least the spacing of the values: the neighbours of the
        middle one have to be tried for anything to be learned.
        """
        steps = torch.outer(self._width, torch.arange(self.bins, device=self._width.device) - 0.5 * (self.bins - 1))
        x = steps / self._width.clamp(min=std).unsqueeze(-1)
        return nn.functional.pad((-0.5 * x.square()).diff(), (1, 0)).flatten()

    # Values come first, [n, B, A]: sums over them then run along memory, which makes a softmax 15 times as fast.

    def _logits(self, eta: Tensor) -> Tensor:
        """[B, K] → Cᵀη [n, B, A]."""
        rows = eta.reshape(-1, self.bins)
        return (self._raises.to(eta).T @ rows.T).view(self.bins, *eta.shape[:-1], self.action_dim)

    def _pull(self, w: Tensor) -> Tensor:
        """[n, B, A] → Cw [B, K]."""
        return (self._raises.to(w) @ w.flatten(1)).T.reshape(*w.shape[1:-1], self.param_dim)

    def _log_probabilities(self, eta: Tensor) -> Tensor:
        """[B, K] → [n, B, A]"""
        compiled = self.native.log_probabilities(eta)
        return self._logits(eta).log_softmax(0) if compiled is None else compiled

    def _probabilities(self, eta: Tensor) -> Tensor:
        """[B, K] → [n, B, A]"""
        return self._log_probabilities(eta).exp()

    def _value(self, index: Tensor) -> Tensor:
        return self._low.to(index) + index * self._width.to(index)

    def _index(self, action: Tensor) -> Tensor:
        width = self._width.where(self._width > 0, 1.0)  # 0: a component that has one value only
        return ((action - self._low.to(action)) / width.to(action)).round().long()


class Categorical(_NormalNoise):
    """Independent categorical components with η their concatenated logits; one component is the plain categorical."""

    action_dtype: torch.dtype | None = torch.int64

    def __init__(self, sizes: Sequence[int]):
        self.sizes = [int(n) for n in sizes]
        self.action_dim = len(self.sizes)
        self.param_dim = self.noise_dim = sum(self.sizes)

    def sample(self, eta: Tensor, noise: Tensor) -> Tensor:
        """argmax_i η_i − log e_i with e_i = −log Φ(noise_i) ~ Exp(1): the Gumbel-max rule, no normalisation needed."""
        return self._argmax(eta - torch.special.log_ndtr(noise).neg().log())

    def mode(self, eta: Tensor) -> Tensor:
        return self._argmax(eta)

    def log_prob(self, eta: Tensor, action: Tensor) -> Tensor:
        index = action.long()
        parts = [
            log_p.gather(-1, index[..., i : i + 1]).squeeze(-1) for i, log_p in enumerate(self._log_probabilities(eta))
        ]
        return torch.stack(parts).sum(0)

    def score(self, eta: Tensor, action: Tensor) -> Tensor:
        index = action.long()
        parts = []
        for i, log_p in enumerate(self._log_probabilities(eta)):
            one_hot = torch.zeros_like(log_p).scatter_(-1, index[..., i : i + 1], 1.0)
            parts.append(one_hot - log_p.exp())
        return torch.cat(parts, -1)

    def entropy(self, eta: Tensor) -> Tensor:
        return torch.stack([-(log_p.exp() * log_p).sum(-1) for log_p in self._log_probabilities(eta)]).sum(0)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        pairs = zip(self._log_probabilities(p), self._log_probabilities(q), strict=True)
        return torch.stack([(log_p.exp() * (log_p - log_q)).sum(-1) for log_p, log_q in pairs]).sum(0)

    def metric(self, eta: Tensor) -> Callable[[Tensor], Tensor]:
        """M = diag(p) − ppᵀ for each component."""
        probabilities = [log_p.exp() for log_p in self._log_probabilities(eta)]

        def product(u: Tensor) -> Tensor:
            pairs = zip(probabilities, u.split(self.sizes, -1), strict=True)
            return torch.cat([p * (v - (p * v).sum(-1, keepdim=True)) for p, v in pairs], -1)

        return product

    def _log_probabilities(self, eta: Tensor) -> list[Tensor]:
        return [logits.log_softmax(-1) for logits in eta.split(self.sizes, -1)]

    def _argmax(self, eta: Tensor) -> Tensor:
        return torch.stack([part.argmax(-1) for part in eta.split(self.sizes, -1)], -1)


class Bernoulli(_NormalNoise):
    """A independent coins with η their logits, K = A."""

    action_dtype: torch.dtype | None = torch.int64

    def __init__(self, action_dim: int):
        self.action_dim = self.param_dim = self.noise_dim = action_dim

    def sample(self, eta: Tensor, noise: Tensor) -> Tensor:
        """Φ(noise) < p, as odds: their logarithms keep the digits of both tails."""
        odds = torch.special.log_ndtr(noise) - torch.special.log_ndtr(-noise)
        return (odds < eta).to(self.action_dtype)

    def mode(self, eta: Tensor) -> Tensor:
        return (eta > 0).to(self.action_dtype)

    def log_prob(self, eta: Tensor, action: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(torch.where(action > 0, eta, -eta)).sum(-1)

    def score(self, eta: Tensor, action: Tensor) -> Tensor:
        return action - eta.sigmoid()

    def entropy(self, eta: Tensor) -> Tensor:
        logsigmoid = torch.nn.functional.logsigmoid
        p = eta.sigmoid()
        return -(p * logsigmoid(eta) + (-eta).sigmoid() * logsigmoid(-eta)).sum(-1)

    def kl(self, p: Tensor, q: Tensor) -> Tensor:
        """Σ_a p log(p/q) + (1 − p) log((1 − p)/(1 − q)), with probabilities p, q of the logits."""
        logsigmoid = torch.nn.functional.logsigmoid
        heads = p.sigmoid() * (logsigmoid(p) - logsigmoid(q))
        tails = (-p).sigmoid() * (logsigmoid(-p) - logsigmoid(-q))
        return (heads + tails).sum(-1)

    def metric(self, eta: Tensor) -> Callable[[Tensor], Tensor]:
        """M = diag(p (1 − p))."""
        p = eta.sigmoid()
        diagonal = p * (1 - p)
        return lambda u: diagonal * u


def distribution_for(
    space: spaces.Space,
    *,
    bins: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float64,
) -> Distribution:
    """The distribution for an action space: for a Box with finite bounds and `bins` an ordinal one, else a Gaussian.

    Args:
        space: as the environment declares it.
        bins: values of each component of an ordinal policy.
        device: where η will be.
        dtype: what it will be: bounds farther apart than its numbers go are none.

    Raises:
        EnvError: the space is none of Box, Discrete, MultiDiscrete, MultiBinary.
    """
    if isinstance(space, spaces.Box) and bins is not None and _is_bounded(space, dtype):
        return Ordinal(space, bins, device=device)
    if isinstance(space, spaces.Box):
        return DiagonalGaussian(math.prod(space.shape))
    if isinstance(space, spaces.Discrete):
        return Categorical([int(space.n)])
    if isinstance(space, spaces.MultiDiscrete):
        return Categorical(space.nvec.reshape(-1).tolist())
    if isinstance(space, spaces.MultiBinary):
        return Bernoulli(math.prod(space.shape))
    raise EnvError(
        f"action space {type(space).__name__} is not supported; wrap the environment so that it is Box, Discrete, "
        "MultiDiscrete or MultiBinary"
    )


def _is_bounded(space: spaces.Box, dtype: torch.dtype) -> bool:
    low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in (space.low, space.high))
    return space.is_bounded("both") and bool((high - low).to(dtype).isfinite().all())
