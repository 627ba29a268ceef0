"""`mlp.c` from Python: what multilayer perceptrons spend their time in, compiled for the machine it was installed on,
and small loops of an update that are slow in Python.

An optional part. Where it was not built, was built for another processor, or cannot do what is asked (a GPU, networks
in float64, gradients by autograd, other activations), whoever asks does the same with torch.
`TRPO_NATIVE=0` in the environment leaves it out: two machines, or one with and one without a compiler, then round alike
more often.

Many rows are shared among as many threads as torch has where the call comes from. That changes no number.

C believes what it is told of a tensor's size and kind, so everything is looked at here first.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

SWITCHED_OFF = os.environ.get("TRPO_NATIVE") == "0"
VERSION = 6  # of the functions in mlp.c, and of their arguments
ACTIVATIONS = {"tanh": 0, "relu": 1}  # by their numbers in mlp.c
BLOCK = 128  # rows that mlp.c takes through all layers at a time
MOST_LAYERS = 16
MOST_THREADS = 8

_is_transformed = torch._C._functorch.is_functorch_wrapped_tensor
_NUMBERS, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_long
_FLOAT, _DOUBLE = ctypes.c_float, ctypes.c_double
_NETWORK = [ctypes.POINTER(_LONG), _INT]
_SIGNATURES: dict[str, tuple[type | None, list]] = {
    "mlp_workspace": (_LONG, [*_NETWORK, _LONG]),
    "mlp_padded": (_LONG, [_LONG]),
    "mlp_passing": (_LONG, [_LONG]),
    "mlp_forward": (None, [*_NETWORK, _INT, _NUMBERS, _NUMBERS, _LONG, _INT, _NUMBERS, _NUMBERS, _INT]),
    "mlp_freeze": (None, [*_NETWORK, _NUMBERS, _NUMBERS]),
    "mlp_jvp": (None, [*_NETWORK, _INT, _NUMBERS, _LONG, _NUMBERS, _NUMBERS, _INT]),
    "mlp_vjp": (None, [*_NETWORK, _INT, _NUMBERS, _LONG, _NUMBERS, _NUMBERS, _INT]),
    "mlp_factors": (None, [*_NETWORK, _INT, _NUMBERS, _LONG, _NUMBERS, _NUMBERS]),
    "mlp_adam": (None, [*_NETWORK, _INT, *[_NUMBERS] * 6, _INT, *[_NUMBERS] * 3, _FLOAT, _FLOAT, _NUMBERS]),
    "ordinal_log_probabilities": (None, [_LONG, _LONG, _LONG, *[_NUMBERS] * 3, _INT]),
    "ordinal_metric": (None, [_LONG, _LONG, _LONG, *[_NUMBERS] * 4, _INT]),
    "ordinal_sample": (None, [_LONG, _LONG, _LONG, *[_NUMBERS] * 6, _INT]),
    "policy_act": (None, [_NUMBERS, _LONG, _INT]),
    "carried_sums_float": (None, [_LONG, _LONG, _NUMBERS, _NUMBERS, _INT]),
    "carried_sums_double": (None, [_LONG, _LONG, _NUMBERS, _NUMBERS, _INT]),
    "adam_step": (None, [_LONG, _NUMBERS, _NUMBERS, _NUMBERS, _NUMBERS, _FLOAT, _FLOAT, _FLOAT, _FLOAT]),
}


def _built() -> str | None:
    """The file that the installation compiled, if it did."""
    spec = importlib.util.find_spec("trpo.native._mlp")
    return None if spec is None or SWITCHED_OFF else spec.origin


def _load(file: str | None) -> Any:
    """The compiled functions of a file; None if there is none, or it is of another version or processor."""
    if file is None:
        return None
    try:
        library = ctypes.CDLL(file)
        if library.mlp_version() != VERSION or not library.mlp_runs_here():
            return None
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):
        return None
    return library


_LIBRARY: Any = _load(_built())


def available() -> bool:
    """Whether the compiled functions are there and run on this processor."""
    return _LIBRARY is not None


_spare = 0
_spare_lock = threading.Lock()


@contextlib.contextmanager
def spare_threads(count: int) -> Iterator[Callable[[], None]]:
    """Gives the compiled functions so many threads more than torch has, or fewer: inside, or until what this yields is
    called, from any thread."""
    pending = [count, -count]

    def next_change() -> None:
        global _spare
        with _spare_lock:
            _spare += pending.pop(0) if pending else 0

    try:
        next_change()
        yield next_change
    finally:
        next_change()


def _threads() -> int:
    return min(max(1, torch.get_num_threads() + _spare), MOST_THREADS)


def takes(x: Tensor) -> bool:
    """Whether the compiled functions may work on x [B, …]: of a kind they know, no graph wanted."""
    return _wanted() and _plain(x)


def _wanted() -> bool:
    """Whether nobody looks at the operations themselves, to differentiate, compile or export them."""
    return (
        _LIBRARY is not None
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
    )


def _plain(x: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Numbers in host memory, which no subclass or transformation of `torch.func` stands for."""
    return x.dtype is dtype and x.is_cpu and type(x) in (Tensor, nn.Parameter) and not _is_transformed(x)


