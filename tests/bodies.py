"""Layers of a user's own, named in settings as `bodies:<name>`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Gated(nn.Module):
    """Something that no MLP is: products of two layers, and a skip connection."""

    def __init__(self, inputs: int, width: int = 6):
        super().__init__()
        self.value, self.gate = nn.Linear(inputs, width), nn.Linear(inputs, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.value(x) * self.gate(x).sigmoid()], -1)


class Flat(nn.Module):
    def __init__(self, inputs: int):
        super().__init__()
        self.layer = nn.Linear(inputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).flatten()


class Narrow(nn.Linear):
    def __init__(self, inputs: int):
        super().__init__(inputs + 1, 3)


def drops(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 3), nn.Dropout(0.5))


def normalizes(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 3), nn.BatchNorm1d(3))


def number(inputs: int) -> int:
    return inputs


def raises(inputs: int) -> nn.Module:
    raise ZeroDivisionError("no layers left")
