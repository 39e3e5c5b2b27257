"""Deformed copies of the images and labels of a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from monai_drdm._version import __version__
from monai_drdm.augment.dataset_settings import DatasetSettings, Draw, DrawResult, LATER, sample_of
from monai_drdm.io import ImageFile
from monai_drdm.transforms import RandDRDMDeformd


@dataclass(frozen=True)
class AugmentSettings(DatasetSettings):
    """Everything that fixes deformed cases, given the images; see ``RandDRDMDeformd`` for the settings of a draw.

    Raises:
        ValueError: no levels or draws, or a level twice.
    """

    folders: ClassVar[tuple[str, ...]] = ("images", "labels", "fields")
    not_in_datalist: ClassVar[tuple[str, ...]] = ("field",)
    several_images: ClassVar[bool] = True

    levels: tuple[float, ...] = (0.3, 0.5, 0.8)
    """Deformation levels; each is drawn ``draws`` times."""
    draws: int = 1
    seed: int = 0
    version: str = __version__
    image_number: int = field(default=0, metadata={LATER: 0})
    """Number of the image, counted from 0, that the network sees. Its field moves all images of the case."""

    def __post_init__(self) -> None:
        for level in self.levels:
            self.transform(level, ["image"])  # wrong arguments fail before the first file is read
        object.__setattr__(self, "levels", tuple(float(level) for level in self.levels))
        if not self.levels or len({f"{level:g}" for level in self.levels}) != len(self.levels):
            raise ValueError(f"levels must be one or more numbers that differ in six digits, got {self.levels}.")
        if self.draws < 1:
            raise ValueError(f"draws must be 1 or more, got {self.draws}.")
        if self.image_number < 0:
            raise ValueError(f"image_number must be 0 or more, got {self.image_number}.")

    def transform(self, level: float, keys: Sequence[str], device: str | None = None) -> RandDRDMDeformd:
        """The transform of one level; its field depends on the value of ``seed`` in the sample only."""
        images = [key for key in keys if key != "label"]
        image_key = images[min(self.image_number, len(images) - 1)]
        return RandDRDMDeformd(
            **self.transform_options(keys, device), prob=1.0, deformation_level=level, image_key=image_key
        )

    @property
    def draws_per_case(self) -> int:
        """Number of draws from every case."""
        return len(self.levels) * self.draws

    def draws_of(self, case: str) -> list[Draw]:
        """The draws from a case, in order."""
        return [
            Draw(f"{case}_level{level:g}_draw{k}", f"{self.seed}/{case}/{level:g}/{k}", level)
            for level in self.levels
            for k in range(self.draws)
        ]

    def file_names(self, files: Mapping[str, ImageFile], draw: Draw) -> dict[str, str]:
        """The deformed images, the label and the field; several images are numbered."""
        images = [key for key in files if key != "label"]
        numbers = {key: f"_{number}" if len(images) > 1 else "" for number, key in enumerate(images)}
        names = {key: f"images/{draw.name}{numbers[key]}{files[key].suffix}" for key in images}
        if "label" in files:
            names["label"] = f"labels/{draw.name}{files['label'].suffix}"
        return names | {"field": f"fields/{draw.name}.nii.gz"}

    def listed(self, files: Mapping[str, str]) -> dict[str, Any]:
        """The entry of the datalist for a draw. Several images become a list, as MONAI's ``LoadImaged`` takes them."""
        kept = super().listed(files)
        images = [kept.pop(key) for key in list(kept) if key != "label"]
        return {"image": images[0] if len(images) == 1 else images, **kept}

    def make(self, files: Mapping[str, ImageFile], draw: Draw, device: str | None) -> DrawResult:
        """Draw a field and deform images and label."""
        assert draw.level is not None
        count = len(files) - ("label" in files)
        if self.image_number >= count:
            raise ValueError(f"image_number must be below the number of the case's images, {count}.")
        transform = self.transform(draw.level, list(files), device)
        deformed = transform(sample_of(files, draw))
        deformation = transform.last
        assert deformation is not None
        assert deformation.params is not None
        savers: dict[str, Callable[[Path], None]] = {"field": partial(files["image"].save_field, deformation.ddf)}
        savers |= {key: partial(file.save_like, torch.as_tensor(deformed[key])) for key, file in files.items()}
        return DrawResult(savers, asdict(deformation.params), asdict(deformation.statistics))
