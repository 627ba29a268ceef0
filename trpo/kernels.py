"""The few operations that networks spend their time in, as fast as the CPU allows where no gradient is asked for.

Everywhere else (a GPU, float64 products, autograd, compilation) they are torch's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def _intel() -> bool:
    """Whether this is one of Intel's CPUs; where that cannot be read, it is not."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


# Torch multiplies float32 matrices with MKL, which uses AVX-512 on Intel's CPUs alone; oneDNN, which torch brings along
# for its compiler, on all: half the time there, and a third more on Intel's. With fewer rows its set-up costs more than
# it saves.
_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_ONEDNN_PAYS = _LINEAR is not None and not _intel()
_ONEDNN_ROWS = 512
_ONEDNN_COLUMNS = 16


def tanh(z: Tensor) -> Tensor:
    """`torch.tanh`; NumPy's where it can be, which is vectorised and many times as fast."""
    if _plain(z) and z.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.tanh(z.numpy()))
    return torch.tanh(z)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias [B, m] for x [B, n], weight [m, n] and bias [m]."""
    return _onednn(x, weight, bias) if _worth_onednn(x) else nn.functional.linear(x, weight, bias)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a b [B, m] for a [B, n] and b [n, m], stored as `by_columns` stores it."""
    return _onednn(b.T, a, None).T if _worth_onednn(a) else torch.mm(a, b)


def by_columns(x: Tensor) -> Tensor:
    """x [B, m], stored column after column where `outer_sum` reads it twice as fast so."""
    return x.T.contiguous().T if _worth_onednn(x) else x


def outer_sum(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """Σ_i a_i b_iᵀ [m, n] for a [B, m] and b [B, n]."""
    m, n = out.shape
    if _worth_onednn(a) and (a.T.is_contiguous() or min(m, n) >= _ONEDNN_COLUMNS):
        out.copy_(_onednn(a.T, b.T, None))
    elif n < m:
        # BLAS libraries are slow where the result is narrow, not where it is flat: 3.5 times at 64 × 11.
        out.copy_(torch.mm(b.T, a).T)
    else:
        torch.mm(a.T, b, out=out)


def _plain(x: Tensor) -> bool:
    return x.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _worth_onednn(x: Tensor) -> bool:
    # The number of rows last: asking for it while an exporter traces would make it a constant.
    return _ONEDNN_PAYS and x.dtype == torch.float32 and _plain(x) and len(x) >= _ONEDNN_ROWS


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = _LINEAR(x, weight, bias, "none", [], "")
    return product
