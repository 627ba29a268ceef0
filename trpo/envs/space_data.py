"""Spaces as plain data, for checkpoints and saved policies: no code is named, and none is run to read them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
from gymnasium import spaces

from trpo.errors import CheckpointError


def encode_observation_space(space: spaces.Space[Any] | None) -> dict[str, Any] | None:
    """`encode_space`, or None where nobody wrote the space down, or its keys are no text."""
    try:
        return None if space is None else encode_space(space)
    except TypeError:
        return None


def encode_space(space: spaces.Space[Any]) -> dict[str, Any]:
    """A space as plain data."""
    if isinstance(space, spaces.Box):
        return {"type": "Box", "low": space.low, "high": space.high, "dtype": str(space.dtype)}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start), "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiDiscrete):
        return {"type": "MultiDiscrete", "nvec": space.nvec, "start": space.start, "dtype": str(space.dtype)}
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "n": space.n if isinstance(space.n, int) else [int(n) for n in space.n]}
    if isinstance(space, spaces.Dict) and all(type(key) is str for key in space.spaces):
        # In its order, which is that of the flat row.
        return {"type": "Dict", "spaces": [[key, encode_space(part)] for key, part in space.spaces.items()]}
    if isinstance(space, spaces.Tuple):
        return {"type": "Tuple", "spaces": [encode_space(part) for part in space.spaces]}
    raise TypeError(f"no encoding for {space}")


def decode_space(data: dict[str, Any]) -> spaces.Space[Any]:
    """The space `encode_space` described, equal to it; only these types, looked up by name here."""
    match data["type"]:
        case "Box":
            return spaces.Box(data["low"], data["high"], dtype=np.dtype(data["dtype"]).type)
        case "Discrete":
            # The dtype of a Discrete is an argument of newer releases only; before, it was always this one.
            dtype = {} if data["dtype"] == "int64" else {"dtype": np.dtype(data["dtype"]).type}
            return spaces.Discrete(data["n"], start=data["start"], **dtype)
        case "MultiDiscrete":
            return spaces.MultiDiscrete(data["nvec"], start=data["start"], dtype=np.dtype(data["dtype"]).type)
        case "MultiBinary":
            return spaces.MultiBinary(data["n"])
        case "Dict":
            return spaces.Dict(OrderedDict((key, decode_space(part)) for key, part in data["spaces"]))
        case "Tuple":
            return spaces.Tuple([decode_space(part) for part in data["spaces"]])
    raise CheckpointError(f"unknown space {data['type']!r}")