def checked(x: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """x row after row in memory; ValueError unless it is plain and of this shape."""
    if x.shape != torch.Size(shape) or not _plain(x):
        raise ValueError(f"{name} is {x.dtype} {list(x.shape)} on {x.device}, not float32 {list(shape)} on the CPU")
    return x.contiguous()


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
        self._network = ((_LONG * len(widths))(*widths), len(layers))

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
        usable = len(found) == 2 * len(self.layers) and all(_plain(p) and p.is_contiguous() for p in found)
        return list(found) if usable else None

    def workspace(self, x: Tensor, rows: int) -> Tensor:
        """Memory for what `forward` keeps of `rows` rows; of the kind of x."""
        return x.new_empty(_LIBRARY.mlp_workspace(*self._network, rows))

    def forward(self, x: Tensor, workspace: Tensor | None = None) -> Tensor | None:
        """f(θ) [B, K] of plain x [B, D], or None where mlp.c cannot read the parameters.

        In a `workspace` for B rows, what `jvp` and `vjp` need is kept.
        """
        parameters = self._parameters()
        if parameters is None:
            return None
        x, rows = x.contiguous(), len(x)
        work = self.workspace(x, _LIBRARY.mlp_passing(rows)) if workspace is None else workspace
        out = x.new_empty(rows, self.output_dim)
        _LIBRARY.mlp_forward(
            *self._network,
            self._activation,
            _addresses(parameters),
            x.data_ptr(),
            rows,
            workspace is not None,
            out.data_ptr(),
            work.data_ptr(),
            _threads(),
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
        if _LIBRARY is None or parameters is None:
            return None
        if not all(_plain(v, torch.float64) and v.shape == (self.input_dim,) for v in (shift, scale)):
            return None
        kinds = (torch.float32, torch.float64)
        if not (obs.dim() == 3 and obs.shape[2] == self.input_dim and any(_plain(obs, kind) for kind in kinds)):
            return None
        if not obs.is_contiguous():
            return None
        return NativeActor(self, _addresses(parameters), shift, scale, bound, obs)

    def jvp(self, v: Tensor, out: Tensor, workspace: Tensor) -> Tensor:
        """Jv, into `out` [B, K], for a checked v [P]."""
        memory = out.data_ptr(), workspace.data_ptr()
        _LIBRARY.mlp_jvp(*self._network, self._activation, v.data_ptr(), len(out), *memory, _threads())
        return out

    def vjp(self, u: Tensor, out: Tensor, workspace: Tensor) -> Tensor:
        """Jᵀu, into `out` [P], for a checked u [B, K]."""
        memory = out.data_ptr(), workspace.data_ptr()
        _LIBRARY.mlp_vjp(*self._network, self._activation, u.data_ptr(), len(u), *memory, _threads())
        return out

    def factors(self, u: Tensor, workspace: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Σ h̃h̃ᵀ [n + 1, n + 1], h̃ = (h, 1), and Σ δδᵀ [m, m] of all layers, for a checked u [B, K]."""
        sizes = [size for layer in self.layers for size in (layer.in_features + 1, layer.out_features)]
        areas = [size * _LIBRARY.mlp_padded(size) for size in sizes]
        out = u.new_empty(sum(areas))
        _LIBRARY.mlp_factors(
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
            and _plain(y)
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
        if order.shape != (sum(rows),) or not _plain(order, torch.int64):
            raise ValueError(f"minibatches of {sum(rows)} rows, in an order of {order.dtype} {list(order.shape)}")
        first, last = (int(row) for row in order.aminmax())
        if first < 0 or last >= len(x):
            raise ValueError(f"minibatches take rows {first} to {last} of {len(x)}")
        work = x.new_empty(
            _LIBRARY.mlp_workspace(*self._network, most)
            + _LIBRARY.mlp_padded(most * self.output_dim)
            + _LIBRARY.mlp_padded(len(theta))
        )
        x, y, order = x.contiguous(), y.contiguous(), order.contiguous()
        _LIBRARY.mlp_adam(
            *self._network,
            self._activation,
            *(tensor.data_ptr() for tensor in (theta, mean, square, x, y, order)),
            count,
            (_LONG * count)(*rows),
            (_FLOAT * count)(*epsilons),
            (_FLOAT * count)(*rates),
            *betas,
            work.data_ptr(),
        )


_NORMAL, _ORDINAL = 1, 2  # kinds of `Policy` of mlp.c; 0: its outputs are all that is wanted


class _Policy(ctypes.Structure):
    """`Policy` of mlp.c."""

    _fields_ = (
        ("widths", ctypes.POINTER(_LONG)),
        *((name, _LONG) for name in ("layers", "activation", "wide", "rows")),
        *((name, _NUMBERS) for name in ("obs", "shift", "scale")),
        ("clip", _DOUBLE),
        *((name, _NUMBERS) for name in ("out", "work")),
        *((name, _LONG) for name in ("kind", "components")),
        *((name, _NUMBERS) for name in ("noise", "action", "std")),
        ("bins", _LONG),
        *((name, _NUMBERS) for name in ("low", "width", "vectors")),
    )


class NativeActor:
    """A network as it was when this was made, and what draws its actions, in a rollout: of `NativeMlp.actor`.

    Everything that is looked at first is looked at once for all steps. For one thread of Python.
    """

    def __init__(self, mlp: NativeMlp, parameters: Any, shift: Tensor, scale: Tensor, bound: float, obs: Tensor):
        self._out = obs.new_empty(obs.shape[1], mlp.output_dim, dtype=torch.float32)
        work = mlp.workspace(self._out, MOST_THREADS * BLOCK)
        _LIBRARY.mlp_freeze(*mlp._network, parameters, work.data_ptr())
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
        if not self._draws(noise, action) or not _plain(std):
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
        _LIBRARY.policy_act(self._address, t, _threads())

    def _draws(self, noise: Tensor, action: Tensor) -> bool:
        steps = self._memory[0].shape[:2]
        fits = noise.shape == action.shape and action.dim() == 3 and action.shape[:2] == steps
        if not (fits and _plain(noise) and _plain(action) and action.is_contiguous()):
            return False
        self._point(noise=noise.contiguous(), action=action)
        self._policy.components = action.shape[2]
        return True

    def _point(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            setattr(self._policy, name, tensor.data_ptr())
            self._memory.append(tensor)


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (_NUMBERS * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


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
        return self.low.new_empty(MOST_THREADS * _LIBRARY.mlp_padded(1) * self.bins)

    def log_probabilities(self, eta: Tensor) -> Tensor | None:
        """η [B, A n] → log p [n, B, A]."""
        if not self._fits(eta):
            return None
        out = eta.new_empty(self.bins, eta.shape[0], self.components)
        return self._call(_LIBRARY.ordinal_log_probabilities, eta.shape[0], eta.contiguous(), out)

    def metric(self, p: Tensor, u: Tensor) -> Tensor | None:
        """p [n, B, A] and u [B, A n] → M u [B, A n], M the Fisher metric in η."""
        if not self._fits(u) or not _plain(p) or p.shape != (self.bins, u.shape[0], self.components):
            return None
        out = torch.empty_like(u, memory_format=torch.contiguous_format)
        return self._call(_LIBRARY.ordinal_metric, u.shape[0], p.contiguous(), u.contiguous(), out)

    def sample(self, eta: Tensor, noise: Tensor) -> Tensor | None:
        """η [B, A n] and normal noise [B, A] → values [B, A]."""
        if not self._fits(eta) or not _plain(noise) or noise.shape != (eta.shape[0], self.components):
            return None
        out = torch.empty_like(noise, memory_format=torch.contiguous_format)
        return self._call(
            _LIBRARY.ordinal_sample, eta.shape[0], eta.contiguous(), noise.contiguous(), self.low, self.width, out
        )

    def _fits(self, eta: Tensor) -> bool:
        return takes(eta) and eta.dim() == 2 and eta.shape[1] == self.components * self.bins

    def _call(self, function: Any, rows: int, *tensors: Tensor) -> Tensor:
        work = self.workspace()
        addresses = [tensor.data_ptr() for tensor in (*tensors, work)]
        function(rows, self.components, self.bins, *addresses, _threads())
        return tensors[-1]


def carried_sums(x: Tensor, carry: Tensor, *, reverse: bool) -> bool:
    """`trpo.carried_sums` of x [T, …] in place, if the compiled functions can."""
    name = {torch.float32: "carried_sums_float", torch.float64: "carried_sums_double"}.get(x.dtype)
    fits = carry.shape == (len(x) - 1, *x.shape[1:]) and x.is_contiguous() and carry.is_contiguous()
    if name is None or not (_wanted() and fits and _plain(x, x.dtype) and _plain(carry, x.dtype)):
        return False
    getattr(_LIBRARY, name)(len(x), x[0].numel(), x.data_ptr(), carry.data_ptr(), reverse)
    return True


def takes_vectors(*vectors: Tensor) -> bool:
    """Whether `adam_step` may work on these."""
    size = vectors[0].shape
    return _wanted() and len(size) == 1 and all(_plain(x) and x.shape == size and x.is_contiguous() for x in vectors)


def adam_step(
    theta: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    betas: tuple[float, float],
    epsilon: float,
    rate: float,
) -> None:
    """θ ← θ − rate · m / (√s + ε) after m and s have taken in the gradient; all [P] of `takes_vectors`, in place."""
    vectors = (theta, gradient, mean, square)
    _LIBRARY.adam_step(len(theta), *(x.data_ptr() for x in vectors), *betas, epsilon, rate)
