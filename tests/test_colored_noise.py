"""Coloured noise against its definition: unit variance at every step, spectral density 1/f^β."""

from __future__ import annotations

import pytest
import torch
from helpers import F64, randn, seeded

from trpo.colored_noise import ColoredNoise


def filter_matrix(length: int, exponent: float) -> torch.Tensor:
    """The linear map from white to coloured noise [T, T], column by column."""
    white = torch.eye(length, dtype=F64)[:, None, :]
    return ColoredNoise(length, exponent, like=white)(white)[:, 0, :]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 128])
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_every_value_has_variance_1(length: int, exponent: float) -> None:
    covariance = filter_matrix(length, exponent) @ filter_matrix(length, exponent).T
    # Exact but for the rounding of two transforms in float64.
    torch.testing.assert_close(covariance.diagonal(), torch.ones(length, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_spectral_density_falls_as_a_power_of_the_frequency(exponent: float) -> None:
    """The spectral density is the Fourier transform of the stationary covariance (Wiener and Khinchin)."""
    filter_ = filter_matrix(64, exponent)
    density = torch.fft.rfft((filter_ @ filter_.T)[0]).real
    frequency = torch.arange(1, 33, dtype=F64)
    torch.testing.assert_close(density[1:], density[1] * frequency**-exponent, rtol=1e-10, atol=0)
    torch.testing.assert_close(density[0], density[1], rtol=1e-10, atol=0)


def test_neighbouring_steps_resemble_each_other_and_neighbouring_environments_do_not() -> None:
    noise = ColoredNoise(128, 1.0, like=torch.empty(0))(torch.randn(128, 2000, 1, generator=seeded()))[..., 0]
    # 2000 environments: correlations of independent values have a standard error of 0.022 and less over 128 steps.
    assert (noise[1:] * noise[:-1]).mean() > 0.5
    assert (noise[:, 1:] * noise[:, :-1]).mean().abs() < 0.02


def test_an_exponent_of_0_leaves_the_noise_as_it_is() -> None:
    white = randn(8, 3, 2)
    assert torch.equal(ColoredNoise(8, 0.0, like=white)(white), white)
