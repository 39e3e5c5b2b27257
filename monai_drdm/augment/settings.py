"""What fixes the result of augmenting a data set, or of making pairs of it, and what is made of one image."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from monai_drdm._version import __version__
from monai_drdm.fields.sampling import Mode
from monai_drdm.io import ImageFile, save_ddf
from monai_drdm.networks import load_network, network_sha256
from monai_drdm.transforms import RandDRDMDeformd, RandDRDMPaird
from monai_drdm.transforms.pairs import DDF, INVERSE_DDF, INVERSE_RESIDUAL, SIDES


class Draw(NamedTuple):
    """One thing to make of a case."""

    name: str
    seed: str
    level: float | None = None
    """Of ``AugmentSettings``."""


class Made(NamedTuple):
    """What was made, and how each of its files is written."""

    savers: dict[str, Callable[[Path], None]]
    params: dict[str, Any]
    statistics: dict[str, Any]


@dataclass(frozen=True)
class AugmentSettings:
    """What fixes the result of a run, given the images. The first names are those of ``RandDRDMDeformd``.

    Raises:
        ValueError: no levels or draws, or a level twice.
    """

    network: str = "auto"
    sampler: str = "auto"
    steps: int | None = None
    recovery: float = 1.0
    slice_axis: int | None = None
    max_displacement_mm: float | None = None
    label_mode: Mode = "nearest"
    folders: ClassVar[tuple[str, ...]] = ("images", "labels", "fields")
    unlisted: ClassVar[tuple[str, ...]] = ("field",)
    """Files that the datalist leaves out."""

    levels: tuple[float, ...] = (0.3, 0.5, 0.8)
    """Deformation levels; each is drawn ``draws`` times."""
    draws: int = 1
    seed: int = 0
    version: str = __version__

    def __post_init__(self) -> None:
        if not self.levels or len({f"{level:g}" for level in self.levels}) != len(self.levels):
            raise ValueError(f"levels must be one or more numbers that differ in six digits, got {self.levels}.")
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
            recovery=self.recovery,
            mode=["bilinear", self.label_mode][: len(keys)],
            slice_axis=self.slice_axis,
            max_displacement_mm=self.max_displacement_mm,
            seed_key="seed",
            device=device,
            invertible=False,
        )

    @property
    def per_case(self) -> int:
        """Draws of every case."""
        return len(self.levels) * self.draws

    def draws_of(self, case: str) -> list[Draw]:
        """What is drawn from a case, in order."""
        return [
            Draw(f"{case}_level{level:g}_draw{k}", f"{self.seed}/{case}/{level:g}/{k}", level)
            for level in self.levels
            for k in range(self.draws)
        ]

    def names_of(self, files: Mapping[str, ImageFile], draw: Draw) -> dict[str, str]:
        """The files of a draw, within the folder."""
        names = {key: f"{key}s/{draw.name}{file.suffix}" for key, file in files.items()}
        return names | {"field": f"fields/{draw.name}.nii.gz"}

    def make(self, files: Mapping[str, ImageFile], draw: Draw, device: str | None) -> Made:
        """Draw a field and deform image and label."""
        assert draw.level is not None
        transform = self.transform(draw.level, list(files), device)
        deformed = transform(_sample(files, draw))
        deformation = transform.last
        assert deformation is not None
        assert deformation.params is not None
        affine = files["image"].data.affine.numpy()
        savers: dict[str, Callable[[Path], None]] = {"field": partial(save_ddf, deformation.ddf, affine)}
        savers |= {key: partial(file.save_like, torch.as_tensor(deformed[key])) for key, file in files.items()}
        return Made(savers, asdict(deformation.params), asdict(deformation.statistics))

    def to_json(self) -> str:
        """The settings as JSON, the network of a file by its name and hash: the same file may be called otherwise."""
        return _described(self)


@dataclass(frozen=True)
class PairSettings:
    """What fixes registration pairs, given the images. The first names are those of ``RandDRDMPaird``.

    Raises:
        ValueError: no pairs, or a level out of range.
    """

    folders: ClassVar[tuple[str, ...]] = (
        *(f"{side}{part}" for part in ("", "_labels") for side in SIDES),
        "fields",
        "inverse_fields",
    )
    unlisted: ClassVar[tuple[str, ...]] = ()

    network: str = "auto"
    sampler: str = "auto"
    steps: int | None = None
    recovery: float = 1.0
    slice_axis: int | None = None
    max_displacement_mm: float | None = None
    label_mode: Mode = "nearest"
    augmentation_level: tuple[float, float] | None = (0.3, 0.8)
    synthesis_level: tuple[float, float] = (0.3, 0.8)
    pairs: int = 1
    """Of every image."""
    seed: int = 0
    version: str = __version__

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs must be 1 or more, got {self.pairs}.")
        self.transform(["image"])  # wrong arguments fail before the first file is read

    def transform(self, keys: Sequence[str], device: str | None = None) -> RandDRDMPaird:
        """The transform; what it makes depends on the value of ``seed`` in the sample only."""
        return RandDRDMPaird(
            keys,
            self.network,
            augmentation_level=self.augmentation_level,
            synthesis_level=self.synthesis_level,
            sampler=self.sampler,
            steps=self.steps,
            recovery=self.recovery,
            mode=["bilinear", self.label_mode][: len(keys)],
            slice_axis=self.slice_axis,
            max_displacement_mm=self.max_displacement_mm,
            seed_key="seed",
            device=device,
            invertible=False,
        )

    @property
    def per_case(self) -> int:
        """Pairs of every case."""
        return self.pairs

    def draws_of(self, case: str) -> list[Draw]:
        """What is made of a case, in order."""
        return [Draw(f"{case}_pair{k}", f"{self.seed}/{case}/pair/{k}") for k in range(self.pairs)]

    def names_of(self, files: Mapping[str, ImageFile], draw: Draw) -> dict[str, str]:
        """The files of a pair, within the folder."""
        names = {side: f"{side}/{draw.name}{files['image'].suffix}" for side in SIDES}
        if "label" in files:
            names |= {f"{side}_label": f"{side}_labels/{draw.name}{files['label'].suffix}" for side in SIDES}
        data = files["image"].data
        suffix = ".mha" if data.ndim == 3 or data.shape[-1] == 1 else ".nii.gz"  # ITK takes no slice's field from NIfTI
        return names | {DDF: f"fields/{draw.name}{suffix}", INVERSE_DDF: f"inverse_fields/{draw.name}{suffix}"}

    def make(self, files: Mapping[str, ImageFile], draw: Draw, device: str | None) -> Made:
        """Make a pair."""
        transform = self.transform(list(files), device)
        out = transform(_sample(files, draw))
        assert transform.last is not None
        image = files["image"]
        affine = image.data.affine.numpy() if image.itk_affine is None else image.itk_affine
        savers: dict[str, Callable[[Path], None]] = {
            name: partial(save_ddf, out[name], affine, convention="itk", one_slice=image.itk_dims == 3)
            for name in (DDF, INVERSE_DDF)
        }
        for side in SIDES:
            for key, file in files.items():
                name = side if key == "image" else f"{side}_{key}"
                savers[name] = partial(file.save_like, torch.as_tensor(out[name]))
        statistics = asdict(transform.last.synthesis.statistics)
        statistics["inverse_residual_vox"] = float(out[INVERSE_RESIDUAL])
        return Made(savers, asdict(transform.last.params), statistics)

    def to_json(self) -> str:
        """As of ``AugmentSettings``."""
        return _described(self)


def _sample(files: Mapping[str, ImageFile], draw: Draw) -> dict[str, Any]:
    """What the transforms take."""
    return {**{key: file.data for key, file in files.items()}, "seed": draw.seed}


def _described(settings: AugmentSettings | PairSettings) -> str:
    described: dict[str, Any] = asdict(settings)
    if settings.network.endswith(".safetensors"):
        network = load_network(settings.network)
        described["network"] = {"name": network.card.name, "sha256": network_sha256(network)}
    return json.dumps(described, indent=2) + "\n"
