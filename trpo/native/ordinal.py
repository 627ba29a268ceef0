"""Ordinal distributions by compiled code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trpo.native import library
from trpo.native.library import MOST_THREADS, plain, takes, threads


class NativeOrdinal:
    """The functions of mlp.c for distributions over `bins` values of each of some components, as `Ordinal` writes them.

    All return None where mlp.c had better not do it.

    Args:
        low: [A] first value of each component.
        width: [A] from one to the next.
        bins: n.
    """

    def __init__(self, low: Tensor, width: Tensor, bins: int):
        self.low, self.width, self.bins = low.float().contiguous(), width.float().contiguous(), bins
        self.components = len(low)

    def workspace(self) -> Tensor:
        """Memory for what the functions keep on the way."""
        return self.low.new_empty(MOST_THREADS * library.LIBRARY.mlp_padded(1) * self.bins)

    def log_probabilities(self, eta: Tensor) -> Tensor | None:
        """η [B, A n] → log p [n, B, A]."""
        if not self._fits(eta):
            return None
        out = eta.new_empty(self.bins, eta.shape[0], self.components)
        return self._call(library.LIBRARY.ordinal_log_probabilities, eta.shape[0], eta.contiguous(), out)

    def metric(self, p: Tensor, u: Tensor) -> Tensor | None:
        """p [n, B, A] and u [B, A n] → M u [B, A n], M the Fisher metric in η."""
        if not self._fits(u) or not plain(p) or p.shape != (self.bins, u.shape[0], self.components):
            return None
        out = torch.empty_like(u, memory_format=torch.contiguous_format)
        return self._call(library.LIBRARY.ordinal_metric, u.shape[0], p.contiguous(), u.contiguous(), out)

    def sample(self, eta: Tensor, noise: Tensor) -> Tensor | None:
        """η [B, A n] and normal noise [B, A] → values [B, A]."""
        if not self._fits(eta) or not plain(noise) or noise.shape != (eta.shape[0], self.components):
            return None
        out = torch.empty_like(noise, memory_format=torch.contiguous_format)
        return self._call(
            library.LIBRARY.ordinal_sample,
            eta.shape[0],
            eta.contiguous(),
            noise.contiguous(),
            self.low,
            self.width,
            out,
        )

    def _fits(self, eta: Tensor) -> bool:
        return takes(eta) and eta.dim() == 2 and eta.shape[1] == self.components * self.bins

    def _call(self, function: Any, rows: int, *tensors: Tensor) -> Tensor:
        work = self.workspace()
        memory = [tensor.data_ptr() for tensor in (*tensors, work)]
        function(rows, self.components, self.bins, *memory, threads())
        return tensors[-1]
