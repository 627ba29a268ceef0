"""Switches, for binary actions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trpo.distributions.contract import NormalNoise


class Bernoulli(NormalNoise):
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
