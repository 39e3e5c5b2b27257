"""Running many jobs: in this process, in worker processes, or on any ``concurrent.futures.Executor``."""

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

_JOBS_SUBMITTED = 32


@contextmanager
def worker_processes(count: int) -> Iterator[Executor | None]:
    """An executor with ``count`` processes, among which the cores of this machine are divided; None for 1.

    Raises:
        ValueError: ``count`` is below 1.
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
    """Return a shard ``(I, N)``, the part I of N, counted from 0. None stands for everything and gives ``(0, 1)``.

    Raises:
        ValueError: not two numbers with ``0 <= I < N``.
    """
    if shard is None:
        return 0, 1
    if len(shard) != 2 or not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard must be (I, N) with 0 <= I < N, got {tuple(shard)!r}.")
    return int(shard[0]), int(shard[1])


def run_jobs(
    function: Callable[..., _Result], jobs: Iterable[_Job], executor: Executor | None = None
) -> Iterator[tuple[_Job, _Result | Exception]]:
    """Call a function with the arguments of each job; yield each job with its result or the exception that it raised.

    Args:
        function: called once for each job; the executor must be able to send it to its workers.
        jobs: the arguments of each call. They are read a few at a time.
        executor: where the function runs; None is this process.

    Returns:
        Jobs in their order without an executor, else in the order in which they finish. Jobs of a worker that was lost
        are done in this process.
    """
    if executor is None:
        return ((job, _attempt(function, job)) for job in jobs)
    return _run_on(executor, function, jobs)


def _run_on(
    executor: Executor, function: Callable[..., _Result], jobs: Iterable[_Job]
) -> Iterator[tuple[_Job, _Result | Exception]]:
    """``run_jobs`` with an executor; at most ``_JOBS_SUBMITTED`` jobs are submitted and unfinished at a time."""
    pending: dict[Future[_Result], _Job] = {}
    source, more = iter(jobs), True
    try:
        while more or pending:
            while more and len(pending) < _JOBS_SUBMITTED:
                job = next(source, None)
                if job is None:
                    more = False
                    break
                try:
                    pending[executor.submit(function, *job)] = job
                except BrokenExecutor as error:
                    yield job, _run_lost_job(function, job, error)
            for future in wait(pending, return_when=FIRST_COMPLETED).done if pending else ():
                job = pending.pop(future)
                try:
                    yield job, future.result()
                except BrokenExecutor as error:
                    yield job, _run_lost_job(function, job, error)
                except Exception as error:
                    yield job, error
    finally:
        for future in pending:
            future.cancel()


def _run_lost_job(function: Callable[..., _Result], job: _Job, error: Exception) -> _Result | Exception:
    warnings.warn(f"a worker was lost ({error}); its work is done in this process.", stacklevel=3)
    return _attempt(function, job)


def _attempt(function: Callable[..., _Result], job: _Job) -> _Result | Exception:
    try:
        return function(*job)
    except Exception as error:
        return error
