"""From a network's outputs to η = (μ, log σ): σ given, or learned with a smooth bound on log σ."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from trpo.networks.linearization import Factors
from trpo.networks.mlp import MLP, ClosedForm
from trpo.networks.network import BodyAndHead, for_rollout, linearize
from trpo.normalizer import ObservationNormalizer


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

    def for_rollout(self, normalizer: ObservationNormalizer) -> Callable[[Tensor], Tensor]:
        """See `for_rollout` of `trpo.networks.network`."""
        network = for_rollout(self.network, normalizer)
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
        self.output = head._eta(self._inner.output)

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

    def for_rollout(self, normalizer: ObservationNormalizer) -> Callable[[Tensor], Tensor]:
        """See `for_rollout` of `trpo.networks.network`."""
        network, log_std = for_rollout(self.network, normalizer), self._free_log_std()
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
        self.output = head._eta(self._inner.output, head._free_log_std())
        if self._free:
            self._slope = head.bound_slope(head.raw_log_std)
        else:
            mean, raw = self._inner.output.chunk(2, -1)
            self._slope = torch.cat([torch.ones_like(mean), head.bound_slope(raw)], -1)

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
