"""Which device a run or a policy lives on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trpo.config import Config
from trpo.errors import UserError

_WIDE = 128  # units of a hidden layer
_MANY = 4096  # steps of a batch


def training_device(config: Config) -> torch.device:
    """Where a run lives: `auto` takes a GPU if there is one and the run has work for it.

    That is where the GPU was clearly ahead (`benchmarks/devices.md`): it takes as long for the smallest update as
    compiled code for one of the default size. How much work a body is nobody knows: with a small one it is behind.

    Raises:
        UserError: as `resolve_device`.
    """
    wide = any(net.body or max(net.hidden_sizes, default=0) >= _WIDE for net in (config.policy, config.value))
    lives_there = config.env.backend == "torch" and config.batch_size >= _MANY
    small = config.device == "auto" and not wide and not lives_there
    return torch.device("cpu") if small else resolve_device(config.device)


@contextmanager
def exact_convolutions(device: torch.device) -> Iterator[None]:
    """Within, convolutions on a GPU give the same to the bit each time, and as exact Fisher products as other layers.

    cuDNN sums by atomic operations, picks algorithms by the clock and rounds float32 to TF32's 10 bits, unless it is
    told. All of this is torch's for the whole process, and afterwards as it was; but a precision inherited from
    `torch.backends.fp32_precision` no longer follows that.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    choices, precisions = (cudnn.deterministic, cudnn.benchmark), (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)
    try:
        tf32 = cudnn.allow_tf32  # the older name of the same, which says so where the two disagree
    except RuntimeError:
        tf32 = False
    cudnn.deterministic, cudnn.benchmark = True, False
    if tf32:
        cudnn.allow_tf32 = False
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "ieee"
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = choices
        if tf32:
            cudnn.allow_tf32 = True
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = precisions


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
