"""Networks by compiled code: outputs, Jacobian products, Kronecker factors, a fit by Adam; and policies that act."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from trpo.native import library
from trpo.native.library import (
    BLOCK,
    DOUBLE,
    FLOAT,
    LONG,
    MOST_THREADS,
    NUMBERS,
    addresses,
    available,
    plain,
    takes,
    threads,
)
from trpo.native.ordinal import NativeOrdinal
from trpo.native.vectors import takes_vectors

ACTIVATIONS = {"tanh": 0, "relu": 1}  # by their numbers in mlp.c
MOST_LAYERS = 16


class NativeMlp:
    """The functions of mlp.c for one network.

    Args:
        layers: first to last; their parameters are read anew at each call.
        activation: of `ACTIVATIONS`.
    """

    def __init__(self, layers: Sequence[nn.Linear], activation: str):
        self.layers = layers
        self.activation = activation
        self.input_dim, self.output_dim = layers[0].in_features, layers[-1].out_features
        self._activation = ACTIVATIONS[activation]
        widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
        self._network = ((LONG * len(widths))(*widths), len(layers))

    def __reduce__(self) -> tuple[Any, ...]:
        return NativeMlp, (self.layers, self.activation)  # ctypes' arrays cannot be pickled

    @classmethod
    def of(cls, layers: Sequence[nn.Linear], activation: str) -> NativeMlp | None:
        """None where mlp.c does not know the activation, or so many layers."""
        return cls(layers, activation) if activation in ACTIVATIONS and len(layers) <= MOST_LAYERS else None

    def fits(self, x: Tensor) -> bool:
        """Whether x are inputs of this network that may be worked on."""
        return x.dim() == 2 and x.shape[1] == self.input_dim and takes(x)

    def readable(self) -> bool:
        """Whether mlp.c is there and can read the parameters as they are now."""
        return available() and self._parameters() is not None

    def _parameters(self) -> list[Tensor] | None:
        """W and b of each layer, first to last, if mlp.c can read them."""
        # Not by attributes, which for a module cost as much as a small product.
        found = [p for layer in self.layers for p in layer._parameters.values() if p is not None]
        usable = len(found) == 2 * len(self.layers) and all(plain(p) and p.is_contiguous() for p in found)
        return list(found) if usable else None

    def workspace(self, x: Tensor, rows: int) -> Tensor:
        """Memory for what `forward` keeps of `rows` rows; of the kind of x."""
        return x.new_empty(library.LIBRARY.mlp_workspace(*self._network, rows))

    def forward(self, x: Tensor, workspace: Tensor | None = None) -> Tensor | None:
        """f(θ) [B, K] of plain x [B, D], or None where mlp.c cannot read the parameters.

        In a `workspace` for B rows, what `jvp` and `vjp` need is kept.
        """
        parameters = self._parameters()
        if parameters is None:
            return None
        x, rows = x.contiguous(), len(x)
        work = self.workspace(x, library.LIBRARY.mlp_passing(rows)) if workspace is None else workspace
        out = x.new_empty(rows, self.output_dim)
        library.LIBRARY.mlp_forward(
            *self._network,
            self._activation,
            addresses(parameters),
            x.data_ptr(),
            rows,
            workspace is not None,
            out.data_ptr(),
            work.data_ptr(),
            threads(),
        )
        return out

    def actor(self, shift: Tensor, scale: Tensor, bound: float, obs: Tensor) -> NativeActor | None:
        """x ↦ f(clip((x − shift) · scale, ±bound)) with the parameters as they are now, in a rollout.

        Args:
            shift, scale: [D] float64.
            bound: of the normalised observations.
            obs: [T, N, D] raw observations, which need not be there yet.

        Returns:
            None where mlp.c cannot do it.
        """
        parameters = self._parameters()
        if library.LIBRARY is None or parameters is None:
            return None
        if not all(plain(v, torch.float64) and v.shape == (self.input_dim,) for v in (shift, scale)):
            return None
        kinds = (torch.float32, torch.float64)
        if not (obs.dim() == 3 and obs.shape[2] == self.input_dim and any(plain(obs, kind) for kind in kinds)):
            return None
        if not obs.is_contiguous():
            return None
        return NativeActor(self, addresses(parameters), shift, scale, bound, obs)

    def jvp(self, v: Tensor, out: Tensor, workspace: Tensor) -> Tensor:
        """Jv, into `out` [B, K], for a checked v [P]."""
        memory = out.data_ptr(), workspace.data_ptr()
        library.LIBRARY.mlp_jvp(*self._network, self._activation, v.data_ptr(), len(out), *memory, threads())
        return out

    def vjp(self, u: Tensor, out: Tensor, workspace: Tensor) -> Tensor:
        """Jᵀu, into `out` [P], for a checked u [B, K]."""
        memory = out.data_ptr(), workspace.data_ptr()
        library.LIBRARY.mlp_vjp(*self._network, self._activation, u.data_ptr(), len(u), *memory, threads())
        return out

    def factors(self, u: Tensor, workspace: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Σ h̃h̃ᵀ [n + 1, n + 1], h̃ = (h, 1), and Σ δδᵀ [m, m] of all layers, for a checked u [B, K]."""
        sizes = [size for layer in self.layers for size in (layer.in_features + 1, layer.out_features)]
        areas = [size * library.LIBRARY.mlp_padded(size) for size in sizes]
        out = u.new_empty(sum(areas))
        library.LIBRARY.mlp_factors(
            *self._network, self._activation, u.data_ptr(), len(u), out.data_ptr(), workspace.data_ptr()
        )
        square = [part.view(size, -1)[:, :size] for part, size in zip(out.split(areas), sizes, strict=True)]
        return list(zip(square[::2], square[1::2], strict=True))

    def fits_to(self, x: Tensor, y: Tensor, theta: Tensor, mean: Tensor, square: Tensor) -> bool:
        """Whether `adam` may fit this network to y at x: theta [P] is its parameters, in order, one after the other."""
        # However many threads there are: all steps in one call outrun what several gain within one.
        parameters = self._parameters()
        if parameters is None or not self.fits(x) or not takes_vectors(theta, mean, square):
            return False
        *starts, size = accumulate((parameter.numel() for parameter in parameters), initial=0)
        return (
            [parameter.data_ptr() for parameter in parameters] == [theta.data_ptr() + 4 * start for start in starts]
            and len(theta) == size
            and y.shape == (len(x), self.output_dim)
            and plain(y)
        )

    def adam(
        self,
        x: Tensor,
        y: Tensor,
        order: Tensor,
        rows: Sequence[int],
        theta: Tensor,
        mean: Tensor,
        square: Tensor,
        *,
        betas: tuple[float, float],
        epsilons: Sequence[float],
        rates: Sequence[float],
    ) -> None:
        """`adam_step` on E|f(x) − y|² of one minibatch after another, for what `fits_to`.

        Each is of so many `rows`, of which `order` [sum of `rows`] says which they are.
        """
        count, most = len(rows), max(rows)
        if len(epsilons) != count or len(rates) != count or min(rows) < 1:
            raise ValueError(f"{count} minibatches, the least of {min(rows)} rows, and {len(rates)} rates")
        if order.shape != (sum(rows),) or not plain(order, torch.int64):
            raise ValueError(f"minibatches of {sum(rows)} rows, in an order of {order.dtype} {list(order.shape)}")
        first, last = (int(row) for row in order.aminmax())
        if first < 0 or last >= len(x):
            raise ValueError(f"minibatches take rows {first} to {last} of {len(x)}")
        work = x.new_empty(
            library.LIBRARY.mlp_workspace(*self._network, most)
            + library.LIBRARY.mlp_padded(most * self.output_dim)
            + library.LIBRARY.mlp_padded(len(theta))
        )
        x, y, order = x.contiguous(), y.contiguous(), order.contiguous()
        library.LIBRARY.mlp_adam(
            *self._network,
            self._activation,
            *(tensor.data_ptr() for tensor in (theta, mean, square, x, y, order)),
            count,
            (LONG * count)(*rows),
            (FLOAT * count)(*epsilons),
            (FLOAT * count)(*rates),
            *betas,
            work.data_ptr(),
        )


