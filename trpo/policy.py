"""The policy: observation → distribution parameters → action."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from trpo.config import Config, LearnedStdConfig, PolicyConfig
from trpo.config.schedule import value_at
from trpo.distributions import DiagonalGaussian, Distribution, Ordinal, distribution_for
from trpo.errors import ConfigError
from trpo.networks.linearization import Factors, Linearization
from trpo.networks.mlp import MLP, ClosedForm
from trpo.networks.network import BodyAndHead, build_network, frozen, in_closed_form, linearize
from trpo.networks.parameters import FlatParameters
from trpo.normalizer import ObservationNormalizer


class Policy(nn.Module):
    """π_θ(a|s), with the observation normaliser it was trained with inside.

    `network` maps normalised observations [B, D] to the distribution parameters; for a Gaussian these pass through a
    `GaussianHead` or a `GivenStdHead`. Any module will do: one that offers `linearize` gets closed-form Fisher
    products, others autograd; one that offers `frozen` has rollouts prepared by it.

    Attributes:
        theta: all trainable parameters as one vector; those with `requires_grad` off at construction are left out.
    """

    def __init__(self, network: nn.Module, distribution: Distribution, normalizer: ObservationNormalizer):
        super().__init__()
        self.network = network
        self.normalizer = normalizer
        self.distribution = distribution
        self.theta = FlatParameters(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # Copied or pickled member by member, the copy's parameters would lie outside the copy's flat vector. In a deep
        # copy they are no longer views of one, of which a pickle would hold the whole each time.
        return type(self), (copy.deepcopy(self.network), self.distribution, copy.deepcopy(self.normalizer))

    def copy_on(self, device: torch.device) -> Policy:
        """The same policy on another device, for `follow`."""
        network, normalizer = copy.deepcopy((self.network, self.normalizer))
        return Policy(network.to(device), self.distribution.on(device), normalizer.to(device))

    @torch.no_grad()
    def follow(self, other: Policy) -> None:
        """Takes over all that training changes in another policy, of which this one is a copy."""
        self.theta.assign_(other.theta.vector)
        for mine, of_other in zip(self.buffers(), other.buffers(), strict=True):
            mine.copy_(of_other)

    def forward(self, obs: Tensor) -> Tensor:
        """Normalised observations [B, D] → η [B, K]."""
        return self.network(obs)

    def linearize(self, obs: Tensor) -> Linearization:
        """η and its Jacobian at the current θ for normalised observations [B, D]."""
        return linearize(self.network, obs)

    @property
    def compiled(self) -> bool:
        """Whether compiled code does the network."""
        return isinstance(self._inner, MLP) and self._inner.compiled

    @property
    def closed_form(self) -> bool:
        """Whether `linearize` needs no graph: so of the built-in networks, none of it frozen."""
        return isinstance(self._inner, MLP) and in_closed_form(self.network)

    @property
    def _inner(self) -> nn.Module:
        """The network below the head, if it has one."""
        return getattr(self.network, "network", self.network)

    @property
    def _acting(self) -> Callable[[], AbstractContextManager[None]]:
        """Acting needs no graph, and of built-in layers nothing to build one from; others may keep what they made."""
        return torch.inference_mode if isinstance(self._inner, MLP) else torch.no_grad

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """Raw observations [N, D] and noise of `noise` → actions [N, A], in the policy's encoding."""
        with self._acting():
            return self.distribution.sample(self.network(self.normalizer(obs)), noise.to(self.theta.vector.device))

    def actor(self, obs: Tensor, noise: Tensor, action: Tensor) -> Callable[[int], None]:
        """`sample` within a rollout, in which nothing changes in the policy.

        Args:
            obs: [T, N, D] raw observations, which need not be there yet.
            noise: [T, N, Z] of `noise`, on the policy's device.
            action: [T, N, A] written to.

        Returns:
            t ↦ None: takes obs[t] and noise[t], writes action[t].
        """
        return self._compiled_actor(obs, noise, action) or self._plain_actor(obs, noise, action)

    def _plain_actor(self, obs: Tensor, noise: Tensor, action: Tensor) -> Callable[[int], None]:
        acting, device = self._acting, self.theta.vector.device
        with acting():
            parameters = frozen(self.network, self.normalizer)

        def act(t: int) -> None:
            with acting():
                action[t].copy_(self.distribution.sample(parameters(obs[t].to(device)), noise[t]))

        return act

    def _compiled_actor(self, obs: Tensor, noise: Tensor, action: Tensor) -> Callable[[int], None] | None:
        head, distribution, std = self.network, self.distribution, None
        mlp: nn.Module = head
        if type(head) is GivenStdHead or (type(head) is GaussianHead and not head.state_dependent):
            mlp, std = head.network, head.log_std().exp()
        compiled = mlp.actor(self.normalizer, obs) if isinstance(mlp, MLP) else None
        if compiled is None:
            return None
        if std is not None:
            draws = type(distribution) is DiagonalGaussian and compiled.draws_normal(std, noise, action)
            return compiled if draws else None
        if type(distribution) is Ordinal and compiled.draws_ordinal(distribution.native, noise, action):
            return compiled

        def act(t: int) -> None:
            with torch.inference_mode():
                action[t].copy_(distribution.sample(compiled.outputs(t), noise[t]))

        return act

    def noise(self, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        """N(0, 1) numbers for `sample` [*shape, Z], on the CPU: there a seed gives the same ones for every device."""
        like = self.theta.vector.new_empty(0, device="cpu")
        return self.distribution.noise(*shape, like=like, generator=generator)

    def mode(self, obs: Tensor) -> Tensor:
        """Raw observations [N, D] → the actions without noise [N, A], in the policy's encoding."""
        with self._acting():
            return self.distribution.mode(self.network(self.normalizer(obs)))

    def std(self) -> float:
        """Mean standard deviation of a state-independent Gaussian policy; NaN for others."""
        log_std = getattr(self.network, "log_std", None)
        return float(log_std().exp().mean()) if callable(log_std) else math.nan


class GivenStdHead(nn.Module):
    """Takes network outputs for μ of η = (μ, log σ); σ is given, and no gradient moves it.

    The whole KL bound is then left to μ.
    """

    given_log_std: Tensor  # [A]

    def __init__(self, network: MLP | BodyAndHead, action_dim: int, *, std: float):
        super().__init__()
        self.network = network
        self.register_buffer("given_log_std", torch.full((action_dim,), math.log(std), dtype=torch.float64))

    def forward(self, obs: Tensor) -> Tensor:
        """[B, D] → η [B, 2A]."""
        return self._eta(self.network(obs))

    def frozen(self, normalizer: ObservationNormalizer) -> Callable[[Tensor], Tensor]:
        """See `networks.frozen`."""
        network = frozen(self.network, normalizer)
        return lambda obs: self._eta(network(obs))

    def _eta(self, mean: Tensor) -> Tensor:
        return torch.cat([mean, self.given_log_std.expand_as(mean)], -1)

    def log_std(self) -> Tensor:
        """log σ [A]."""
        return self.given_log_std

    def set_std(self, std: float) -> None:
        """σ from now on, of all action components."""
        self.given_log_std.fill_(math.log(std))

    def linearize(self, obs: Tensor) -> GivenStdLinearization:
        """In closed form, on top of the network's linearisation."""
        return GivenStdLinearization(self, obs)


class GivenStdLinearization:
    """J of a `GivenStdHead`: the network's J, and rows of zeros for log σ."""

    @torch.no_grad()
    def __init__(self, head: GivenStdHead, obs: Tensor):
        self._inner = linearize(head.network, obs)
        mean = self._inner.output
        self.output = torch.cat([mean, head.given_log_std.expand_as(mean)], -1)

    @torch.no_grad()
    def jvp(self, v: Tensor) -> Tensor:
        mean = self._inner.jvp(v)
        return nn.functional.pad(mean, (0, mean.shape[-1]))

    def vjp(self, u: Tensor) -> Tensor:
        return self._inner.vjp(_mean_part(u))

    def kronecker_factors(self, u: Tensor) -> list[Factors]:
        assert isinstance(self._inner, ClosedForm)  # the config lets no others be preconditioned
        return self._inner.kronecker_factors(_mean_part(u))


def _mean_part(u: Tensor) -> Tensor:
    return u.chunk(2, -1)[0].contiguous()


class GaussianHead(nn.Module):
    """Turns network outputs into η = (μ, log σ) with a learned σ, log σ kept between two bounds.

    The bound is a scaled sigmoid, b(x) = lo + (hi − lo) · sigmoid(4 (x − mid) / (hi − lo)): slope 1 in the middle,
    never 0, so that a σ at its bound can come back, as it could not from a clamp. x is a free vector [A] for a
    state-independent σ, or the second half of the network's output.
    """

    def __init__(
        self, network: MLP | BodyAndHead, action_dim: int, *, initial_std: float, std_bounds: tuple[float, float]
    ):
        super().__init__()
        self.network = network
        self.action_dim = action_dim
        self.low, self.high = (math.log(bound) for bound in std_bounds)
        raw = self._unbound(math.log(initial_std))
        self.state_dependent = network.head.out_features == 2 * action_dim
        if self.state_dependent:
            with torch.no_grad():
                network.head.bias[action_dim:].fill_(raw)
        else:
            self.raw_log_std = nn.Parameter(torch.full((action_dim,), raw))

    def forward(self, obs: Tensor) -> Tensor:
        """[B, D] → η [B, 2A]."""
        return self._eta(self.network(obs), self._free_log_std())

    def frozen(self, normalizer: ObservationNormalizer) -> Callable[[Tensor], Tensor]:
        """See `networks.frozen`."""
        network, log_std = frozen(self.network, normalizer), self._free_log_std()
        return lambda obs: self._eta(network(obs), log_std)

    def _free_log_std(self) -> Tensor | None:
        return None if self.state_dependent else self._bound(self.raw_log_std)

    def _eta(self, out: Tensor, log_std: Tensor | None) -> Tensor:
        """Network outputs [B, A or 2A] → η [B, 2A]."""
        if log_std is None:
            mean, raw = out.chunk(2, -1)
            return torch.cat([mean, self._bound(raw)], -1)
        return torch.cat([out, log_std.expand_as(out)], -1)

    def log_std(self) -> Tensor:
        """log σ [A] of a state-independent policy, NaN otherwise."""
        if self.state_dependent:
            return torch.full((self.action_dim,), math.nan)
        return self._bound(self.raw_log_std.detach())

    def linearize(self, obs: Tensor) -> GaussianLinearization:
        """In closed form, on top of the network's linearisation."""
        return GaussianLinearization(self, obs)

    def _squash(self, raw: Tensor) -> Tensor:
        width, middle = self.high - self.low, 0.5 * (self.high + self.low)
        return torch.sigmoid((raw - middle) * (4 / width))

    def _bound(self, raw: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * self._squash(raw)

    def bound_slope(self, raw: Tensor) -> Tensor:
        """b′(x) ∈ (0, 1]."""
        s = self._squash(raw)
        return 4 * s * (1 - s)

    def _unbound(self, log_std: float) -> float:
        width, middle = self.high - self.low, 0.5 * (self.high + self.low)
        s = (log_std - self.low) / width
        return middle + width / 4 * math.log(s / (1 - s))


class GaussianLinearization:
    """J of a `GaussianHead`: the network's J with the rows of log σ multiplied by the slope of the bound.

    With a free log σ vector, θ = (raw_log_std, network): a module's own parameters come before its children's.
    """

    @torch.no_grad()
    def __init__(self, head: GaussianHead, obs: Tensor):
        self._inner = linearize(head.network, obs)
        self._free = 0 if head.state_dependent else head.action_dim
        out = self._inner.output
        if self._free:
            self._slope = head.bound_slope(head.raw_log_std)
            self.output = torch.cat([out, head._bound(head.raw_log_std).expand_as(out)], -1)
        else:
            mean, raw = out.chunk(2, -1)
            self._slope = torch.cat([torch.ones_like(mean), head.bound_slope(raw)], -1)
            self.output = torch.cat([mean, head._bound(raw)], -1)

    @torch.no_grad()
    def jvp(self, v: Tensor) -> Tensor:
        inner = self._inner.jvp(v[self._free :])
        if not self._free:
            return inner * self._slope
        return torch.cat([inner, (v[: self._free] * self._slope).expand_as(inner)], -1)

    @torch.no_grad()
    def vjp(self, u: Tensor) -> Tensor:
        if not self._free:
            return self._inner.vjp(u * self._slope)
        u_mean, u_log_std = u.chunk(2, -1)
        return torch.cat([u_log_std.sum(0) * self._slope, self._inner.vjp(u_mean.contiguous())])

    @torch.no_grad()
    def kronecker_factors(self, u: Tensor) -> list[Factors]:
        assert isinstance(self._inner, ClosedForm)
        if not self._free:
            return self._inner.kronecker_factors(u * self._slope)
        u_mean, u_log_std = u.chunk(2, -1)
        pulled = u_log_std * self._slope
        log_std = Factors(pulled.new_full((1, 1), float(len(u))), pulled.T @ pulled)
        return [log_std, *self._inner.kronecker_factors(u_mean.contiguous())]


def build_policy(
    config: Config,
    observation_space: spaces.Box,
    action_space: spaces.Space,
    *,
    generator: torch.Generator,
    device: torch.device,
) -> Policy:
    """The policy of a config for flat observations [D] and any supported action space, freshly initialised."""
    settings, dtype = config.policy, getattr(torch, config.dtype)
    distribution = distribution_for(action_space, bins=settings.bins, device=device, dtype=dtype)
    obs_dim = observation_space.shape[0]
    std = settings.std if isinstance(distribution, DiagonalGaussian) else None
    from_state = std is None or (isinstance(std, LearnedStdConfig) and std.state_dependent)
    inner = build_network(
        obs_dim,
        distribution.param_dim if from_state else distribution.action_dim,
        settings,
        key="policy",
        head_scale=settings.mean_head_scale,
        dtype=dtype,
        device=device,
        generator=generator,
    )
    network: nn.Module = inner
    if isinstance(distribution, Ordinal):
        with torch.no_grad():
            inner.head.bias.copy_(distribution.normal(_initial_std(settings)))
    if isinstance(std, LearnedStdConfig):
        bounds = (std.min, std.max)
        network = GaussianHead(inner, distribution.action_dim, initial_std=std.initial, std_bounds=bounds)
    elif std is not None:
        network = GivenStdHead(inner, distribution.action_dim, std=value_at(std, 0.0))
    normalizer = build_normalizer(config, obs_dim)
    return Policy(network.to(device, dtype), distribution, normalizer.to(device))


def _initial_std(settings: PolicyConfig) -> float:
    """σ that an ordinal policy begins with.

    Raises:
        ConfigError: there is more to σ. Only the action space says whether a policy is ordinal, so no config knew.
    """
    std, default = settings.std, LearnedStdConfig()
    if isinstance(std, LearnedStdConfig) and std.model_copy(update={"initial": default.initial}) == default:
        return std.initial
    raise ConfigError(
        "policy.std: these actions have bounds, so the policy uses policy.bins, for which only policy.std.initial "
        "counts; set policy.bins=null for a Gaussian policy, or leave the rest of policy.std out"
    )


def build_normalizer(config: Config, obs_dim: int) -> ObservationNormalizer:
    settings = config.normalize
    return ObservationNormalizer(
        obs_dim, clip=settings.clip_observations, dtype=getattr(torch, config.dtype), enabled=settings.observations
    )
