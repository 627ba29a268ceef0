"""Many processes, one update: the only file that names torch.distributed.

Every process collects from its share of the environments. What is reduced are sums and counts, never means of means;
the results are identical on all ranks, so all take the same decisions. One process is the same code with no-ops.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trpo.errors import TrainingError, UserError, gist
from trpo.runtime.reduction import AllSum, one_process

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Group:
    """This process among all of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    joined: bool = False  # by `join_group`, rather than by its caller before

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    @property
    def all_sum(self) -> AllSum:
        """Σ over processes, in place where the backend allows it; `one_process` if this is the only one."""
        return self._all_sum if self.size > 1 else one_process

    def _all_sum(self, tensor: Tensor) -> Tensor:
        moved = tensor.to(self.device).contiguous()
        with _if_all_are_there():
            dist.all_reduce(moved)
        return moved.to(tensor.device)

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all processes, in order of rank, on every process. For small plain data."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        with _if_all_are_there():
            dist.all_gather_object(out, value)
        return out

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every process."""
        if self.size == 1:
            return value
        box = [value]
        with _if_all_are_there():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def assert_equal(self, tensor: Tensor, what: str) -> None:
        """Raises RuntimeError on every process unless `tensor` is bitwise equal on all of them."""
        if self.size == 1:
            return
        digests = self.gather_objects(hashlib.sha256(tensor.detach().cpu().numpy().tobytes()).hexdigest())
        if len(set(digests)) > 1:
            raise RuntimeError(f"{what} differs between processes: {digests}")

    def shard(self, total: int) -> slice:
        """This process's contiguous share of `total` things; shares differ by one at most."""
        base, extra = divmod(total, self.size)
        start = self.rank * base + min(self.rank, extra)
        return slice(start, start + base + (self.rank < extra))


@contextlib.contextmanager
def _if_all_are_there() -> Iterator[None]:
    try:
        yield
    except (NotImplementedError, RecursionError):
        raise
    except RuntimeError as error:  # the backend's, of closed connections and timeouts
        if "Duplicate GPU" in str(error):
            raise UserError(
                "two processes have been given one GPU: start as many as there are, or set device to cpu"
            ) from error
        problem = "another process of this run has ended or hangs; what it said tells why"
        raise TrainingError(f"{problem} ({gist(error)})") from error


def join_group(device: torch.device) -> Group:
    """Joins the processes `torchrun` started; without it, a group of one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Group(device=device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if joins := not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Group(dist.get_rank(), size, device, joined=joins)


def leave_group(group: Group) -> None:
    """Leaves what `join_group` joined; a process group that was there before stays."""
    if group.joined and dist.is_initialized():
        dist.destroy_process_group()
        # The group's threads end with its last reference, which may hang in a cycle: were it dropped only while the
        # interpreter shuts down, a thread that still had to release a tensor would abort the process.
        gc.collect()
