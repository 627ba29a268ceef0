"""What TRPO asks of a family of distributions, and the noise behind all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self

import torch
from torch import Tensor


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


class NormalNoise:
    """What is random in an action is N(0, 1), so that noise of any family can be coloured in time."""

    noise_dim: int  # Z

    def on(self, device: torch.device) -> Self:
        """See `Distribution.on`."""
        return self

    def noise(self, *shape: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.randn(*shape, self.noise_dim, generator=generator, device=like.device, dtype=like.dtype)
