"""Carried sums against the linear system that they solve."""

from __future__ import annotations

import pytest
import torch
from helpers import randn
from torch import Tensor

from trpo import native
from trpo.carried_sums import carried_sums_
from trpo.native import library


def solved(x: Tensor, carry: Tensor, *, reverse: bool) -> Tensor:
    """y with y_{t+1} − c_t y_t = x_{t+1}, or y_t − c_t y_{t+1} = x_t: one triangular system for each column."""
    columns = []
    for some, c in zip(x.flatten(1).T, carry.flatten(1).T, strict=True):
        system = torch.eye(len(x), dtype=x.dtype) - torch.diag(c, 1 if reverse else -1)
        columns.append(torch.linalg.solve(system, some))
    return torch.stack(columns, 1).view_as(x)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (7, 16), (128, 5), (9, 2, 3)], ids=str)
@torch.no_grad()
def test_they_solve_their_recurrence(
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, ...],
    reverse: bool,
    dtype: torch.dtype,
    tolerance: float,
    compiled: bool,
) -> None:
    if not compiled:
        monkeypatch.setattr(library, "LIBRARY", None)
    x, carry = randn(*shape), randn(shape[0] - 1, *shape[1:], seed=1).clamp(-0.95, 0.95)
    given, c = x.to(dtype, copy=True), carry.to(dtype)
    before = c.clone()
    result = carried_sums_(given, c, reverse=reverse)
    assert result is given and torch.equal(c, before)
    # Some units of rounding in each term, of sums that forget a term within some tens of steps.
    torch.testing.assert_close(given.double(), solved(x, carry, reverse=reverse), rtol=0, atol=tolerance)


@pytest.mark.skipif(not native.available(), reason="the compiled functions were not built")
@torch.no_grad()
def test_what_c_cannot_read_it_does_not_see() -> None:
    x, carry = randn(6, 4), randn(5, 4, seed=1)
    before = x.clone()
    assert not native.carried_sums(x, carry[:4], reverse=False)
    assert not native.carried_sums(x, carry[:, :3], reverse=False)
    assert not native.carried_sums(x, carry.float(), reverse=False)
    assert not native.carried_sums(x.half(), carry.half(), reverse=False)
    assert not native.carried_sums(x, randn(5, 8, seed=1)[:, ::2], reverse=False)
    with torch.enable_grad():
        assert not native.carried_sums(x, carry, reverse=False)
    assert torch.equal(x, before)
    assert native.carried_sums(x, carry, reverse=False) and not torch.equal(x, before)


@torch.no_grad()
def test_columns_apart_in_memory_are_summed_all_the_same() -> None:
    wide, carry = randn(6, 8), randn(5, 4, seed=1)
    expected = solved(wide[:, ::2].clone(), carry, reverse=True)
    carried_sums_(wide[:, ::2], carry, reverse=True)
    torch.testing.assert_close(wide[:, ::2], expected, rtol=0, atol=1e-13)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(4, 4), (6, 4), (7, 4), (5, 1), (5,)], ids=str)
def test_a_carry_that_does_not_lie_between_the_rows_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a carry of shape"):
        carried_sums_(randn(6, 4), randn(*shape))
