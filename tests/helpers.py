"""Small policies, batches and independent oracles shared by the tests. float64 unless a test is about float32."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch import distributions as td

from trpo.batch import Batch
from trpo.config import NaturalGradientConfig
from trpo.distributions import Bernoulli, Categorical, DiagonalGaussian, Distribution, Ordinal
from trpo.natural_gradient.explicit import eta_function
from trpo.networks.action_mask import ActionMask
from trpo.networks.gaussian_heads import GaussianHead, GivenStdHead
from trpo.networks.mlp import MLP
from trpo.normalizer import ObservationNormalizer
from trpo.policy import Policy

F64 = torch.float64

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def no_graph(mode: bool = True) -> contextlib.AbstractContextManager[None]:
    """In place of `torch.inference_mode`, for tensors that have to stay ordinary ones."""
    return torch.no_grad() if mode else contextlib.nullcontext()


OBS_DIM = 3

FAMILIES: dict[str, Distribution] = {
    "gaussian": DiagonalGaussian(2),
    "ordinal": Ordinal(spaces.Box(np.array([-1.0, 0.5]), np.array([2.0, 2.0]), dtype=np.float64), 4),
    "categorical": Categorical([4]),
    "multi_categorical": Categorical([2, 5, 3]),
    "bernoulli": Bernoulli(3),
}
INDEXED = ("categorical", "multi_categorical", "bernoulli")  # whose actions are 0-based indices
DISCRETE = ("ordinal", *INDEXED)
ORDINAL_VALUES = (torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=F64), torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=F64))
# Every way η can depend on θ: each family, the Gaussian with σ as a free vector, as a network output, or given, and
# choices of which the observation rules some out.
POLICIES = ("gaussian", "gaussian_state_std", "gaussian_given_std", *DISCRETE, "masked")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


class Opaque(nn.Module):
    """Hides a network's `linearize`, so that a policy has to fall back on automatic differentiation."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def make_mlp(
    sizes: list[int], *, activation: str = "tanh", head_scale: float = 1.0, seed: int = 0, dtype: torch.dtype = F64
) -> MLP:
    """A network with random biases too, so that no derivative is zero by symmetry."""
    mlp = MLP(sizes, activation=activation, head_scale=head_scale, generator=seeded(seed)).to(dtype)
    with torch.no_grad():
        for i, layer in enumerate(mlp.layers):
            layer.bias.copy_(0.3 * randn(len(layer.bias), seed=100 + 10 * seed + i))
    return mlp


def make_policy(
    kind: str = "gaussian",
    *,
    hidden: tuple[int, ...] = (5, 4),
    activation: str = "tanh",
    seed: int = 0,
    dtype: torch.dtype = F64,
    opaque: bool = False,
    std_bounds: tuple[float, float] = (0.01, 10.0),
    initial_std: float = 0.6,
) -> Policy:
    """A small policy of one of the `POLICIES`; `opaque` makes it use AutogradLinearization."""
    masked = Categorical([OBS_DIM])
    distribution = masked if kind == "masked" else FAMILIES[kind.removesuffix("_state_std").removesuffix("_given_std")]
    gaussian = isinstance(distribution, DiagonalGaussian)
    out = distribution.param_dim if not gaussian or kind.endswith("_state_std") else distribution.action_dim
    network: nn.Module = make_mlp([OBS_DIM, *hidden, out], activation=activation, seed=seed, dtype=dtype)
    if kind.endswith("_given_std"):
        network = GivenStdHead(network, distribution.action_dim, std=initial_std).to(dtype)
    elif kind == "masked":
        network = ActionMask(network, slice(0, OBS_DIM), masked.sizes)  # the signs of an observation
    elif gaussian:
        network = GaussianHead(network, distribution.action_dim, initial_std=initial_std, std_bounds=std_bounds)
        network.to(dtype)
        if kind == "gaussian":
            with torch.no_grad():
                network.raw_log_std.add_(0.2 * randn(distribution.action_dim, seed=7))
    return Policy(
        Opaque(network) if opaque else network, distribution, ObservationNormalizer(OBS_DIM, clip=10.0, dtype=dtype)
    )


