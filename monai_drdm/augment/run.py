"""Runs over a data set on disk. A run continues where an earlier one stopped, and may use several processes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple

import torch

from monai_drdm.augment.dataset_settings import DatasetSettings
from monai_drdm.augment.deformed_cases import AugmentSettings
from monai_drdm.augment.output_folder import (
    BadCaseError,
    ChangedOutputError,
    hash_inputs,
    input_paths,
    OutputFolder,
)
from monai_drdm.augment.registration_pairs import PairSettings
from monai_drdm.executors import check_shard, run_jobs, WorkerLostError
from monai_drdm.io import Case
from monai_drdm.progress import LateBar, none_usable


class AugmentReport(NamedTuple):
    """The result of a run."""

    written: int
    """Number of deformed cases, or pairs, that this run wrote."""
    kept: int
    """Number of those that an earlier run with the same settings had written."""
    failed: dict[str, str]
    """For each case that was skipped, by name, the reason."""
    datalist: Path


def augment(
    cases: Sequence[Case],
    out: str | os.PathLike[str],
    settings: AugmentSettings,
    *,
    force: bool = False,
    device: str | None = None,
    progress: bool = False,
    executor: Executor | None = None,
    shard: tuple[int, int] | None = None,
) -> AugmentReport:
    """Write deformed images, labels, fields and records of all cases, and a datalist of them.

    A run that was interrupted continues when it is called again; its files are the same as those of an uninterrupted
    run. Every file is written completely or not at all, the record of a draw last.

    Args:
        cases: what to augment.
        out: new or empty folder, or that of an earlier run with the same settings. Only one run, or one for each shard,
            may work in it at a time.
        settings: levels, draws and how to deform.
        force: write into any folder and draw everything again; files of the same name are replaced.
        device: where the network runs; None: the CPU.
        progress: show a progress bar.
        executor: any ``concurrent.futures.Executor`` whose workers reach the folders; the files are the same.
        shard: ``(I, N)``: only part I of N of the cases (from 0), for array jobs that fill one folder. Run each part
            once.

    Returns:
        What was written, what was there already, and which cases failed and why. All other cases are complete.

    Raises:
        FileExistsError: another run is writing to the folder; or, without ``force``, it holds something else or what
            was made from other files.
        OSError: the output cannot be written, for example because the disk is full; finished files stay.
        ValueError: results would go into a folder that inputs come from; or none of the cases can be used.
    """
    return _run(cases, OutputFolder(Path(out), settings, device), force, progress, executor, shard)


def make_pairs(
    cases: Sequence[Case],
    out: str | os.PathLike[str],
    settings: PairSettings,
    *,
    force: bool = False,
    device: str | None = None,
    progress: bool = False,
    executor: Executor | None = None,
    shard: tuple[int, int] | None = None,
) -> AugmentReport:
    """Write registration pairs of all cases (paper, Algorithm 4), the fields between them, and a datalist.

    For each pair ``fixed(x) = moving(x + ddf(x))``. Fields are written as ITK and ANTs read them, for warping the
    moving image onto the fixed one. ``monai_drdm.io.load_ddf`` reads them in voxels. Arguments, result and errors are
    those of ``augment``.
    """
    return _run(cases, OutputFolder(Path(out), settings, device), force, progress, executor, shard)


def _run(
    cases: Sequence[Case],
    output: OutputFolder,
    force: bool,
    progress: bool,
    executor: Executor | None,
    shard: tuple[int, int] | None,
) -> AugmentReport:
    _check_device(output.device)
    if not cases:
        raise ValueError("cases must be one or more, got none. find_cases and read_cases find them.")
    part, parts = check_shard(shard)
    if force and parts > 1:
        raise ValueError("force and shard do not go together: a part would remove what another has drawn.")
    _refuse_own_inputs(cases, output.folder, output.settings)
    _refuse_further_images(cases, output.settings)
    cases_of_shard, draws = cases[part::parts], output.settings.draws_per_case
    tally = _Tally(LateBar(len(cases_of_shard) * draws, "draw", shown=progress), draws)
    with output.open(force, shared=parts > 1), tally.bar:
        if force:
            output.forget(cases_of_shard)
        jobs = ((output, case, None if executor else tally.tick) for case in cases_of_shard)
        for (_, case, _), result in run_jobs(_write_case, jobs, executor):
            if isinstance(result, OSError) and not isinstance(result, FileExistsError):
                message = f"{result}. What is finished in {output.folder} stays; the same call goes on from it."
                raise OSError(message) from result
            tally.take(case, result)
        datalist = output.write_datalist(cases, tally.changed)
        if tally.failed and not tally.written + tally.kept and parts == 1:
            output.give_up()
            raise ValueError(none_usable(tally.failed))
        tally.bar.say_skipped()
        return AugmentReport(tally.written, tally.kept, tally.failed, datalist)


class _Tally:
    """Counts what a run has done so far, and shows it in a progress bar."""

    def __init__(self, bar: LateBar, draws: int) -> None:
        self.bar, self.draws = bar, draws
        self.written, self.kept = 0, 0
        self.failed: dict[str, str] = {}
        self.changed: list[str] = []
        """Names of draws whose files are not what was written."""
        self._ticks = 0

    def tick(self) -> None:
        """Count one finished draw of the current case."""
        self._ticks += 1
        self.bar.done()

    def take(self, case: Case, result: int | Exception) -> None:
        """Count the result of a case: the number of draws that were written, or the reason why it was skipped.

        Raises:
            Exception: the result, if it is one that ends the run.
        """
        left, self._ticks = self.draws - self._ticks, 0
        if isinstance(result, (BadCaseError, WorkerLostError)):
            self.failed[case.name] = str(result)
            self.changed += result.draws if isinstance(result, ChangedOutputError) else []
            self.bar.skipped(left, f"skipped {case.name}: {result}")
        elif isinstance(result, Exception):
            raise result
        else:
            self.written, self.kept = self.written + result, self.kept + self.draws - result
            self.bar.done(left)


def _write_case(output: OutputFolder, case: Case, tick: Callable[[], object] | None) -> int:
    """Write what is missing of one case and return the number of draws; this runs in any process.

    Args:
        output: where to write.
        case: the case.
        tick: called after each draw; None: nothing is called.
    """
    inputs = hash_inputs(case)
    try:
        todo = output.unfinished(case, inputs)
        files = output.load(case) if todo else {}
        for draw in todo:
            output.write(case, inputs, files, draw)
            if tick is not None:
                tick()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # the names of other cases may be short enough
            raise BadCaseError(str(error)) from error
        raise
    return len(todo)


def _refuse_further_images(cases: Sequence[Case], settings: DatasetSettings) -> None:
    for case in cases:
        if case.others and not settings.several_images:
            raise ValueError(f"{case.name} must have one image, got further ones: {case.others}. Make a case of each.")


def _refuse_own_inputs(cases: Sequence[Case], out: Path, settings: DatasetSettings) -> None:
    """Refuse to write into a folder of input files, because the next call would take the results for inputs."""
    written = {(out / name).resolve() for name in settings.folders}
    for path in (path for case in cases for path in input_paths(case).values()):
        if path.resolve().parent in written:
            raise ValueError(f"{out}: results would go into {path.parent}, where inputs are. Choose another folder.")


def _check_device(device: str | None) -> None:
    try:
        torch.empty(0, device=device or "cpu")
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
