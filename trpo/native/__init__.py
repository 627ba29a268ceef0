"""`mlp.c` from Python: what multilayer perceptrons spend their time in, compiled for the machine it was installed on,
and small loops of an update that are slow in Python.

An optional part. Where it was not built, was built for another processor, or cannot do what is asked (a GPU, networks
in float64, gradients by autograd, other activations), whoever asks does the same with torch.
`TRPO_NATIVE=0` in the environment leaves it out: two machines, or one with and one without a compiler, then round alike
more often.

Many rows are shared among as many threads as torch has where the call comes from. That changes no number.

C believes what it is told of a tensor's size and kind, so everything is looked at here first.
"""

from trpo.native.library import BLOCK, MOST_THREADS, SWITCHED_OFF, available, checked, spare_threads
from trpo.native.mlp import ACTIVATIONS, MOST_LAYERS, NativeActor, NativeMlp
from trpo.native.ordinal import NativeOrdinal
from trpo.native.vectors import adam_step, carried_sums, takes_vectors

__all__ = [
    "ACTIVATIONS",
    "BLOCK",
    "MOST_LAYERS",
    "MOST_THREADS",
    "SWITCHED_OFF",
    "NativeActor",
    "NativeMlp",
    "NativeOrdinal",
    "adam_step",
    "available",
    "carried_sums",
    "checked",
    "spare_threads",
    "takes_vectors",
]
