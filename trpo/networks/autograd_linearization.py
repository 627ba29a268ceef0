"""The linearisation of any module, by automatic differentiation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from trpo.networks.parameters import free_parameters, functional


@contextmanager
def twice_differentiable(*modules: nn.Module) -> Iterator[None]:
    """Within, torch leaves out what has no second derivative: fused attention, and cuDNN if there are `nn.RNNBase`.

    For the whole process: threads that enter this have to do so within one that is entered around all of them.
    """
    before = torch.backends.cudnn.enabled
    recurrent = any(isinstance(part, nn.RNNBase) for module in modules for part in module.modules())
    torch.backends.cudnn.enabled = before and not recurrent
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cudnn.enabled = before


class AutogradLinearization:
    """J of any module with respect to its parameters, but for frozen ones, by automatic differentiation.

    Jᵀw is linear in w, so differentiating ⟨Jᵀw, v⟩ with respect to w gives Jv: reverse mode twice, no forward mode
    needed from the module's operations. Both graphs are kept for all products; the second is built with the first Jv.

    Raises:
        ValueError: all parameters are frozen.
    """

    def __init__(self, module: nn.Module, x: Tensor):
        # Copies: writing θ goes through views whose changes autograd does not see, and would falsify kept graphs.
        of: dict[nn.Parameter, Tensor] = {p: p.detach().clone().requires_grad_() for p in free_parameters(module)}
        if not of:
            raise ValueError("all parameters of the network are frozen: there is nothing to train")
        self._parameters = list(of.values())
        self.size = sum(p.numel() for p in of)
        with torch.enable_grad(), twice_differentiable(module):
            self._output = functional(module, of)(x)
            self._dual = torch.zeros_like(self._output, requires_grad=True)
        self.output = self._output.detach()

    @cached_property
    def _pulled(self) -> Tensor:
        """Jᵀw [P] as a function of w; not everyone asks for Jv."""
        with torch.enable_grad():
            pulled = torch.autograd.grad(
                self._output, self._parameters, self._dual, create_graph=True, materialize_grads=True
            )
            return torch.cat([p.reshape(-1) for p in pulled])

    def jvp(self, v: Tensor) -> Tensor:
        """Jv [B, K] for v [P]."""
        if not self._pulled.requires_grad:  # the output depends on no parameter
            return torch.zeros_like(self.output)
        return torch.autograd.grad(self._pulled, self._dual, v, retain_graph=True)[0]

    def vjp(self, u: Tensor) -> Tensor:
        """Jᵀu [P] for u [B, K]."""
        grads = torch.autograd.grad(self._output, self._parameters, u, retain_graph=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in grads])
