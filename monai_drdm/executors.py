"""Work on many items: here, in other processes, or wherever a ``concurrent.futures.Executor`` takes it."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

_Job = TypeVar("_Job", bound=tuple[Any, ...])
_Result = TypeVar("_Result")

_IN_FLIGHT = 32


@contextmanager
def workers(count: int) -> Iterator[Executor | None]:
    """An executor of as many processes that share this machine's cores between them; None for 1.

    Raises:
        ValueError: not 1 or more.
    """
    if count < 1:
        raise ValueError(f"workers must be 1 or more, got {count}.")
    if count == 1:
        yield None
        return
    threads = max(1, torch.get_num_threads() // count)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, torch.set_num_threads, (threads,)) as executor:
        yield executor


def check_shard(shard: Sequence[int] | None) -> tuple[int, int]:
    """``(I, N)``: the part I of N, counted from 0; None is the whole.

    Raises:
        ValueError: no such part.
    """
    if shard is None:
        return 0, 1
    if len(shard) != 2 or not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard must be (I, N) with 0 <= I < N, got {tuple(shard)!r}.")
    return int(shard[0]), int(shard[1])


def in_turn(function: Callable[..., _Result], jobs: Iterable[_Job]) -> Iterator[tuple[_Job, _Result | Exception]]:
    """Do one job after the other in this process; what fails comes back as its exception."""
    for job in jobs:
        yield job, _attempt(function, job)


def through(
    executor: Executor, function: Callable[..., _Result], jobs: Iterable[_Job]
) -> Iterator[tuple[_Job, _Result | Exception]]:
    """Do jobs through an executor, a few at a time, in the order in which they finish.

    What a lost worker had begun is done again: by the executor where it takes more work, else in this process.
    """
    pending: dict[Future[_Result], _Job] = {}
    source, more = iter(jobs), True
    try:
        while more or pending:
            while more and len(pending) < _IN_FLIGHT:
                job = next(source, None)
                if job is None:
                    more = False
                    break
                try:
                    pending[executor.submit(function, *job)] = job
                except BrokenExecutor as error:
                    yield job, _again(function, job, error)
            for future in wait(pending, return_when=FIRST_COMPLETED).done if pending else ():
                job = pending.pop(future)
                try:
                    yield job, future.result()
                except BrokenExecutor as error:
                    yield job, _again(function, job, error)
                except Exception as error:
                    yield job, error
    finally:
        for future in pending:
            future.cancel()


def _again(function: Callable[..., _Result], job: _Job, error: Exception) -> _Result | Exception:
    warnings.warn(f"a worker was lost ({error}); its work is done in this process.", stacklevel=3)
    return _attempt(function, job)


def _attempt(function: Callable[..., _Result], job: _Job) -> _Result | Exception:
    try:
        return function(*job)
    except Exception as error:
        return error
