"""Random numbers as a function of (seed, position): SplitMix64 in torch integers, the same on every device.

A generator on a device gives one sequence to all environments, which so would change with their number and with how
they are spread over processes; and its numbers differ from device to device. Here each environment has a stream of its
own, any stretch of which is computed when it is needed: there is nothing to save but the position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15  # constants and shifts: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number…"
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def stream_keys(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Start of each seed's stream [N] int64; different seeds modulo 2⁶⁴ never share one."""
    wrapped = torch.tensor([_signed(int(seed) % (1 << 64)) for seed in seeds], dtype=torch.int64)
    return _mix(wrapped).to(device)


def uniform(keys: Tensor, first: int | Tensor, rows: int, width: int) -> Tensor:
    """Numbers in [0, 1), float64, multiples of 2⁻⁵³.

    Number n of stream k is mix(k + (n + 1)·γ) modulo 2⁶⁴, which is what a SplitMix64 generator of state k returns at
    its call n.

    Args:
        keys: [N] as of `stream_keys`.
        first: the first row wanted, or that number on the device of the keys; row r holds the numbers r·width …
            r·width + width − 1 of each stream.
        rows: how many.
        width: numbers in a row.

    Returns:
        [rows, width, N]
    """
    position = torch.arange(1, rows * width + 1, device=keys.device) + first * width
    bits = _mix(keys + (position * _signed(_GOLDEN)).view(rows, width, 1))
    return _shifted(bits, 11).double().mul_(2.0**-53)


def _mix(x: Tensor) -> Tensor:
    """The output function of SplitMix64, a bijection of 64-bit integers; products wrap."""
    x = (x ^ _shifted(x, 30)) * _signed(_FACTORS[0])
    x = (x ^ _shifted(x, 27)) * _signed(_FACTORS[1])
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """x ≫ by without the sign, which torch's shift of a signed integer copies."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    """The int64 with the bits of the unsigned integer x."""
    return x - (1 << 64) if x >= 1 << 63 else x
