"""The processes of one run: alone, or as ``torchrun`` starts them."""

from __future__ import annotations

import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Team:
    """This process among those that train together; each has its own device and draws its own data.

    Args:
        device: torch device; empty: the GPU of this process if there is one.

    Raises:
        ValueError: a device that cannot be used.
    """

    def __init__(self, device: str) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if chosen == "cuda" and self.size > 1:
            chosen = f"cuda:{local}"
        try:
            self.device = torch.empty(0, device=chosen).device
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def leads(self) -> bool:
        """This process writes the files."""
        return self.rank == 0

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network as all train it together."""
        return network if self.size == 1 else DistributedDataParallel(network)

    def any(self, flag: bool) -> bool:
        """Whether one of the processes says yes; all hear the same."""
        if self.size == 1:
            return flag
        votes = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes > 0)

    def as_leader(self, value: float) -> float:
        """The first process's value."""
        if self.size == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(number, 0)
        return float(number)

    def leave(self) -> None:
        """End the connection to the others, and its threads: one alive as the interpreter ends would abort it."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
            gc.collect()  # a run refers to itself, and its network to the connection
