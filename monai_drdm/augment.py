"""Augmenting a data set on disk (paper, Algorithm 3): fields for every case and level, images and labels deformed."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from monai_drdm._version import __version__
from monai_drdm.fields.warp import Mode
from monai_drdm.io import Case, ImageFile, load_image, save_ddf, stem_of
from monai_drdm.io.files import atomically
from monai_drdm.networks import load_network
from monai_drdm.transforms import RandDRDMDeformd
from monai_drdm.transforms.inputs import spacing_of

_SETTINGS = "settings.json"
_DATALIST = "datalist.json"
_PART = ".part-*"


@dataclass(frozen=True)
class AugmentSettings:
    """What fixes the result of a run, given the images. The first names are those of ``RandDRDMDeformd``.

    Raises:
        ValueError: no levels or draws, or a level twice.
    """

    network: str = "auto"
    sampler: str = "auto"
    steps: int | None = None
    slice_axis: int | None = None
    max_displacement_mm: float | None = None
    label_mode: Mode = "nearest"
    levels: tuple[float, ...] = (0.3, 0.5, 0.8)
    """Deformation levels; each is drawn ``draws`` times."""
    draws: int = 1
    seed: int = 0
    version: str = __version__

    def __post_init__(self) -> None:
        if not self.levels or len(set(self.levels)) != len(self.levels):
            raise ValueError(f"levels must be one or more different numbers, got {self.levels}.")
        if self.draws < 1:
            raise ValueError(f"draws must be 1 or more, got {self.draws}.")
        for level in self.levels:
            self.transform(level, ["image"])  # wrong arguments fail before the first file is read

    def transform(self, level: float, keys: Sequence[str], device: str | None = None) -> RandDRDMDeformd:
        """The transform of one level; its field depends on the value of ``seed`` in the sample only."""
        return RandDRDMDeformd(
            keys,
            network=self.network,
            prob=1.0,
            deformation_level=level,
            sampler=self.sampler,
            steps=self.steps,
            mode=["bilinear", self.label_mode][: len(keys)],
            slice_axis=self.slice_axis,
            max_displacement_mm=self.max_displacement_mm,
            seed_key="seed",
            device=device,
            invertible=False,
        )


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
) -> AugmentReport:
    """Write deformed images, labels, fields and records of all cases, and a datalist of them.

    A run that was interrupted goes on where it stopped when it is called again; the files are those of a run that was
    not. Every file is written whole or not at all, its record last.

    Args:
        cases: what to augment.
        out: new or empty folder, or that of an earlier run with the same settings.
        settings: levels, draws and how to deform.
        force: write into any folder and draw everything again; files of the same name are replaced.
        device: where the network runs; None: the CPU.
        progress: show a progress bar.

    Returns:
        What was written, what was there already, and which cases failed and why; the others are complete.

    Raises:
        FileExistsError: the folder holds something else, and not ``force``.
        OSError: the output cannot be written, as when the disk is full; what is finished stays.
    """
    if settings.network != "auto":
        load_network(settings.network)  # missing or damaged weights are no fault of a case
    run = _Run(Path(out), settings, force, device)
    run.prepare()
    written, kept, failed = 0, 0, dict[str, str]()
    each = len(settings.levels) * settings.draws
    with tqdm(total=len(cases) * each, disable=not progress, unit="draw") as bar:
        for number, case in enumerate(cases, start=1):
            todo = [draw for draw in run.draws(case) if force or not run.is_done(draw)]
            kept += each - len(todo)
            bar.update(each - len(todo))
            try:
                files = run.load(case) if todo else {}
                for draw in todo:
                    run.write(case, files, draw)
                    written += 1
                    bar.update()
            except _BadCaseError as error:
                failed[case.name] = str(error)
                bar.write(f"skipped {case.name}: {error}", file=sys.stderr)
                bar.update(each * number - bar.n)
            except OSError as error:
                raise OSError(
                    f"{error}. What is finished in {run.folder} stays; the same call goes on from it."
                ) from error
    return AugmentReport(written, kept, failed, run.write_datalist(cases))


class _BadCaseError(Exception):
    """A case that cannot be augmented; the others can."""


class _Draw(NamedTuple):
    name: str
    level: float
    seed: str


class _Run:
    """One run into one folder."""

    def __init__(self, folder: Path, settings: AugmentSettings, force: bool, device: str | None) -> None:
        self.folder, self.settings, self.force, self.device = folder, settings, force, device
        self.described = json.dumps(asdict(settings), indent=2) + "\n"
        self.digest = hashlib.sha256(self.described.encode()).hexdigest()

    def prepare(self) -> None:
        """Make the folder, or make sure that it is one to go on in."""
        there = self.folder / _SETTINGS
        if self.folder.exists() and not self.force and (not self.folder.is_dir() or any(self.folder.iterdir())):
            if not there.is_file():
                raise FileExistsError(f"{self.folder} holds something else. Choose another folder, or use --force.")
            if there.read_text(encoding="utf-8") != self.described:
                raise FileExistsError(
                    f"{self.folder} was made with other settings ({there}). Choose another folder, repeat those "
                    "settings to go on, or use --force to draw everything again."
                )
        for name in ("images", "labels", "fields", "records"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
            for part in (self.folder / name).glob(_PART):
                part.unlink()  # a killed run's unfinished file
        _write_text(there, self.described)

    def draws(self, case: Case) -> list[_Draw]:
        """What is drawn from a case, in order."""
        settings = self.settings
        return [
            _Draw(f"{case.name}_level{level:g}_draw{k}", level, f"{settings.seed}/{case.name}/{level:g}/{k}")
            for level in settings.levels
            for k in range(settings.draws)
        ]

    def is_done(self, draw: _Draw) -> bool:
        """Whether a draw was finished with the same settings, and its files are still there."""
        record = self.read_record(draw)
        return record is not None and all((self.folder / file).is_file() for file in record["files"].values())

    def read_record(self, draw: _Draw) -> dict[str, Any] | None:
        """The record of a finished draw."""
        try:
            record = json.loads((self.folder / "records" / f"{draw.name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        mine = isinstance(record, dict) and record.get("settings_sha256") == self.digest
        return record if mine else None

    def load(self, case: Case) -> dict[str, ImageFile]:
        """Image and label of a case."""
        try:
            paths = {"image": case.image, "label": case.label}
            keep_slice = self.settings.slice_axis is not None
            return {key: load_image(path, keep_slice=keep_slice) for key, path in paths.items() if path is not None}
        except (OSError, TypeError, ValueError) as error:
            raise _BadCaseError(str(error)) from error

    def write(self, case: Case, files: Mapping[str, ImageFile], draw: _Draw) -> None:
        """Draw, deform and write; the record last."""
        transform = self.settings.transform(draw.level, list(files), self.device)
        try:
            sample: dict[str, Any] = {key: file.data for key, file in files.items()}
            sample["seed"] = draw.seed
            deformed = transform(sample)
        except (TypeError, ValueError) as error:
            raise _BadCaseError(str(error)) from error
        deformation = transform.last
        assert deformation is not None
        assert deformation.params is not None
        names = {key: f"{key}s/{draw.name}{file.suffix}" for key, file in files.items()}
        for key, file in files.items():
            file.save_like(torch.as_tensor(deformed[key]), self.folder / names[key])
        names["field"] = f"fields/{draw.name}.nii.gz"
        save_ddf(deformation.ddf, files["image"].data.affine.numpy(), self.folder / names["field"])
        record = {
            "name": draw.name,
            "source": {"image": str(case.image), "label": None if case.label is None else str(case.label)},
            "files": names,
            "params": asdict(deformation.params),
            "statistics": asdict(deformation.statistics),
            "settings_sha256": self.digest,
        }
        _write_text(self.folder / "records" / f"{draw.name}.json", json.dumps(record, indent=2) + "\n")

    def write_datalist(self, cases: Sequence[Case]) -> Path:
        """A MONAI datalist of all finished draws, relative to the folder."""
        records = [self.read_record(draw) for case in cases for draw in self.draws(case)]
        entries = [
            {key: name for key, name in record["files"].items() if key != "field"}
            for record in records
            if record is not None
        ]
        path = self.folder / _DATALIST
        _write_text(path, json.dumps({"training": entries}, indent=2) + "\n")
        return path


def draw_overview(report: AugmentReport, count: int = 6) -> Path:
    """Draw the first deformed cases of a run beside what they came from: ``overview.png`` in its folder.

    Args:
        report: of a run that finished at least one case.
        count: at most this many.

    Raises:
        ValueError: nothing was finished.
    """
    from monai_drdm.viz import contact_sheet, SheetEntry  # matplotlib is an extra

    folder = report.datalist.parent
    entries = json.loads(report.datalist.read_text(encoding="utf-8"))["training"][:count]
    if not entries:
        raise ValueError(f"nothing to draw: no case of {folder} is finished.")
    sheet = []
    for entry in entries:
        name = stem_of(entry["image"])
        record = json.loads((folder / "records" / f"{name}.json").read_text(encoding="utf-8"))
        axis, sources = record["params"]["slice_axis"], record["source"]
        before, spacing = _plane(sources["image"], axis)
        after = _plane(folder / entry["image"], axis)[0]
        labels: list[Tensor | None] = [None, None]
        if "label" in entry:
            labels = [_plane(path, axis)[0] for path in (sources["label"], folder / entry["label"])]
        sheet.append(SheetEntry(name, before, after, labels[0], labels[1], spacing))
    path = folder / "overview.png"
    figure = contact_sheet(sheet)
    atomically(path, lambda part: figure.savefig(part, dpi=100, metadata={"Software": None}))
    return path


def _plane(path: str | os.PathLike[str], axis: int | None) -> tuple[Tensor, tuple[float, float]]:
    """First channel of an image file, and spacing; of a volume its middle slice across ``axis`` or the coarsest."""
    data = load_image(path).data
    spacing, values = spacing_of(data, None, "image"), data.as_tensor()[0]
    if values.ndim == 3:
        axis = int(np.argmax(spacing)) if axis is None else axis
        values = values.select(axis, values.shape[axis] // 2)
        spacing = tuple(s for d, s in enumerate(spacing) if d != axis)
    return values, (spacing[0], spacing[1])


def _write_text(path: Path, text: str) -> None:
    atomically(path, lambda part: Path(part).write_text(text, encoding="utf-8"))
