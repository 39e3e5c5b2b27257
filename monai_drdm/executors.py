"""Running many jobs: in this process, in worker processes, or on any ``concurrent.futures.Executor``."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    ALL_COMPLETED,
    BrokenExecutor,
    Executor,
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    wait,
)
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch

_Job = TypeVar("_Job", bound=tuple[Any, ...])
_Result = TypeVar("_Result")

_JOBS_SUBMITTED = 32
_MAX_LOST = 2
_KEPT = ("max_workers", "mp_context", "initializer")
"""Arguments of a process pool that are copied when it is made again; the pool keeps them under these names."""


class WorkerLostError(RuntimeError):
    """Two worker processes died while they worked on the same job."""


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
        Without an executor, jobs in their order; with one, in the order in which they finish. If a worker process dies,
        its jobs are repeated by another one. A job during which two workers died gives ``WorkerLostError``.
    """
    if executor is None:
        return ((job, _attempt(function, job)) for job in jobs)
    return _run_on(executor, function, jobs)


def _run_on(
    executor: Executor, function: Callable[..., _Result], jobs: Iterable[_Job]
) -> Iterator[tuple[_Job, _Result | Exception]]:
    """``run_jobs`` with an executor; at most ``_JOBS_SUBMITTED`` jobs are submitted and unfinished at a time."""
    crew, pending, source, more = _Crew(executor), dict[Future[_Result], _Job](), iter(jobs), True
    try:
        while more or pending:
            lost: list[_Lost[_Job]] = []
            while more and not lost and len(pending) < _JOBS_SUBMITTED:
                job = next(source, None)
                if job is None:
                    more = False
                    break
                try:
                    pending[crew.executor.submit(function, *job)] = job
                except BrokenExecutor as error:
                    lost.append(_Lost(job, 0, error))
            yield from _finished(pending, FIRST_COMPLETED, lost)
            if lost:  # a pool that has lost a worker does not finish its other jobs either
                yield from _finished(pending, ALL_COMPLETED, lost)
                yield from crew.do_again(function, lost)
    finally:
        for future in pending:
            future.cancel()
        crew.leave()


@dataclass(frozen=True)
class _Lost(Generic[_Job]):
    """A job whose worker process died."""

    job: _Job
    times: int
    """How many workers died while they worked on it."""
    error: BrokenExecutor


def _finished(
    pending: dict[Future[_Result], _Job], when: str, lost: list[_Lost[_Job]]
) -> Iterator[tuple[_Job, _Result | Exception]]:
    """Take finished jobs out of ``pending``. Jobs whose worker died are added to ``lost``."""
    for future in wait(pending, return_when=when).done if pending else ():
        job, result = pending.pop(future), _attempt(future.result, ())
        if isinstance(result, BrokenExecutor):
            lost.append(_Lost(job, 1, result))
        else:
            yield job, result


class _Crew:
    """The workers of a run: those of an executor or, after one of them has died, new ones of the same kind.

    When a process pool breaks, it does not say which job was the cause. So all jobs that it had begun are repeated one
    by one. If a worker dies again, the job that it was working on is the cause, and is given up. Jobs are never
    repeated in this process.
    """

    def __init__(self, executor: Executor) -> None:
        self._given = self.executor = executor
        self._own: Executor | None = None

    def do_again(
        self, function: Callable[..., _Result], lost: Sequence[_Lost[_Job]]
    ) -> Iterator[tuple[_Job, _Result | Exception]]:
        """Repeat jobs whose worker died, one at a time."""
        message = f"a worker was lost ({lost[0].error}). All jobs that were begun are repeated, one by one."
        warnings.warn(message, stacklevel=4)
        self._renew()
        for one in lost:
            yield one.job, self._alone(function, one)

    def _alone(self, function: Callable[..., _Result], lost: _Lost[_Job]) -> _Result | Exception:
        error = lost.error
        for _ in range(lost.times, _MAX_LOST):
            result = _attempt(lambda: self.executor.submit(function, *lost.job).result(), ())
            if not isinstance(result, BrokenExecutor):
                return result
            error = result
            self._renew()
        return WorkerLostError(
            f"the process that worked on it died, and so did the next one ({error}). It may need more memory than "
            "there is, or a library may crash on its file."
        )

    def _renew(self) -> None:
        """Start a new process pool like the executor that was given: as many processes, with the same initializer."""
        self.leave()
        workers, context, begin = (getattr(self._given, f"_{name}", None) for name in _KEPT)
        self._own = ProcessPoolExecutor(workers, context, begin, getattr(self._given, "_initargs", ()))
        self.executor = self._own

    def leave(self) -> None:
        """End the process pool that this object has started; the caller's executor goes on."""
        if self._own is not None:
            self._own.shutdown(cancel_futures=True)


def _attempt(function: Callable[..., _Result], job: tuple[Any, ...]) -> _Result | Exception:
    try:
        return function(*job)
    except Exception as error:
        return error
