"""One flat vector θ behind all parameters of a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FlatParameters:
    """Makes every parameter of `module` a view of one contiguous vector, so that reading or writing θ is one copy.

    Call after the module is on its device and in its dtype: moving it later would break the views.

    Attributes:
        vector: θ [P], live: changes with the module and changes it.
    """

    def __init__(self, module: nn.Module):
        parameters = list(module.parameters())
        self.shapes = [p.shape for p in parameters]
        self.vector = torch.cat([p.detach().reshape(-1) for p in parameters])
        for parameter, view in zip(parameters, self.split(self.vector), strict=True):
            parameter.data = view

    def assign_(self, theta: Tensor) -> None:
        """θ ← `theta` [P]."""
        self.vector.copy_(theta)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of a vector [P] in the shapes of the parameters."""
        return split_like(vector, self.shapes)


def split_like(vector: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    """Cuts a vector [Σ numel] into views of the given shapes, in order."""
    parts = vector.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
