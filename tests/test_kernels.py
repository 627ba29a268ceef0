"""The fast operations against plain ones in float64, on both sides of the sizes where they change hands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import randn, relative_error
from torch import Tensor

from trpo import kernels
from trpo.kernels import by_columns, linear, mm, outer_sum, tanh

FEW, MANY = 7, kernels._ONEDNN_ROWS
NARROW, WIDE = 3, 64
# Sums of up to 512 float32 products of size 1: some tens of units of 6e-8.
TOLERANCE = 1e-5


def operands(rows: int, n: int, m: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return randn(rows, n).to(dtype), randn(m, n, seed=1).to(dtype), randn(m, seed=2).to(dtype)


@pytest.fixture(params=["oneDNN", "MKL"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both, whichever is faster on this CPU."""
    if request.param == "oneDNN" and kernels._LINEAR is None:
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(kernels, "_ONEDNN_PAYS", request.param == "oneDNN")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rows", [FEW, MANY - 1, MANY])
@pytest.mark.parametrize("n", [NARROW, WIDE])
@pytest.mark.parametrize("m", [NARROW, WIDE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_products(rows: int, n: int, m: int, dtype: torch.dtype) -> None:
    x, weight, bias = operands(rows, n, m, dtype)
    tolerance = TOLERANCE if dtype == torch.float32 else 1e-14
    expected = x.double() @ weight.double().T
    assert relative_error(mm(x, weight.T), expected) < tolerance
    assert relative_error(linear(x, weight), expected) < tolerance
    assert relative_error(linear(x, weight, bias), expected + bias.double()) < tolerance
    out, other = torch.empty(m, n, dtype=dtype), randn(rows, m, seed=5).to(dtype)
    for stored in (other, by_columns(other)):
        assert torch.equal(stored, other)
        outer_sum(stored, x, out=out)
        assert relative_error(out, other.double().T @ x.double()) < tolerance
    assert relative_error(tanh(x), torch.tanh(x.double())) < tolerance


@pytest.mark.skipif(kernels._LINEAR is None, reason="torch was built without oneDNN")
@pytest.mark.parametrize(
    ("run", "fast"),
    [
        (lambda x, w: linear(x, w), True),
        (lambda x, w: linear(x[1:], w), False),  # too few rows
        (lambda x, w: linear(x.double(), w.double()), False),
        (lambda x, w: mm(x, w.T), True),
        (lambda x, w: outer_sum(x, x, out=torch.empty(WIDE, WIDE)), True),
        (lambda x, w: outer_sum(x[:, :NARROW], x, out=torch.empty(NARROW, WIDE)), False),
        (lambda x, w: outer_sum(by_columns(x[:, :NARROW]), x, out=torch.empty(NARROW, WIDE)), True),
    ],
)
@torch.no_grad()
def test_onednn_multiplies_where_it_is_faster(
    run: Callable[[Tensor, Tensor], object], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, multiply = [], kernels._LINEAR

    def counted(*arguments: object) -> Tensor:
        calls.append(arguments)
        return multiply(*arguments)

    monkeypatch.setattr(kernels, "_LINEAR", counted)
    for pays in (True, False):
        monkeypatch.setattr(kernels, "_ONEDNN_PAYS", pays)
        calls.clear()
        run(randn(MANY, WIDE).float(), randn(WIDE, WIDE, seed=1).float())
        assert bool(calls) == (fast and pays)


def test_gradients_flow_where_they_are_asked_for() -> None:
    x, weight, bias = (t.double().requires_grad_() for t in operands(MANY, WIDE, NARROW))
    assert torch.autograd.gradcheck(lambda *t: tanh(linear(*t))[:2], (x, weight, bias), fast_mode=True)
    single = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
    tanh(linear(*single)).sum().backward()
    assert all(t.grad is not None for t in single)
