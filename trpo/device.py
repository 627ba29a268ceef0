"""Which device a setting names."""

from __future__ import annotations

import os

import torch

from trpo.errors import UserError


def resolve_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one; of several processes on a machine each takes its own.

    Raises:
        UserError: no such device, or a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown; use cpu, cuda, cuda:N or auto") from error
    if device.type != "cuda":
        return device
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(os.environ.get("LOCAL_RANK", "0")) % max(gpus, 1) if name == "cuda" else device.index
    if index >= gpus:
        raise UserError(f"device {name}: {gpus or 'no'} CUDA GPUs are available; use device cpu or auto")
    return torch.device("cuda", index)
