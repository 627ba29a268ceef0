"""Linearisations of a network: f(θ + v) ≈ f(θ) + Jv."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class Linearization(Protocol):
    """f and its Jacobian at one θ and one batch of inputs."""

    output: Tensor  # f(θ) [B, K], detached

    def jvp(self, v: Tensor) -> Tensor:
        """Jv [B, K] for v [P]."""

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀu [P] for u [B, K]: summed, not averaged, over the batch."""


class Factors(NamedTuple):
    """Kronecker factors of one block of θ, summed over a batch: weight [m, n] then bias [m], or a bias alone."""

    inputs: Tensor  # [n + 1, n + 1] Σ h̃h̃ᵀ, h̃ = (h, 1)
    outputs: Tensor  # [m, m] Σ δδᵀ
