"""Layers of a user's own, named in settings as `bodies:<name>`."""

from __future__ import annotations

from typing import ClassVar

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


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()


def convolution(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, inputs)), nn.Conv1d(1, 8, 2), nn.Tanh(), nn.Flatten())


def diverges(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 3), Log())


def drops(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 3), nn.Dropout(0.5))


def normalizes(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 3), nn.BatchNorm1d(3))


def number(inputs: int) -> int:
    return inputs


def raises(inputs: int) -> nn.Module:
    raise ZeroDivisionError("no layers left")


class Twice(nn.Module):
    """One layer used twice, under two names."""

    def __init__(self, inputs: int, width: int = 6):
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.a = nn.Linear(width, width)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(torch.tanh(self.first(x))))))


class Attention(nn.Module):
    """Causal, with a mask of −∞, over the components of an observation."""

    def __init__(self, inputs: int):
        super().__init__()
        self.embed, self.attend = nn.Linear(1, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.register_buffer("mask", torch.full((inputs, inputs), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x[..., None])
        return self.attend(h, h, h, attn_mask=self.mask, need_weights=False)[0].mean(1)


class Recurrent(nn.Module):
    """Over the components of an observation, one after the other."""

    def __init__(self, inputs: int):
        super().__init__()
        self.layer = nn.GRU(1, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[..., None])[0][:, -1]


class Looking(Recurrent):
    """Writes down whether cuDNN would do its layer."""

    enabled: ClassVar[set[bool]] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.enabled.add(torch.backends.cudnn.enabled)
        return super().forward(x)


class Keeping(nn.Module):
    """Makes a table when it is called first, and keeps it."""

    def __init__(self, inputs: int):
        super().__init__()
        self.layer, self.table = nn.Linear(inputs, 4), torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.table) != len(x):
            self.table = torch.linspace(0.5, 1, 4, dtype=x.dtype, device=x.device).expand(len(x), 4)
        return (self.layer(x) * self.table).tanh() * self.table


class Frozen(Twice):
    def __init__(self, inputs: int):
        super().__init__(inputs)
        self.first.requires_grad_(False)


def lazy(inputs: int) -> nn.Module:
    return nn.Sequential(nn.LazyLinear(5), nn.Tanh())


_ONE = nn.Linear(3, 5)


def always_the_same(inputs: int) -> nn.Module:
    return _ONE


class Counting(nn.Module):
    """Running statistics of its own."""

    def __init__(self, inputs: int):
        super().__init__()
        self.layer = nn.Linear(inputs, 4)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        self.seen.lerp_(h.mean(0), 0.1)
        return h - self.seen


class Numbering(nn.Linear):
    """Counts its calls, which nothing that it gives depends on."""

    def __init__(self, inputs: int):
        super().__init__(inputs, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(x)


class Noisy(nn.Linear):
    def __init__(self, inputs: int):
        super().__init__(inputs, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.randn(4)


class Centred(nn.Linear):
    def __init__(self, inputs: int):
        super().__init__(inputs, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        return h - h.mean(0)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return 2 * grad


class NotTwice(nn.Linear):
    def __init__(self, inputs: int):
        super().__init__(inputs, 4)

    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(super().forward(x))


def pair(inputs: int) -> nn.Module:
    return nn.GRU(inputs, 4)


def halved(inputs: int) -> nn.Module:
    class Halved(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).half()

    return Halved(inputs, 4)
