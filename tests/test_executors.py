"""Jobs of workers that die. The workers are forks of this process, which are there at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor

import pytest

from monai_drdm.executors import run_jobs, WorkerLostError

HERE = os.getpid()


def forked(number):
    return ProcessPoolExecutor(number, multiprocessing.get_context("fork"), signal.alarm, (120,))


def square(number, deadly, folder):
    """The square of a number; some numbers kill the process that works on them, and leave a mark before."""
    mark = folder / f"{number}-{len(list(folder.glob(f'{number}-*')))}"
    mark.touch()
    if number in deadly:
        assert os.getpid() != HERE, "this would have ended the tests"
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


@pytest.mark.parametrize(("count", "deadly"), [(40, (3,)), (40, (0, 39)), (4, (0, 1, 2, 3))])
def test_a_job_that_kills_its_workers_is_given_up_and_the_others_are_done(tmp_path, count, deadly):
    with forked(2) as executor, pytest.warns(UserWarning, match="a worker was lost"):
        results = dict(run_jobs(square, ((n, deadly, tmp_path) for n in range(count)), executor))
    assert {job[0] for job in results} == set(range(count))
    for (number, _, _), result in results.items():
        if number in deadly:
            assert isinstance(result, WorkerLostError)
            assert "died, and so did the next one" in str(result)
        else:
            assert result == number**2
        assert len(list(tmp_path.glob(f"{number}-*"))) <= 2


def test_a_worker_that_is_lost_once_costs_nothing(tmp_path):
    """The job of a worker that somebody killed is done again."""
    with forked(1) as executor:
        executor.submit(os.kill, executor.submit(os.getpid).result(), signal.SIGKILL)
        with pytest.warns(UserWarning, match="a worker was lost"):
            results = dict(run_jobs(square, ((n, (), tmp_path) for n in range(5)), executor))
    assert [results[one] for one in sorted(results)] == [0, 1, 4, 9, 16]