_NORMAL, _ORDINAL = 1, 2  # kinds of `Policy` of mlp.c; 0: its outputs are all that is wanted


class _Policy(ctypes.Structure):
    """`Policy` of mlp.c."""

    _fields_ = (
        ("widths", ctypes.POINTER(LONG)),
        *((name, LONG) for name in ("layers", "activation", "wide", "rows")),
        *((name, NUMBERS) for name in ("obs", "shift", "scale")),
        ("clip", DOUBLE),
        *((name, NUMBERS) for name in ("out", "work")),
        *((name, LONG) for name in ("kind", "components")),
        *((name, NUMBERS) for name in ("noise", "action", "std")),
        ("bins", LONG),
        *((name, NUMBERS) for name in ("low", "width", "vectors")),
    )


class NativeActor:
    """A network as it was when this was made, and what draws its actions, in a rollout: of `NativeMlp.actor`.

    Everything that is looked at first is looked at once for all steps. For one thread of Python.
    """

    def __init__(self, mlp: NativeMlp, parameters: Any, shift: Tensor, scale: Tensor, bound: float, obs: Tensor):
        self._out = obs.new_empty(obs.shape[1], mlp.output_dim, dtype=torch.float32)
        work = mlp.workspace(self._out, MOST_THREADS * BLOCK)
        library.LIBRARY.mlp_freeze(*mlp._network, parameters, work.data_ptr())
        self._policy = _Policy(
            *mlp._network, mlp._activation, wide=obs.dtype is torch.float64, rows=obs.shape[1], clip=bound
        )
        # Copies, row after row in memory.
        shift, scale = (v.clone(memory_format=torch.contiguous_format) for v in (shift, scale))
        self._memory: list[Tensor] = []  # that C writes to and reads from
        self._point(obs=obs, shift=shift, scale=scale, out=self._out, work=work)
        self._address = ctypes.byref(self._policy)

    def outputs(self, t: int) -> Tensor:
        """f [N, K] at step t; valid until the next one."""
        self(t)
        return self._out

    def draws_normal(self, std: Tensor, noise: Tensor, action: Tensor) -> bool:
        """Whether from now on each step writes action = f + std · noise, for std [A], noise and action [T, N, A]."""
        if not self._draws(noise, action) or not plain(std):
            return False
        if not std.shape == action.shape[2:] == self._out.shape[1:]:
            return False
        self._point(std=std.contiguous())
        self._policy.kind = _NORMAL
        return True

    def draws_ordinal(self, ordinal: NativeOrdinal, noise: Tensor, action: Tensor) -> bool:
        """Whether from now on each step writes `ordinal.sample` of f and the noise; noise and action [T, N, A]."""
        if not self._draws(noise, action) or action.shape[2] != ordinal.components:
            return False
        if self._out.shape[1] != ordinal.components * ordinal.bins:
            return False
        self._point(low=ordinal.low, width=ordinal.width, vectors=ordinal.workspace())
        self._policy.bins, self._policy.kind = ordinal.bins, _ORDINAL
        return True

    def __call__(self, t: int) -> None:
        """Takes step t: 0 ≤ t < T."""
        library.LIBRARY.policy_act(self._address, t, threads())

    def _draws(self, noise: Tensor, action: Tensor) -> bool:
        steps = self._memory[0].shape[:2]
        fits = noise.shape == action.shape and action.dim() == 3 and action.shape[:2] == steps
        if not (fits and plain(noise) and plain(action) and action.is_contiguous()):
            return False
        self._point(noise=noise.contiguous(), action=action)
        self._policy.components = action.shape[2]
        return True

    def _point(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            setattr(self._policy, name, tensor.data_ptr())
            self._memory.append(tensor)
