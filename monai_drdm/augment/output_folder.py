"""The folder that a run over a data set fills: every file is written completely or not at all, and a run can continue.

A draw is finished when its record, which is written last, is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from monai_drdm.augment.dataset_settings import DatasetSettings, Draw
from monai_drdm.augment.draw_record import DrawRecord, sealed
from monai_drdm.documents import Document
from monai_drdm.io import Case, ImageFile, load_image
from monai_drdm.io.files import atomically, is_taken, locked, PART

_SETTINGS = "settings.json"
_DATALIST = "datalist.json"
_RUN = Document(
    "the settings of a run over a data set", "Choose another folder, or use --force to draw everything again."
)
RECORD = Document("the record of a draw", "Remove it and run again, which draws it anew.")


class BadCaseError(Exception):
    """One case cannot be used. The run goes on with the others."""


class ChangedOutputError(BadCaseError):
    """A finished file of a case was damaged or edited. Nothing of this case is replaced.

    Args:
        message: the message of the error.
        draws: names of the draws with such files.
    """

    def __init__(self, message: str, draws: Sequence[str]) -> None:
        super().__init__(message, draws)  # exceptions travel between processes by these arguments
        self.draws = draws

    def __str__(self) -> str:
        return str(self.args[0])


class OutputFolder:
    """The folder of one run.

    Args:
        folder: where it is; it need not exist.
        settings: fix the files, given the images.
        device: where the network runs; None: the CPU.
    """

    def __init__(self, folder: Path, settings: DatasetSettings, device: str | None) -> None:
        self.folder, self.device = folder, device
        self._take(settings)

    def _take(self, settings: DatasetSettings) -> None:
        self.settings, self.settings_json = settings, settings.to_json()
        self.settings_sha256 = hashlib.sha256(self.settings_json.encode()).hexdigest()

    @contextmanager
    def open(self, force: bool, *, shared: bool) -> Iterator[None]:
        """Create the folder, or check that an earlier run with equal settings began it, and lock it.

        Args:
            force: use the folder whatever it holds.
            shared: allow other runs that also pass True to work in the folder at the same time, as the shards of one
                run do.

        Raises:
            FileExistsError: the folder holds something else, or another run is writing to it.
        """
        there = self.folder / _SETTINGS
        if not force and is_taken(self.folder):
            if not there.is_file():
                raise FileExistsError(f"{self.folder} holds something else. Choose another folder, or use --force.")
            self._check_settings(there)
        if force and (self.folder / _DATALIST).exists() and not there.exists():
            raise FileExistsError(
                f"{self.folder / _DATALIST} is not of a run, and would be replaced. Move it away first."
            )
        names = ("records", *self.settings.folders)
        for name in names:
            self._refuse_link(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder, shared=shared):
            text = self.settings_json
            atomically(there, lambda part: Path(part).write_text(text, encoding="utf-8"), replace=force)
            self._check_settings(there)  # another run may have begun just before the folder was locked
            for name in (".", *names):
                (self.folder / name).mkdir(exist_ok=True)
                for part in () if shared else (self.folder / name).glob(f"{PART}*"):
                    part.unlink()  # left behind by a run that was killed
            yield

    def _check_settings(self, there: Path) -> None:
        """Compare the settings with those that began the folder, whose version of this package they take over."""
        begun = _RUN.read_text(there)
        if begun != self.settings_json:
            begun_by = _RUN.read_json(there).get("version")
            self._take(replace(self.settings, version=begun_by))  # type: ignore[call-arg]  # all settings have one
        if begun != self.settings_json:
            raise FileExistsError(
                f"{self.folder} was made with other settings ({there}). Choose another folder, repeat those "
                "settings to go on, or use --force to draw everything again."
            )

    def _refuse_link(self, name: str) -> None:
        path = self.folder / name
        if path.resolve() != self.folder.resolve() / name:
            raise FileExistsError(
                f"{path} is a link to {path.resolve()}, and results would leave {self.folder}. Remove the link, or "
                "choose another folder."
            )

    def forget(self, cases: Sequence[Case]) -> None:
        """Remove the records of all draws from these cases, so that they are drawn again, now or by a later run."""
        for draw in (draw for case in cases for draw in self.settings.draws_of(case.name)):
            if os.path.lexists(path := self._record_path(draw.name)):
                path.unlink()

    def unfinished(self, case: Case, inputs: Mapping[str, str]) -> list[Draw]:
        """Draws from a case that were not finished with these settings, or whose files are no longer there.

        Args:
            case: the case.
            inputs: ``hash_inputs`` of the case.

        Raises:
            ChangedOutputError: a file of a finished draw is not what was written.
            FileExistsError: a draw was made from other files.
        """
        todo, changed = [], dict[str, list[str]]()
        for draw in self.settings.draws_of(case.name):
            record = self._read_record(self._record_path(draw.name))
            if record is None:
                todo.append(draw)
            elif files := record.changed(self.folder, read=True):
                changed[draw.name] = files
            elif record.missing(self.folder):
                todo.append(draw)
            elif record.inputs_sha256 != inputs:
                raise FileExistsError(
                    f"{draw.name} in {self.folder} was made from other files than {case.image} and its label. Choose "
                    "another folder, or use --force to draw everything again."
                )
        if changed:
            listed = ", ".join(file for files in changed.values() for file in files)
            raise ChangedOutputError(
                f"{listed} in {self.folder}: not what was written there; damaged, or edited. What you edited, keep "
                "elsewhere. Remove it here, and it is drawn again; --force draws everything again.",
                list(changed),
            )
        return todo

    def give_up(self) -> None:
        """Remove settings and empty folders of a run that has written nothing, so that another run may begin here."""
        with suppress(OSError):  # a folder that is not empty
            for name in ("records", *self.settings.folders):
                (self.folder / name).rmdir()
            (self.folder / _SETTINGS).unlink()

    def load(self, case: Case) -> dict[str, ImageFile]:
        """Read image and label of a case.

        Raises:
            BadCaseError: a file cannot be read.
        """
        try:
            keep_slice = self.settings.slice_axis is not None
            return {key: load_image(path, keep_slice=keep_slice) for key, path in input_paths(case).items()}
        except (OSError, TypeError, ValueError) as error:
            raise BadCaseError(str(error)) from error

    def write(self, case: Case, inputs: Mapping[str, str], files: Mapping[str, ImageFile], draw: Draw) -> None:
        """Make one draw and write its files, the record last.

        Raises:
            BadCaseError: the images do not suit the network, or the result cannot be stored in their formats.
            OSError: a file cannot be written.
        """
        names = self.settings.file_names(files, draw)
        try:
            result = self.settings.make(files, draw, self.device)
            for key, save in result.savers.items():
                save(self.folder / names[key])
        except (TypeError, ValueError) as error:
            for name in names.values():
                (self.folder / name).unlink(
                    missing_ok=True
                )  # without a record nobody could tell which draw the files belong to
            raise BadCaseError(str(error)) from error
        record = DrawRecord(
            name=draw.name,
            source={key: str(path.absolute()) for key, path in input_paths(case).items()},
            inputs_sha256=dict(inputs),
            files=names,
            params=result.params,
            statistics=result.statistics,
            settings_sha256=self.settings_sha256,
            outputs={key: sealed(self.folder / name) for key, name in names.items()},
        )
        _write_text(self._record_path(draw.name), record.to_json())

    def write_datalist(self, cases: Sequence[Case], left_out: Collection[str] = ()) -> Path:
        """Write a MONAI datalist of all draws in the folder that were finished with these settings.

        Its paths are relative to the folder. These draws are left out: those that an earlier run made from the same
        cases under other names, and those whose files are missing or have changed their size. An empty list is not
        written, unless there is a list already.

        Args:
            cases: all cases of the run.
            left_out: names of draws that are left out too.
        """
        path, entries = self.folder / _DATALIST, None
        names = {draw.name for case in cases for draw in self.settings.draws_of(case.name)} - set(left_out)
        sources = {str(case.image.absolute()) for case in cases}
        while entries != (found := self._entries(names, sources)):  # another shard may have finished meanwhile
            entries = found
            if entries or path.exists():
                _write_text(path, json.dumps({"training": entries}, indent=2) + "\n")
        return path

    def _entries(self, names: set[str], sources: set[str]) -> list[dict[str, Any]]:
        """Entries of the datalist: draws with one of the names, and draws from other images than the sources."""
        records = [self._read_record(path) for path in sorted((self.folder / "records").glob("*.json"))]
        return [
            self.settings.listed(record.files)
            for record in records
            if record
            and (record.name in names or record.source.get("image") not in sources)
            and not record.missing(self.folder)
            and not record.changed(self.folder, read=False)
        ]

    def _record_path(self, name: str) -> Path:
        return self.folder / "records" / f"{name}.json"

    def _read_record(self, path: Path) -> DrawRecord | None:
        """The record of a draw. None if none has these settings, or if it is damaged, which gives a warning."""
        try:
            described = RECORD.read_json(path)
            if described.get("settings_sha256", self.settings_sha256) != self.settings_sha256:
                return None
            with RECORD.reading(path):
                return DrawRecord.of(described, path.stem, self.settings.folders)
        except FileNotFoundError:
            return None
        except ValueError as error:
            warnings.warn(f"{error} The draw counts as not made.", stacklevel=3)
            return None


def input_paths(case: Case) -> dict[str, Path]:
    """The files of a case by kind: ``image``, ``image_1`` and so on for further ones, ``label`` if it has one."""
    images = {"image": case.image} | {f"image_{number}": path for number, path in enumerate(case.others, 1)}
    return images | ({} if case.label is None else {"label": case.label})


def hash_inputs(case: Case) -> dict[str, str]:
    """The sha256 of each file of a case, by kind.

    Raises:
        BadCaseError: a file cannot be read.
    """
    paths = input_paths(case)
    try:
        for path in paths.values():
            if not stat.S_ISREG(path.stat().st_mode):
                raise BadCaseError(f"{path} is not a file.")  # devices and pipes can be read without end
        return {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in paths.items()}
    except FileNotFoundError as error:
        raise BadCaseError(f"no file {error.filename}.") from error
    except OSError as error:
        raise BadCaseError(str(error)) from error


def _write_text(path: Path, text: str) -> None:
    atomically(path, lambda part: Path(part).write_text(text, encoding="utf-8"))
