"""The connection between the processes of a run: who ends it, and that ending it does not wait for ever."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import socket
import time
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

from monai_drdm.training.distributed import ProcessGroup


@pytest.fixture
def two(fork, monkeypatch):
    """Calls a function in two processes that find each other as under ``torchrun``; their exit codes."""
    importlib.import_module("torch._dynamo")  # every process would import it to wrap a network
    if torch.cuda.is_available():
        pytest.skip("a process that has used CUDA cannot be forked")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)

    def start(call):
        def process(rank):
            signal.alarm(20)  # ends a process that waits for ever, whatever locks it holds
            torch.set_num_threads(1)  # threads do not come along with a fork
            os.environ["RANK"] = str(rank)
            gc.disable()  # what is in a cycle stays until it is collected,
            gc.freeze()  # and that is quick
            call(rank)

        both = [fork(lambda rank=rank: process(rank)) for rank in (0, 1)]
        said = [one.communicate()[1] for one in both]
        return [one.returncode for one in both], "".join(said)

    return start


def train(processes):
    """A step as the training loop takes it: the network ends up in a reference cycle."""
    cycle = [processes.wrap(nn.Linear(2, 2))]
    cycle.append(cycle)
    cycle[0](torch.rand(3, 2)).sum().backward()
    return processes.any(processes.rank == 1), processes.from_rank_zero(float(processes.rank + 5))


def test_connections_one_after_the_other(two):
    def call(rank):
        for _ in range(4):
            processes = ProcessGroup("cpu")
            assert train(processes) == (True, 5.0)
            processes.close()
            assert not dist.is_initialized()

    codes, said = two(call)
    assert codes == [0, 0], said


def test_a_connection_that_was_there_before_stays(two):
    def call(rank):
        dist.init_process_group("gloo")
        processes = ProcessGroup("cpu")
        assert train(processes) == (True, 5.0)
        processes.close()
        ours = torch.tensor(float(rank))
        dist.all_reduce(ours)
        assert ours == 1
        dist.destroy_process_group()

    codes, said = two(call)
    assert codes == [0, 0], said


def test_closing_waits_for_a_thread_that_frees_the_last_message(two):
    """The thread sleeps while it frees it: it holds the connection's lock then, and will need the interpreter's."""

    def call(rank):
        processes = ProcessGroup("cpu")
        train(processes)
        message = torch.ones(8)
        freed = weakref.finalize(message, time.sleep, 0.3)
        if rank == 1:
            time.sleep(0.3)  # so that the other process has let go of its message before the exchange ends
        sent = dist.all_reduce(message, async_op=True)
        del message, sent
        time.sleep(0.4 - 0.3 * rank)
        processes.close()
        assert not freed.alive

    codes, said = two(call)
    assert codes == [0, 0], said
