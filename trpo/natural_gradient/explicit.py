"""The natural gradient by definition, dense and slow: what the fast code is tested against, and a place to learn.

    distance between policies           KL(π_θ ‖ π_θ+δ)
    its second derivative at δ = 0      F, the Fisher matrix
    so for small steps                  KL ≈ ½ δᵀFδ
    steepest ascent under that metric   F⁻¹g

Everything is computed from these definitions by automatic differentiation of the KL itself, with none of the closed
forms used for training. Meant for float64 and small networks: F has P² entries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def metric_distance(delta: Tensor, metric: Tensor) -> Tensor:
    """δᵀMδ, the squared length of δ [P] under the metric M [P, P]."""
    return delta @ metric @ delta


def gaussian_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """KL(N(μ_p, σ_p²) ‖ N(μ_q, σ_q²)) = Σ log(σ_q/σ_p) + (σ_p² + (μ_p − μ_q)²) / (2σ_q²) − ½, last dimension."""
    return (torch.log(std_q / std_p) + (std_p**2 + (mean_p - mean_q) ** 2) / (2 * std_q**2) - 0.5).sum(-1)


def eta_function(network: nn.Module, obs: Tensor) -> Callable[[Tensor], Tensor]:
    """θ [P] ↦ η [B, K] of a network on observations [B, D]; θ holds its free parameters one after another."""
    free = [p for p in network.parameters() if p.requires_grad]

    def eta_of(theta: Tensor) -> Tensor:
        values, start = {}, 0
        for p in free:
            values[p] = theta[start : start + p.numel()].reshape(p.shape)
            start += p.numel()
        named = {
            name: values[p]
            for prefix, part in network.named_modules()
            for name, p in part.named_parameters(prefix, recurse=False)
            if p in values
        }
        return torch.func.functional_call(network, named, (obs,), tie_weights=False)

    return eta_of


def kl_from(eta_of: Callable[[Tensor], Tensor], kl: Callable[[Tensor, Tensor], Tensor], theta: Tensor) -> Callable:
    """θ′ ↦ mean KL(π_θ ‖ π_θ′) with the first argument fixed at `theta`.

    Args:
        eta_of: θ [P] ↦ distribution parameters [B, K].
        kl: (η_p, η_q) ↦ KL of each sample [B].
        theta: where the first policy is.
    """
    eta_fixed = eta_of(theta).detach()
    return lambda other: kl(eta_fixed, eta_of(other)).mean()


def fisher_matrix(eta_of: Callable[[Tensor], Tensor], kl: Callable[[Tensor, Tensor], Tensor], theta: Tensor) -> Tensor:
    """F [P, P]: the Hessian of the mean KL in its second argument, at `theta`."""
    hessian = torch.autograd.functional.hessian(kl_from(eta_of, kl, theta), theta.detach())
    assert isinstance(hessian, Tensor)
    return hessian


def natural_gradient(fisher: Tensor, gradient: Tensor, *, damping: float = 0.0) -> Tensor:
    """(F + λI)⁻¹ g by a dense solve."""
    return torch.linalg.solve(fisher + damping * torch.eye(len(fisher), dtype=fisher.dtype), gradient)


def steepest_direction(metric: Tensor, gradient: Tensor, *, radius: float) -> Tensor:
    """argmax gᵀδ subject to δᵀMδ ≤ radius²: the natural gradient scaled to the boundary of the metric's ball."""
    return to_boundary(natural_gradient(metric, gradient), metric, radius=radius)


def to_boundary(direction: Tensor, metric: Tensor, *, radius: float) -> Tensor:
    """The multiple s > 0 of a direction [P] with sᵀMs = radius²: of KL δ in the quadratic model if radius is √(2δ)."""
    return radius * direction / metric_distance(direction, metric).sqrt()
