"""A data set on disk into a folder: resumable, in any number of processes, every file written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from monai_drdm.augment.settings import AugmentSettings, Draw, PairSettings
from monai_drdm.executors import check_shard, in_turn, through
from monai_drdm.io import Case, ImageFile, load_image
from monai_drdm.io.files import atomically, is_taken, locked, PART

_SETTINGS = "settings.json"
_DATALIST = "datalist.json"


class AugmentReport(NamedTuple):
    """What a run did."""

    written: int
    """Deformed cases, or pairs, written by this run."""
    kept: int
    """Those that were there, made by an earlier run with the same settings."""
    failed: dict[str, str]
    """Why a case was skipped, by its name."""
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

    A run that was interrupted goes on where it stopped when it is called again; the files are those of a run that was
    not. Every file is written whole or not at all, its record last.

    Args:
        cases: what to augment.
        out: new or empty folder, or that of an earlier run with the same settings. One run at a time, or one for each
            shard.
        settings: levels, draws and how to deform.
        force: write into any folder and draw everything again; files of the same name are replaced.
        device: where the network runs; None: the CPU.
        progress: show a progress bar.
        executor: any ``concurrent.futures.Executor`` whose workers reach the folders; the files are the same.
        shard: ``(I, N)``: only part I of N of the cases (from 0), for array jobs that fill one folder. Run each part
            once.

    Returns:
        What was written, what was there already, and which cases failed and why; the others are complete.

    Raises:
        FileExistsError: the folder holds something else, or what was made from other files, and not ``force``; or
            another run is at it.
        OSError: the output cannot be written, as when the disk is full; what is finished stays.
        ValueError: results would go into a folder that inputs come from.
    """
    return _fill(cases, out, settings, force, device, progress, executor, shard)


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

    For each pair ``fixed(x) = moving(x + ddf(x))``; fields are written as ITK and ANTs read them, for warping the
    moving image onto the fixed one. ``monai_drdm.io.load_ddf`` reads them in voxels. Arguments, result and errors are
    those of ``augment``.
    """
    return _fill(cases, out, settings, force, device, progress, executor, shard)


def _fill(
    cases: Sequence[Case],
    out: str | os.PathLike[str],
    settings: AugmentSettings | PairSettings,
    force: bool,
    device: str | None,
    progress: bool,
    executor: Executor | None,
    shard: tuple[int, int] | None,
) -> AugmentReport:
    _check_device(device)
    part, parts = check_shard(shard)
    if force and parts > 1:
        raise ValueError("force and shard do not go together: a part would remove what another has drawn.")
    _refuse_own_inputs(cases, Path(out), settings)
    run, mine = _Run(Path(out), settings, device), cases[part::parts]
    written, kept, failed = 0, 0, dict[str, str]()
    each, finished = settings.per_case, 0
    with run.open(force, shared=parts > 1), tqdm(total=len(mine) * each, disable=not progress, unit="draw") as bar:
        if force:
            run.forget(mine)
        jobs = ((run, case, None if executor else bar.update) for case in mine)
        for (_, case, _), done in (
            in_turn(_write_case, jobs) if executor is None else through(executor, _write_case, jobs)
        ):
            if isinstance(done, _BadCaseError):
                failed[case.name] = str(done)
                bar.write(f"skipped {case.name}: {done}", file=sys.stderr)
            elif isinstance(done, OSError) and not isinstance(done, FileExistsError):
                raise OSError(
                    f"{done}. What is finished in {run.folder} stays; the same call goes on from it."
                ) from done
            elif isinstance(done, Exception):
                raise done
            else:
                written, kept = written + done, kept + each - done
            finished += 1
            bar.update(each * finished - bar.n)
        return AugmentReport(written, kept, failed, run.write_datalist(cases))


def _write_case(run: _Run, case: Case, tick: Callable[[], object] | None) -> int:
    """Write what is missing of a case, in any process; how many draws that were."""
    inputs = _hashes(case)
    try:
        todo = run.unfinished(case, inputs)
        files = run.load(case) if todo else {}
        for draw in todo:
            run.write(case, inputs, files, draw)
            if tick is not None:
                tick()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # the next case's name may do
            raise _BadCaseError(str(error)) from error
        raise
    return len(todo)


class _BadCaseError(Exception):
    """A case that cannot be augmented; the others can."""


class _Run:
    """One run into one folder."""

    def __init__(self, folder: Path, settings: AugmentSettings | PairSettings, device: str | None) -> None:
        self.folder, self.settings, self.device = folder, settings, device
        self.described = settings.to_json()
        self.digest = hashlib.sha256(self.described.encode()).hexdigest()

    @contextmanager
    def open(self, force: bool, *, shared: bool) -> Iterator[None]:
        """Have the folder to oneself or with other shards, made or found to be one to go on in.

        Raises:
            FileExistsError: the folder holds something else, or another run is at it.
        """
        there = self.folder / _SETTINGS
        if not force and is_taken(self.folder):
            if not there.is_file():
                raise FileExistsError(f"{self.folder} holds something else. Choose another folder, or use --force.")
            if there.read_text(encoding="utf-8") != self.described:
                raise FileExistsError(
                    f"{self.folder} was made with other settings ({there}). Choose another folder, repeat those "
                    "settings to go on, or use --force to draw everything again."
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder, shared=shared):
            _write_text(there, self.described)
            for name in (".", "records", *self.settings.folders):
                (self.folder / name).mkdir(exist_ok=True)
                for part in () if shared else (self.folder / name).glob(f"{PART}*"):
                    part.unlink()  # a killed run's unfinished file
            yield

    def forget(self, cases: Sequence[Case]) -> None:
        """Remove the records of all draws, so that a run that goes on after this one draws them again."""
        for draw in (draw for case in cases for draw in self.settings.draws_of(case.name)):
            if os.path.lexists(path := self._record_path(draw.name)):
                path.unlink()

    def unfinished(self, case: Case, inputs: Mapping[str, str]) -> list[Draw]:
        """Draws that were not finished with the same settings, or whose files are no longer there.

        Raises:
            FileExistsError: a draw was made from other files.
        """
        todo = []
        for draw in self.settings.draws_of(case.name):
            record = self._read_record(self._record_path(draw.name))
            if record is None or not all((self.folder / file).is_file() for file in record["files"].values()):
                todo.append(draw)
            elif record["inputs_sha256"] != inputs:
                raise FileExistsError(
                    f"{draw.name} in {self.folder} was made from other files than {case.image} and its label. Choose "
                    "another folder, or use --force to draw everything again."
                )
        return todo

    def load(self, case: Case) -> dict[str, ImageFile]:
        """Image and label of a case."""
        try:
            keep_slice = self.settings.slice_axis is not None
            return {key: load_image(path, keep_slice=keep_slice) for key, path in _paths(case).items()}
        except (OSError, TypeError, ValueError) as error:
            raise _BadCaseError(str(error)) from error

    def write(self, case: Case, inputs: Mapping[str, str], files: Mapping[str, ImageFile], draw: Draw) -> None:
        """Draw, deform and write; the record last."""
        names = self.settings.names_of(files, draw)
        try:
            made = self.settings.make(files, draw, self.device)
            for key, save in made.savers.items():
                save(self.folder / names[key])
        except (TypeError, ValueError) as error:
            for name in names.values():
                (self.folder / name).unlink(missing_ok=True)  # without a record nothing says what they are
            raise _BadCaseError(str(error)) from error
        record = {
            "name": draw.name,
            "source": {key: str(path.absolute()) for key, path in _paths(case).items()},
            "inputs_sha256": inputs,
            "files": names,
            "params": made.params,
            "statistics": made.statistics,
            "settings_sha256": self.digest,
        }
        _write_text(self._record_path(draw.name), json.dumps(record, indent=2) + "\n")

    def write_datalist(self, cases: Sequence[Case]) -> Path:
        """A MONAI datalist of all draws in the folder that were finished with these settings, relative to it.

        Draws of the cases under names that they no longer have are left out.
        """
        path, entries = self.folder / _DATALIST, None
        names = {draw.name for case in cases for draw in self.settings.draws_of(case.name)}
        sources = {str(case.image.absolute()) for case in cases}
        while entries != (found := self._entries(names, sources)):  # another shard may have finished meanwhile
            entries = found
            _write_text(path, json.dumps({"training": entries}, indent=2) + "\n")
        return path

    def _entries(self, names: set[str], sources: set[str]) -> list[dict[str, str]]:
        records = [self._read_record(path) for path in sorted((self.folder / "records").glob("*.json"))]
        unlisted = self.settings.unlisted
        return [
            {key: name for key, name in one["files"].items() if key not in unlisted}
            for one in records
            if one and (one["name"] in names or one["source"]["image"] not in sources)
        ]

    def _record_path(self, name: str) -> Path:
        return self.folder / "records" / f"{name}.json"

    def _read_record(self, path: Path) -> dict[str, Any] | None:
        """The record of a draw that was finished with these settings."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        mine = isinstance(record, dict) and record.get("settings_sha256") == self.digest
        return record if mine else None


def _refuse_own_inputs(cases: Sequence[Case], out: Path, settings: AugmentSettings | PairSettings) -> None:
    """What is written beside its inputs would be taken for inputs by the next call."""
    written = {(out / name).resolve() for name in settings.folders}
    for path in (path for case in cases for path in _paths(case).values()):
        if path.resolve().parent in written:
            raise ValueError(f"{out}: results would go into {path.parent}, where inputs are. Choose another folder.")


def _paths(case: Case) -> dict[str, Path]:
    return {"image": case.image} | ({} if case.label is None else {"label": case.label})


def _hashes(case: Case) -> dict[str, str]:
    """What the files of a case hold."""
    try:
        return {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in _paths(case).items()}
    except FileNotFoundError as error:
        raise _BadCaseError(f"no file {error.filename}.") from error
    except OSError as error:
        raise _BadCaseError(str(error)) from error


def _check_device(device: str | None) -> None:
    try:
        torch.empty(0, device=device or "cpu")
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None


def _write_text(path: Path, text: str) -> None:
    atomically(path, lambda part: Path(part).write_text(text, encoding="utf-8"))
