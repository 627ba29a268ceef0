"""The multilayer perceptron, its initialisation, and its linearisation in closed form, compiled or not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from trpo.native import NativeActor, NativeMlp, checked
from trpo.networks.linearization import Factors
from trpo.networks.parameters import Layout
from trpo.normalizer import ObservationNormalizer

# Each activation σ with δ ↦ δ σ′(z), as a function of δ, input z and output h.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "tanh": (torch.tanh, lambda delta, z, h: torch.ops.aten.tanh_backward(delta, h)),
    "relu": (torch.relu, lambda delta, z, h: torch.ops.aten.threshold_backward(delta, h, 0)),
    "elu": (nn.functional.elu, lambda delta, z, h: torch.ops.aten.elu_backward(delta, 1, 1, 1, True, h)),
    "silu": (nn.functional.silu, lambda delta, z, h: torch.ops.aten.silu_backward(delta, z)),
}


class MLP(nn.Module):
    """Fully connected network: D → hidden sizes → K, linear output.

    Orthogonal weights with gain √2 in hidden layers and `head_scale` in the last one, zero biases.
    """

    def __init__(self, sizes: Sequence[int], *, activation: str, head_scale: float, generator: torch.Generator):
        super().__init__()
        self.activation = activation
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        self.layers = nn.ModuleList(layers)
        self.linears = layers  # the same ones: looking them up in a ModuleList costs more than a small product
        self.layout = Layout([p.shape for p in self.parameters()])
        self.native = NativeMlp.of(layers, activation)
        for layer in layers:
            gain = head_scale if layer is layers[-1] else math.sqrt(2)
            initialize_(layer, gain, generator)

    @property
    def head(self) -> nn.Linear:
        """The last layer."""
        return self.linears[-1]

    @property
    def compiled(self) -> bool:
        """Whether compiled code does what it can do of this network."""
        return self.native is not None and self.native.readable()

    def forward(self, x: Tensor) -> Tensor:
        """x [B, D] → [B, K]."""
        if self.native is not None and self.native.fits(x) and (out := self.native.forward(x)) is not None:
            return out
        act = ACTIVATIONS[self.activation][0]
        *hidden, head = self.linears
        for layer in hidden:
            x = act(layer(x))
        return head(x)

    def actor(self, normalizer: ObservationNormalizer, obs: Tensor) -> NativeActor | None:
        """This network on normalised observations [T, N, D] of a rollout, compiled; None where that cannot be."""
        if self.native is None or type(self) is not MLP or type(normalizer) is not ObservationNormalizer:
            return None
        return self.native.actor(*normalizer.affine, obs)

    @torch.no_grad()
    def linearize(self, x: Tensor) -> ClosedForm:
        """Closed-form linearisation at the current θ for inputs x [B, D]; later changes of θ do not touch it."""
        if self.native is not None and self.native.fits(x) and self.native.readable():
            return NativeLinearization(self.native, self.layout.total, x)
        return MlpLinearization(self, x)


def initialize_(layer: nn.Linear, gain: float, generator: torch.Generator) -> None:
    """Orthogonal weights, zero biases: the same for a seed however many threads torch has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # or the decomposition within rounds in another way
    try:
        nn.init.orthogonal_(layer.weight, gain, generator=generator)
        nn.init.zeros_(layer.bias)
    finally:
        torch.set_num_threads(threads)


