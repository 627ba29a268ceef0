"""Networks as the rest sees them: built from a config, linearised, and as they are while nothing in them moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from trpo.config import PolicyConfig, ValueConfig
from trpo.networks.autograd_linearization import AutogradLinearization
from trpo.networks.body import make_body
from trpo.networks.linearization import Linearization
from trpo.networks.mlp import MLP, initialize_
from trpo.normalizer import ObservationNormalizer


class BodyAndHead(nn.Module):
    """A network of the user's up to the last layer: D → features → K, linear output."""

    def __init__(self, body: nn.Module, features: int, outputs: int, *, head_scale: float, generator: torch.Generator):
        super().__init__()
        self.body = body
        self.head = nn.Linear(features, outputs)
        initialize_(self.head, head_scale, generator)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, D] → [B, K]."""
        return self.head(self.body(x))


def build_network(
    inputs: int,
    outputs: int,
    settings: PolicyConfig | ValueConfig,
    *,
    key: str,
    head_scale: float,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> MLP | BodyAndHead:
    """The network of a config, freshly initialised.

    Args:
        inputs: D.
        outputs: K.
        settings: of the policy or of the value function.
        key: their name, for messages.
        head_scale: gain of the orthogonal initialisation of the last layer.
        dtype: what it computes in.
        device: where.
        generator: source of the weights.

    Raises:
        ConfigError: `settings.body` gives no module that fits, or none that can be differentiated twice.
    """
    if settings.body is None:
        sizes = [inputs, *settings.hidden_sizes, outputs]
        mlp = MLP(sizes, activation=settings.activation, head_scale=head_scale, generator=generator)
        return mlp.to(device, dtype)
    body, features = make_body(settings.body, inputs, key=key, dtype=dtype, device=device, generator=generator)
    return BodyAndHead(body, features, outputs, head_scale=head_scale, generator=generator).to(device, dtype)


def linearize(network: nn.Module, x: Tensor) -> Linearization:
    """f and its Jacobian at the network's present θ: by autograd, unless the network offers it in closed form and no
    parameter is frozen, of which closed forms know nothing."""
    if in_closed_form(network):
        return cast(Linearization, network.linearize(x))  # type: ignore[operator]
    return AutogradLinearization(network, x)


def in_closed_form(network: nn.Module) -> bool:
    """Whether `linearize` needs no graph."""
    return hasattr(network, "linearize") and all(p.requires_grad for p in network.parameters())


def for_rollout(network: nn.Module, normalizer: ObservationNormalizer) -> Callable[[Tensor], Tensor]:
    """x ↦ network(normalizer(x)) for as long as nothing changes in either.

    A network may offer a `for_rollout(normalizer)` of its own; it is used only if the same class defines both it and
    `forward`.
    """
    kinds = type(network).__mro__
    own, called = (next((kind for kind in kinds if name in vars(kind)), None) for name in ("for_rollout", "forward"))
    if own is None or own is not called:
        return lambda x: network(normalizer(x))
    return network.for_rollout(normalizer)  # type: ignore[operator]
