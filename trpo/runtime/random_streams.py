"""Named random streams, all derived from one seed (numpy's SeedSequence; contract: order of creation never matters)."""

from __future__ import annotations

import numpy as np
import torch

STREAMS = ("initialisation", "environments", "actions", "value_fit", "fisher", "evaluation")


def stream_seed(seed: int, stream: str, index: int = 0) -> int:
    """The seed in [0, 2³¹) of a named stream; `index` distinguishes its members, e.g. environments by global index."""
    key = (STREAMS.index(stream), index)
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0]) >> 1


def torch_generator(seed: int, stream: str) -> torch.Generator:
    """A generator of its own for a named stream, on the CPU."""
    return torch.Generator().manual_seed(stream_seed(seed, stream))
