"""The processes of one training run: a single one, or those that ``torchrun`` starts."""

from __future__ import annotations

import gc
import os
from functools import cache

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel


class ProcessGroup:
    """This process among those that train together; each has its own device and draws its own batches.

    Args:
        device: torch device; empty: the GPU of this process if there is one, else the CPU.

    Raises:
        ValueError: the device cannot be used.
    """

    def __init__(self, device: str) -> None:
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if chosen == "cuda" and self.world_size > 1:
            chosen = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
        try:
            self.device = torch.empty(0, device=chosen).device
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
        self.owns_connection = self.world_size > 1 and not dist.is_initialized()
        if self.owns_connection:
            _connect("nccl" if self.device.type == "cuda" else "gloo", self.rank, self.world_size)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

    def wrap(self, network: nn.Module) -> nn.Module:
        """The network with its gradients averaged over all processes."""
        return network if self.world_size == 1 else DistributedDataParallel(network)

    def any(self, flag: bool) -> bool:
        """Whether the flag is true in at least one process. All processes must call this, and all get the answer."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes > 0)

    def from_rank_zero(self, value: float) -> float:
        """The value that the process of rank 0 passes. All processes must call this."""
        if self.world_size == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(number, 0)
        return float(number)

    def barrier(self) -> None:
        """Wait until all processes have come this far."""
        self.any(False)

    def close(self) -> None:
        """End the connection between the processes, unless it was there before.

        Its threads must end before the interpreter does: one that is still alive then would abort the process. They
        need the interpreter's lock to free the tensors of the last messages. PyTorch gives the lock away while it waits
        for them, but only if no network holds the connection any more. The training loop holds one and is part of a
        reference cycle, so it is collected first.
        """
        if self.owns_connection and dist.is_initialized():
            gc.collect()
            dist.destroy_process_group()


def _connect(backend: str, rank: int, world_size: int) -> None:
    """Connect the processes that ``torchrun`` has started.

    They find each other through entries of a store. Every connection has its own entries, because those of an earlier
    connection name addresses at which nobody listens any more.
    """
    store = _store()
    number = store.add(f"monai_drdm/opened/{rank}", 1)
    own = PrefixStore(f"monai_drdm/connection/{number}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world_size)


@cache
def _store() -> Store:
    """The store that ``torchrun`` offers. It is kept, because it numbers all connections of this process."""
    store: Store = next(rendezvous("env://"))[0]
    return store
