"""Noise with memory: exploration that tries a direction for a while instead of trembling."""

from __future__ import annotations

import torch
from torch import Tensor


class ColoredNoise:
    """Turns white Gaussian noise into noise of spectral density 1/f^β (Timmer & König 1995).

    Each value is N(0, 1) by itself, so that the actions a policy takes are distributed as it says. But the state holds
    traces of the noise before, which tell of the noise to come: given the state, the score no longer averages to zero,
    and the policy gradient is that of white noise only approximately. Nor are the scores of neighbouring steps
    independent, so that their sum scatters more. KL and Fisher matrix are functions of η and stay exact. β = 0 is
    white, 1 pink; 0.5 served on-policy learning best in Hollenstein et al. 2024 (AAAI 38, "Colored Noise in PPO").

    Args:
        length: T, time steps; noise repeats itself after T steps, as a finite Fourier sum does.
        exponent: β ≥ 0.
        like: dtype and device of the noise.
    """

    def __init__(self, length: int, exponent: float, *, like: Tensor):
        self.length = length
        self.white = exponent == 0
        # The mean of T steps gets the power of the slowest wave: 1/f^β has none to offer at f = 0.
        frequency = torch.arange(length // 2 + 1, dtype=torch.float64).clamp(min=1.0)
        amplitude = frequency ** (-exponent / 2)
        waves = torch.full_like(amplitude, 2.0)  # a sine and a cosine, but for f = 0 and the highest of an even T
        waves[0] = 1.0
        if length % 2 == 0:
            waves[-1] = 1.0
        amplitude /= ((waves * amplitude.square()).sum() / length).sqrt()  # variance 1
        self.amplitude = amplitude.to(like)[:, None, None]

    def __call__(self, white: Tensor) -> Tensor:
        """White noise [T, N, A] → coloured noise [T, N, A]."""
        if self.white:
            return white
        return torch.fft.irfft(torch.fft.rfft(white, dim=0) * self.amplitude, n=self.length, dim=0).contiguous()
