"""Choices, for discrete actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trpo.distributions.contract import NormalNoise


class Categorical(NormalNoise):
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
