"""One flat vector θ behind all parameters of a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn


class FlatParameters:
    """Makes every parameter of `module` a view of one contiguous vector, so that reading or writing θ is one copy.

    Those with `requires_grad` off are frozen: no part of θ. Whatever moves the module breaks the views: `FlatModule`.

    Attributes:
        vector: θ [P], live: changes with the module and changes it.
    """

    def __init__(self, module: nn.Module):
        parameters = free_parameters(module)
        self.layout = Layout([p.shape for p in parameters])
        like = next(module.parameters(), None)
        if like is None:
            raise ValueError(f"{type(module).__name__} has no parameters, so that there is nothing to train")
        self.vector = torch.cat([like.detach().new_empty(0), *(p.detach().reshape(-1) for p in parameters)])
        for parameter, view in zip(parameters, self.layout.split(self.vector), strict=True):
            parameter.data = view

    def assign_(self, theta: Tensor) -> None:
        """θ ← `theta` [P]."""
        self.vector.copy_(theta)


class FlatModule(nn.Module):
    """A module that has `FlatParameters` as its `theta`, also after `to`, `double` and the like."""

    theta: FlatParameters

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.theta = FlatParameters(self)
        return self


def free_parameters(module: nn.Module) -> list[nn.Parameter]:
    """All that are not frozen, in the order of θ."""
    return [p for p in module.parameters() if p.requires_grad]


def functional(module: nn.Module, values: Mapping[nn.Parameter, Tensor]) -> Callable[[Tensor], Tensor]:
    """x ↦ module(x) with other values of some of its parameters."""
    # Each module once, under one name: whatever is named twice, `functional_call` would not put back.
    named = {
        name: values[p]
        for prefix, part in module.named_modules()
        for name, p in part.named_parameters(prefix, recurse=False)
        if p in values
    }
    return lambda x: torch.func.functional_call(module, named, (x,), tie_weights=False)


class Layout:
    """Where tensors of given shapes lie in one flat vector [P], in order."""

    def __init__(self, shapes: Sequence[torch.Size]):
        self.shapes = list(shapes)
        self.sizes = [shape.numel() for shape in shapes]
        self.total = sum(self.sizes)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of a vector [P] in the shapes."""
        parts = vector.split_with_sizes(self.sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]
