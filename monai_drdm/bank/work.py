"""Work on many items, here or through an executor."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

_Job = TypeVar("_Job", bound=tuple[Any, ...])
_Result = TypeVar("_Result")

_IN_FLIGHT = 32


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
        if pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                job = pending.pop(future)
                try:
                    yield job, future.result()
                except BrokenExecutor as error:
                    yield job, _again(function, job, error)
                except Exception as error:
                    yield job, error


def _again(function: Callable[..., _Result], job: _Job, error: Exception) -> _Result | Exception:
    warnings.warn(f"a worker was lost ({error}); its work is done in this process.", stacklevel=3)
    return _attempt(function, job)


def _attempt(function: Callable[..., _Result], job: _Job) -> _Result | Exception:
    try:
        return function(*job)
    except Exception as error:
        return error
