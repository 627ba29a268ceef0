"""Which device a setting names."""

from __future__ import annotations

import torch

from trpo.errors import UserError


def resolve_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one.

    Raises:
        UserError: no such device, or a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown; use cpu, cuda, cuda:N or auto") from error
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"device {name}: {gpus or 'no'} CUDA GPUs are available; use device cpu or auto")
    return device
