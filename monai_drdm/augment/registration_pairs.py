"""Registration pairs with known fields, made of the images and labels of a data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from monai_drdm._version import __version__
from monai_drdm.augment.dataset_settings import DatasetSettings, Draw, DrawResult, sample_of
from monai_drdm.io import ImageFile
from monai_drdm.transforms import RandDRDMPaird
from monai_drdm.transforms.pairs import DDF, INVERSE_DDF, INVERSE_RESIDUAL, SIDES


@dataclass(frozen=True)
class PairSettings(DatasetSettings):
    """Everything that fixes registration pairs, given the images; see ``RandDRDMPaird`` for the settings of a draw.

    Raises:
        ValueError: no pairs, or a level out of range.
    """

    folders: ClassVar[tuple[str, ...]] = (
        *(f"{side}{part}" for part in ("", "_labels") for side in SIDES),
        "fields",
        "inverse_fields",
    )

    augmentation_level: tuple[float, float] | None = (0.3, 0.8)
    synthesis_level: tuple[float, float] = (0.3, 0.8)
    pairs: int = 1
    """Pairs of every image."""
    seed: int = 0
    version: str = __version__

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs must be 1 or more, got {self.pairs}.")
        self.transform(["image"])  # wrong arguments fail before the first file is read

    def transform(self, keys: Sequence[str], device: str | None = None) -> RandDRDMPaird:
        """The transform; what it makes depends on the value of ``seed`` in the sample only."""
        return RandDRDMPaird(
            **self.transform_options(keys, device),
            augmentation_level=self.augmentation_level,
            synthesis_level=self.synthesis_level,
        )

    @property
    def draws_per_case(self) -> int:
        """Number of pairs of every case."""
        return self.pairs

    def draws_of(self, case: str) -> list[Draw]:
        """The pairs of a case, in order."""
        return [Draw(f"{case}_pair{k}", f"{self.seed}/{case}/pair/{k}") for k in range(self.pairs)]

    def file_names(self, files: Mapping[str, ImageFile], draw: Draw) -> dict[str, str]:
        """Moving and fixed images and labels, the field between them and its inverse."""
        names = {side: f"{side}/{draw.name}{files['image'].suffix}" for side in SIDES}
        if "label" in files:
            names |= {f"{side}_label": f"{side}_labels/{draw.name}{files['label'].suffix}" for side in SIDES}
        data = files["image"].data
        # ITK does not read a 2D field from NIfTI
        suffix = ".mha" if data.ndim == 3 or data.shape[-1] == 1 else ".nii.gz"
        return names | {DDF: f"fields/{draw.name}{suffix}", INVERSE_DDF: f"inverse_fields/{draw.name}{suffix}"}

    def make(self, files: Mapping[str, ImageFile], draw: Draw, device: str | None) -> DrawResult:
        """Make a pair."""
        transform = self.transform(list(files), device)
        out = transform(sample_of(files, draw))
        assert transform.last is not None
        savers: dict[str, Callable[[Path], None]] = {
            name: partial(files["image"].save_field, out[name], convention="itk") for name in (DDF, INVERSE_DDF)
        }
        for side in SIDES:
            for key, file in files.items():
                name = side if key == "image" else f"{side}_{key}"
                savers[name] = partial(file.save_like, torch.as_tensor(out[name]))
        statistics = asdict(transform.last.synthesis.statistics)
        statistics["inverse_residual_vox"] = float(out[INVERSE_RESIDUAL])
        return DrawResult(savers, asdict(transform.last.params), statistics)
