"""A Gaussian with independent components."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trpo.distributions.contract import NormalNoise


class DiagonalGaussian(NormalNoise):
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
