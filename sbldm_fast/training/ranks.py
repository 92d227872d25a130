"""Several processes that train as one: who this one is, its part of a batch, what all of them agree on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from sbldm_fast.errors import UserError
from sbldm_fast.machine import torchrun_number


@dataclass(frozen=True)
class Ranks:
    """The processes that torchrun started, or this one alone. Each takes its part of every batch."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of_torchrun(cls) -> Ranks:
        """The process group if there is one."""
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def check_batch_size(self, batch_size: int) -> None:
        """Refuse a batch that cannot be shared out evenly."""
        if batch_size % self.size:
            raise UserError(f"batch_size: got {batch_size}, allowed are multiples of the {self.size} processes")

    def own(self, batch: Tensor) -> Tensor:
        """This process's part of a whole batch."""
        return batch.chunk(self.size)[self.rank]

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
            value /= self.size
        return value

    def any(self, flag: bool) -> bool:
        """Whether any process says yes, through the processors: no device is waited for."""
        return bool(self.mean(torch.tensor(float(flag))) > 0)


@contextmanager
def torchrun() -> Iterator[torch.device]:
    """This process's device; under torchrun the process group (gloo, and NCCL where there is CUDA) is there while the
    block runs."""
    size = torchrun_number("WORLD_SIZE", 1, 1, 2**20)
    local = torchrun_number("LOCAL_RANK", 0, 0, size - 1)
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", local % torch.cuda.device_count()) if on_cuda else torch.device("cpu")
    if size == 1:
        yield device
        return
    if on_cuda:
        torch.cuda.set_device(device)
    # one process encodes while the others wait; flags go by the processor
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timedelta(hours=12))
    try:
        yield device
    finally:
        dist.destroy_process_group()
