"""The multilayer perceptron, its initialisation, and linearisations: f(θ + v) ≈ f(θ) + Jv.

A `Linearization` gives the output f(θ) [B, K] and the two products with the Jacobian J = ∂f/∂θ [B·K, P] from which
gradients (Jᵀu) and Gauss-Newton products (JᵀMJv) are built. `MlpLinearization` does it in closed form from cached
activations: one product costs four matrix passes and no graph. `AutogradLinearization` does it for any module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from trpo.kernels import by_columns, linear, mm, outer_sum, tanh
from trpo.parameters import Layout


class Linearization(Protocol):
    """f and its Jacobian at one θ and one batch of inputs."""

    output: Tensor  # f(θ) [B, K], detached

    def jvp(self, v: Tensor) -> Tensor:
        """Jv [B, K] for v [P]."""

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀu [P] for u [B, K]: summed, not averaged, over the batch."""


class Factors(NamedTuple):
    """Kronecker factors of one block of θ, summed over a batch: weight [m, n] then bias [m], or a bias alone."""

    inputs: Tensor  # [n + 1, n + 1] Σ h̃h̃ᵀ, h̃ = (h, 1)
    outputs: Tensor  # [m, m] Σ δδᵀ


# Each activation with its derivative as a function of (input z, output h).
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "tanh": (tanh, lambda z, h: torch.addcmul(h.new_ones(()), h, h, value=-1)),
    "relu": (torch.relu, lambda z, h: (h > 0).to(h.dtype)),
    "elu": (nn.functional.elu, lambda z, h: torch.where(h > 0, 1.0, h + 1)),
    "silu": (nn.functional.silu, lambda z, h: z.sigmoid() * (1 + z - h)),
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
        self._linears = layers  # the same modules: looking them up in a ModuleList costs more than a small product
        self.layout = Layout([p.shape for p in self.parameters()])
        for layer in layers:
            gain = head_scale if layer is layers[-1] else math.sqrt(2)
            nn.init.orthogonal_(layer.weight, gain, generator=generator)
            nn.init.zeros_(layer.bias)

    @property
    def linears(self) -> list[nn.Linear]:
        """The layers, first to last."""
        return self._linears

    def forward(self, x: Tensor) -> Tensor:
        """x [B, D] → [B, K]."""
        act = ACTIVATIONS[self.activation][0]
        *hidden, head = self._linears
        for layer in hidden:
            x = act(linear(x, layer.weight, layer.bias))
        return linear(x, head.weight, head.bias)

    def linearize(self, x: Tensor) -> MlpLinearization:
        """Closed-form linearisation at the current θ for inputs x [B, D]; later changes of θ do not touch it."""
        return MlpLinearization(self, x)


class MlpLinearization:
    """J of an `MLP` in closed form, from cached activations h and slopes σ′(z).

    Forward mode carries dz_l = dh_{l−1} W_lᵀ + h_{l−1} dW_lᵀ + db_l; reverse mode is ordinary backpropagation. The
    vector layout is that of `MLP.parameters()`.
    """

    def __init__(self, mlp: MLP, x: Tensor):
        self._activation = ACTIVATIONS[mlp.activation]
        # Looked up once: a module's attribute costs as much as a small product.
        self._parameters = [(layer.weight, layer.bias) for layer in mlp.linears]
        # Copies: the line search moves θ while this object still describes θ_old.
        self._weights = [torch.empty_like(layer.weight, requires_grad=False) for layer in mlp.linears]
        self._layout = mlp.layout
        self._pulled = x.new_empty(self._layout.total)
        self._pulled_parts = self._layout.split(self._pulled)
        self.move(x)

    @torch.no_grad()
    def move(self, x: Tensor) -> None:
        """Linearises anew, at the network's present θ and other inputs x of the same shape [B, D]."""
        act, slope = self._activation
        self._inputs = [x]
        self._slopes = []
        for copy, (weight, bias) in zip(self._weights, self._parameters, strict=True):
            copy.copy_(weight)
            z = linear(self._inputs[-1], weight, bias)
            if len(self._inputs) == len(self._weights):
                self.output = z
            else:
                h = act(z)
                self._inputs.append(h)
                self._slopes.append(slope(z, h))
        self._slopes_by_columns = [by_columns(slope) for slope in self._slopes]

    @torch.no_grad()
    def jvp(self, v: Tensor) -> Tensor:
        """Jv [B, K] for v [P]."""
        parts = self._layout.split(v)
        tangent = None
        for i, (d_weight, d_bias) in enumerate(zip(parts[0::2], parts[1::2], strict=True)):
            out = linear(self._inputs[i], d_weight, d_bias)
            if tangent is not None:
                out.add_(linear(tangent, self._weights[i]))
            if i < len(self._slopes):
                out.mul_(self._slopes[i])
            tangent = out
        assert tangent is not None
        return tangent

    @torch.no_grad()
    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀu [P] for u [B, K]."""
        parts, delta = self._pulled_parts, u
        for i in reversed(range(len(self._weights))):
            outer_sum(delta, self._inputs[i], out=parts[2 * i])
            torch.sum(delta, 0, out=parts[2 * i + 1])
            if i:
                delta = mm(delta, self._weights[i]).mul_(self._slopes_by_columns[i - 1])
        return self._pulled.clone()

    @torch.no_grad()
    def kronecker_factors(self, u: Tensor) -> list[Factors]:
        """Σ h̃h̃ᵀ and Σ δδᵀ of every layer, first to last, for output cotangents u [B, K]."""
        factors = []
        delta = u
        for i in reversed(range(len(self._weights))):
            h = self._inputs[i]
            ones = h.new_ones(len(h), 1)
            extended = torch.cat([h, ones], 1)
            factors.append(Factors(extended.T @ extended, delta.T @ delta))
            if i:
                delta = (delta @ self._weights[i]).mul_(self._slopes[i - 1])
        return factors[::-1]


class AutogradLinearization:
    """J of any module with respect to its parameters, by automatic differentiation.

    Jᵀw is linear in w, so differentiating ⟨Jᵀw, v⟩ with respect to w gives Jv: reverse mode twice, no forward mode
    needed from the module's operations. Both graphs are built once and kept for all products.
    """

    def __init__(self, module: nn.Module, x: Tensor):
        # Copies: writing θ goes through views whose changes autograd does not see, and would falsify kept graphs.
        copies = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
        self._parameters = list(copies.values())
        with torch.enable_grad():
            self._output = torch.func.functional_call(module, copies, (x,))
            self._dual = torch.zeros_like(self._output, requires_grad=True)
            pulled = torch.autograd.grad(
                self._output, self._parameters, self._dual, create_graph=True, materialize_grads=True
            )
            self._pulled = torch.cat([p.reshape(-1) for p in pulled])
        self.output = self._output.detach()

    def jvp(self, v: Tensor) -> Tensor:
        """Jv [B, K] for v [P]."""
        if not self._pulled.requires_grad:  # the output depends on no parameter
            return torch.zeros_like(self.output)
        return torch.autograd.grad(self._pulled, self._dual, v, retain_graph=True)[0]

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀu [P] for u [B, K]."""
        grads = torch.autograd.grad(self._output, self._parameters, u, retain_graph=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in grads])
