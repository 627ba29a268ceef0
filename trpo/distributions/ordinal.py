"""Values in order, for actions with bounds."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from gymnasium import spaces
from torch import Tensor, nn

from trpo.distributions.contract import NormalNoise
from trpo.native import NativeOrdinal


class Ordinal(NormalNoise):
    """Each component takes one of n values in order, evenly spaced over a bounded Box (Tang & Agrawal 2020).

        log p_i = i η_0 + Σ_{1 ≤ j ≤ i} η_j + const,   i = 0 … n − 1

    η holds a tilt η_0 and the n − 1 differences of neighbouring logits for each component, K = A n. The differences are
    Tang & Agrawal's logits and could be any categorical distribution alone; the tilt is added here. An undamped natural
    gradient would not notice how the distribution is written. Damping does: the tilt shifts the mean, where the Fisher
    information is large and damping takes little; a difference moves the values above it against those below; and what
    bends the distribution out of shape is damped most.

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

    # Values come first, [n, B, A]: sums over them then run along memory, which makes a softmax several times as fast.

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