def make_batch(policy: Policy, size: int = 40, *, seed: int = 1) -> Batch:
    """Observations, actions the policy drew for them, and standard normal advantages."""
    dtype = policy.theta.vector.dtype
    obs = randn(size, OBS_DIM, seed=seed, dtype=dtype)
    noise = policy.distribution.noise(size, like=obs, generator=seeded(seed + 1))
    with torch.no_grad():
        action = policy.distribution.sample(policy(obs), noise)
    return Batch(obs, action, randn(size, seed=seed + 2, dtype=dtype))


def torch_components(distribution: Distribution, eta: Tensor) -> list[td.Distribution]:
    """torch's distributions for η: independent components whose logs of probability add up."""
    if isinstance(distribution, DiagonalGaussian):
        mean, log_std = eta.chunk(2, -1)
        return [td.Normal(mean[..., i], log_std[..., i].exp()) for i in range(distribution.action_dim)]
    if isinstance(distribution, Ordinal):
        parts = eta.split(distribution.bins, -1)
        steps = [torch.cat([torch.zeros_like(part[..., :1]), part[..., 1:] + part[..., :1]], -1) for part in parts]
        return [td.Categorical(logits=step.cumsum(-1)) for step in steps]
    if isinstance(distribution, Categorical):
        return [td.Categorical(logits=part) for part in eta.split(distribution.sizes, -1)]
    if isinstance(distribution, Bernoulli):
        return [td.Bernoulli(logits=eta[..., i]) for i in range(distribution.action_dim)]
    raise TypeError(f"tests know no distribution of torch's for {type(distribution).__name__}: give it one here")


def torch_log_prob(distribution: Distribution, eta: Tensor, action: Tensor) -> Tensor:
    parts = torch_components(distribution, eta)
    if isinstance(distribution, Ordinal):
        action = torch.stack([(action[..., i, None] - v).abs().argmin(-1) for i, v in enumerate(ORDINAL_VALUES)], -1)
    return sum(part.log_prob(action[..., i].to(_value_dtype(part, eta))) for i, part in enumerate(parts))


def torch_kl(distribution: Distribution, p: Tensor, q: Tensor) -> Tensor:
    pairs = zip(torch_components(distribution, p), torch_components(distribution, q), strict=True)
    return sum(td.kl_divergence(a, b) for a, b in pairs)


def torch_entropy(distribution: Distribution, eta: Tensor) -> Tensor:
    return sum(part.entropy() for part in torch_components(distribution, eta))


def all_actions(distribution: Distribution) -> Tensor:
    """Every joint action [M, A] of a discrete family."""
    if isinstance(distribution, Ordinal):
        return torch.cartesian_prod(*ORDINAL_VALUES)
    sizes = distribution.sizes if isinstance(distribution, Categorical) else [2] * distribution.action_dim
    return torch.tensor(list(itertools.product(*(range(n) for n in sizes))))


def surrogate_and_kl(policy: Policy, batch: Batch, theta_old: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """(mean ratio·A − mean A, mean joint KL(old ‖ new)) by torch.distributions, at any two θ."""
    eta_of = eta_function(policy, batch.obs)
    old, new = eta_of(theta_old), eta_of(theta)
    distribution = policy.distribution
    ratio = (torch_log_prob(distribution, new, batch.action) - torch_log_prob(distribution, old, batch.action)).exp()
    gain = ((ratio - 1) * batch.advantage).mean()
    return gain, torch_kl(distribution, old, new).mean()


def settings(**changes: object) -> NaturalGradientConfig:
    """Settings with which CG solves the small test problems to rounding."""
    exact = {"damping": 0.1, "cg_iterations": 200, "cg_tolerance": 1e-13}
    return NaturalGradientConfig.model_validate(exact | changes)


def spd_matrix(eigenvalues: Tensor, *, seed: int = 0) -> Tensor:
    """Q diag(eigenvalues) Qᵀ with a random orthogonal Q."""
    q, _ = torch.linalg.qr(randn(len(eigenvalues), len(eigenvalues), seed=seed))
    return (q * eigenvalues) @ q.T


def _value_dtype(part: td.Distribution, eta: Tensor) -> torch.dtype:
    return torch.int64 if isinstance(part, td.Categorical) else eta.dtype
