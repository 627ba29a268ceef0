"""The policy: observation → distribution parameters → action."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from gymnasium import spaces
from gymnasium.spaces.utils import flatdim
from torch import Tensor, nn

from trpo.config import Config, LearnedStdConfig, PolicyConfig
from trpo.config.schedule import value_at
from trpo.distributions import Categorical, DiagonalGaussian, Distribution, Ordinal, distribution_for
from trpo.errors import ConfigError
from trpo.networks.action_mask import ActionMask, mask_columns
from trpo.networks.gaussian_heads import GaussianHead, GivenStdHead
from trpo.networks.linearization import Linearization
from trpo.networks.mlp import MLP
from trpo.networks.network import build_network, for_rollout, in_closed_form, linearize
from trpo.networks.parameters import FlatModule, FlatParameters
from trpo.normalizer import ObservationNormalizer


class Policy(FlatModule):
    """π_θ(a|s), with the observation normaliser it was trained with inside.

    `network` maps normalised observations [B, D] to the distribution parameters; for a Gaussian these pass through a
    `GaussianHead` or a `GivenStdHead`. Any module will do: one that offers `linearize` gets closed-form Fisher
    products, others autograd; one that offers `for_rollout` says how it acts in one.

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
    def obs_dim(self) -> int:
        """D, the length of a flat observation."""
        return len(self.normalizer.moments.mean)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.theta.vector.device

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
            return self.distribution.sample(self.network(self.normalizer(obs)), noise.to(self.device))

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
        acting, device = self._acting, self.device
        with acting():
            eta = for_rollout(self.network, self.normalizer)

        def act(t: int) -> None:
            with acting():
                action[t].copy_(self.distribution.sample(eta(obs[t].to(device)), noise[t]))

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


def build_policy(
    config: Config,
    observation_space: spaces.Space,
    action_space: spaces.Space,
    *,
    generator: torch.Generator,
    device: torch.device,
) -> Policy:
    """The policy of a config, freshly initialised.

    Args:
        config: all settings.
        observation_space: as the environment declares it, or that of its flat observations [D], where
            `policy.action_mask` is not set.
        action_space: any that is supported.
        generator: source of the weights.
        device: where it computes.

    Raises:
        ConfigError: the settings do not fit such observations or actions.
    """
    settings, dtype = config.policy, getattr(torch, config.dtype)
    distribution = distribution_for(action_space, bins=settings.bins, device=device, dtype=dtype)
    obs_dim = flatdim(observation_space)
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
    mask: slice | None = None
    if settings.action_mask is not None:
        if not isinstance(distribution, Categorical):
            raise ConfigError(
                f"policy.action_mask: actions are {action_space}; only choices, of Discrete and MultiDiscrete, can be "
                "ruled out"
            )
        mask = mask_columns(observation_space, settings.action_mask, distribution.sizes)
        network = ActionMask(inner, mask, distribution.sizes)
    if isinstance(distribution, Ordinal):
        with torch.no_grad():
            inner.head.bias.copy_(distribution.normal(_initial_std(settings)))
    if isinstance(std, LearnedStdConfig):
        bounds = (std.min, std.max)
        network = GaussianHead(inner, distribution.action_dim, initial_std=std.initial, std_bounds=bounds)
    elif std is not None:
        network = GivenStdHead(inner, distribution.action_dim, std=value_at(std, 0.0))
    normalizer = build_normalizer(config, obs_dim, plain=mask)
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


def build_normalizer(config: Config, obs_dim: int, *, plain: slice | None = None) -> ObservationNormalizer:
    settings = config.normalize
    return ObservationNormalizer(
        obs_dim,
        clip=settings.clip_observations,
        dtype=getattr(torch, config.dtype),
        enabled=settings.observations,
        plain=plain,
    )