class MlpLinearization:
    """J of an `MLP` in closed form, from cached inputs z and outputs h = σ(z) of the activations.

    Forward mode carries dz_l = dh_{l−1} W_lᵀ + h_{l−1} dW_lᵀ + db_l; reverse mode is ordinary backpropagation. The
    vector layout is that of `MLP.parameters()`.
    """

    def __init__(self, mlp: MLP, x: Tensor):
        self._mlp = mlp
        self._through = ACTIVATIONS[mlp.activation][1]
        self._ones = x.new_ones(len(x))
        self.move(x)

    @torch.no_grad()
    def move(self, x: Tensor) -> None:
        """Linearises anew, at the network's present θ and other inputs x of the same shape [B, D]."""
        act = ACTIVATIONS[self._mlp.activation][0]
        # Copies: the line search moves θ while this object still describes θ_old.
        self._weights = [layer.weight.clone() for layer in self._mlp.linears]
        self._inputs: list[Tensor] = []
        self._sums: list[Tensor] = []  # z
        *hidden, head = self._mlp.linears
        for layer in hidden:
            self._inputs.append(x)
            z = layer(x)
            self._sums.append(z)
            x = act(z)
        self._inputs.append(x)
        self.output = head(x)

    @torch.no_grad()
    def jvp(self, v: Tensor) -> Tensor:
        """Jv [B, K] for v [P]."""
        parts = self._mlp.layout.split(v)
        tangent = torch.addmm(parts[1], self._inputs[0], parts[0].T)
        for i, z in enumerate(self._sums, start=1):
            tangent = self._through(tangent, z, self._inputs[i])
            d_weight, d_bias = parts[2 * i], parts[2 * i + 1]
            tangent = torch.addmm(d_bias, self._inputs[i], d_weight.T).addmm_(tangent, self._weights[i].T)
        return tangent

    @torch.no_grad()
    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀu [P] for u [B, K]."""
        parts: list[Tensor] = []
        for i, delta in self._backwards(u):
            # On a GPU a product with ones sums long columns faster than `sum` does.
            summed = delta.sum(0) if delta.is_cpu else delta.T @ self._ones
            parts = [(delta.T @ self._inputs[i]).flatten(), summed, *parts]
        return torch.cat(parts)

    @torch.no_grad()
    def kronecker_factors(self, u: Tensor) -> list[Factors]:
        """Σ h̃h̃ᵀ and Σ δδᵀ of every layer, first to last, for output cotangents u [B, K]."""
        factors = []
        for i, delta in self._backwards(u):
            extended = nn.functional.pad(self._inputs[i], (0, 1), value=1.0)
            factors.append(Factors(extended.T @ extended, delta.T @ delta))
        return factors[::-1]

    def _backwards(self, delta: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Backpropagation: (l, δ_l = ∂/∂z_l [B, n_l]) from the last layer to the first."""
        for i in reversed(range(len(self._weights))):
            yield i, delta
            if i:
                delta = self._through(delta @ self._weights[i], self._sums[i - 1], self._inputs[i])


class NativeLinearization:
    """The same by compiled code, for float32 on a CPU.

    Args:
        native: the network.
        parameters: P.
        x: inputs [B, D].
    """

    def __init__(self, native: NativeMlp, parameters: int, x: Tensor):
        self._native = native
        self._parameters = parameters
        self._shape = x.shape
        self._workspace = native.workspace(x, len(x))
        self.move(x)

    @torch.no_grad()
    def move(self, x: Tensor) -> None:
        """Linearises anew, at the network's present θ and other inputs x of the same shape [B, D]."""
        output = self._native.forward(checked(x, self._shape, "x"), self._workspace)
        if output is None:
            raise ValueError("the network's parameters are no longer what this linearisation was made for")
        self.output = output

    def jvp(self, v: Tensor) -> Tensor:
        """Jv [B, K] for v [P]."""
        v = checked(v, (self._parameters,), "v")
        return self._native.jvp(v, torch.empty_like(self.output), self._workspace)

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀu [P] for u [B, K]."""
        u = checked(u, self.output.shape, "u")
        return self._native.vjp(u, u.new_empty(self._parameters), self._workspace)

    @torch.no_grad()
    def kronecker_factors(self, u: Tensor) -> list[Factors]:
        """Σ h̃h̃ᵀ and Σ δδᵀ of every layer, first to last, for output cotangents u [B, K]."""
        u = checked(u, self.output.shape, "u")
        return [Factors(*pair) for pair in self._native.factors(u, self._workspace)]


ClosedForm = MlpLinearization | NativeLinearization
