"""Augmenting a data set on disk (paper, Algorithm 3): fields for every case and level, images and labels deformed."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from monai_drdm.augment.settings import AugmentSettings
from monai_drdm.executors import check_shard, in_turn, through
from monai_drdm.io import Case, ImageFile, load_image, save_ddf
from monai_drdm.io.files import atomically, is_taken, locked, PART

_SETTINGS = "settings.json"
_DATALIST = "datalist.json"


class AugmentReport(NamedTuple):
    """What a run did."""

    written: int
    """Deformed cases written by this run."""
    kept: int
    """Deformed cases that were there, made by an earlier run with the same settings."""
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
    """
    _check_device(device)
    part, parts = check_shard(shard)
    if force and parts > 1:
        raise ValueError("force and shard do not go together: a part would remove what another has drawn.")
    run, mine = _Run(Path(out), settings, device), cases[part::parts]
    written, kept, failed = 0, 0, dict[str, str]()
    each, finished = len(settings.levels) * settings.draws, 0
    with run.open(force, shared=parts > 1), tqdm(total=len(mine) * each, disable=not progress, unit="draw") as bar:
        if force:
            run.forget(mine)
        jobs = ((run, case, None if executor else bar.update) for case in mine)
        for (_, case, _), done in in_turn(_augment, jobs) if executor is None else through(executor, _augment, jobs):
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
        return AugmentReport(written, kept, failed, run.write_datalist())


def _augment(run: _Run, case: Case, tick: Callable[[], object] | None) -> int:
    """Write what is missing of a case, in any process; how many draws that were."""
    inputs = _hashes(case)
    todo = run.unfinished(case, inputs)
    files = run.load(case) if todo else {}
    for draw in todo:
        run.write(case, inputs, files, draw)
        if tick is not None:
            tick()
    return len(todo)


class _BadCaseError(Exception):
    """A case that cannot be augmented; the others can."""


class _Draw(NamedTuple):
    name: str
    level: float
    seed: str


class _Run:
    """One run into one folder."""

    def __init__(self, folder: Path, settings: AugmentSettings, device: str | None) -> None:
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
            for name in (".", "images", "labels", "fields", "records"):
                (self.folder / name).mkdir(exist_ok=True)
                for part in () if shared else (self.folder / name).glob(f"{PART}*"):
                    part.unlink()  # a killed run's unfinished file
            yield

    def draws(self, case: Case) -> list[_Draw]:
        """What is drawn from a case, in order."""
        settings = self.settings
        return [
            _Draw(f"{case.name}_level{level:g}_draw{k}", level, f"{settings.seed}/{case.name}/{level:g}/{k}")
            for level in settings.levels
            for k in range(settings.draws)
        ]

    def forget(self, cases: Sequence[Case]) -> None:
        """Remove the records of all draws, so that a run that goes on after this one draws them again."""
        for draw in (draw for case in cases for draw in self.draws(case)):
            self._record_path(draw.name).unlink(missing_ok=True)

    def unfinished(self, case: Case, inputs: Mapping[str, str]) -> list[_Draw]:
        """Draws that were not finished with the same settings, or whose files are no longer there.

        Raises:
            FileExistsError: a draw was made from other files.
        """
        todo = []
        for draw in self.draws(case):
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

    def write(self, case: Case, inputs: Mapping[str, str], files: Mapping[str, ImageFile], draw: _Draw) -> None:
        """Draw, deform and write; the record last."""
        names = {key: f"{key}s/{draw.name}{file.suffix}" for key, file in files.items()}
        names["field"] = f"fields/{draw.name}.nii.gz"
        try:
            transform = self.settings.transform(draw.level, list(files), self.device)
            sample: dict[str, Any] = {key: file.data for key, file in files.items()}
            sample["seed"] = draw.seed
            deformed = transform(sample)
            deformation = transform.last
            assert deformation is not None
            assert deformation.params is not None
            save_ddf(deformation.ddf, files["image"].data.affine.numpy(), self.folder / names["field"])
            for key, file in files.items():
                file.save_like(torch.as_tensor(deformed[key]), self.folder / names[key])
        except (TypeError, ValueError) as error:
            for name in names.values():
                (self.folder / name).unlink(missing_ok=True)  # without a record nothing says what they are
            raise _BadCaseError(str(error)) from error
        record = {
            "name": draw.name,
            "source": {key: str(path.absolute()) for key, path in _paths(case).items()},
            "inputs_sha256": inputs,
            "files": names,
            "params": asdict(deformation.params),
            "statistics": asdict(deformation.statistics),
            "settings_sha256": self.digest,
        }
        _write_text(self._record_path(draw.name), json.dumps(record, indent=2) + "\n")

    def write_datalist(self) -> Path:
        """A MONAI datalist of all draws in the folder that were finished with these settings, relative to it."""
        path, entries = self.folder / _DATALIST, None
        while entries != (found := self._entries()):  # another shard may have finished meanwhile
            entries = found
            _write_text(path, json.dumps({"training": entries}, indent=2) + "\n")
        return path

    def _entries(self) -> list[dict[str, str]]:
        records = [self._read_record(path) for path in sorted((self.folder / "records").glob("*.json"))]
        return [{key: name for key, name in record["files"].items() if key != "field"} for record in records if record]

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
