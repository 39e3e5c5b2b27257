"""What the settings of every run over a data set have in common."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from monai_drdm.fields.sampling import Mode
from monai_drdm.io import ImageFile
from monai_drdm.networks import load_network, network_sha256

LATER = "later"
"""Marks settings that were added later, so that folders of earlier versions do not have them."""


class Draw(NamedTuple):
    """One random deformation, or pair, of a case."""

    name: str
    """The names of its files begin with it."""
    seed: str
    level: float | None = None
    """Deformation level; None for pairs, which draw their own."""


class DrawResult(NamedTuple):
    """The result of one draw."""

    savers: dict[str, Callable[[Path], None]]
    """For each file the function that writes it to a path."""
    params: dict[str, Any]
    """The record that replays the draw."""
    statistics: dict[str, Any]
    """Statistics of the field."""


@dataclass(frozen=True)
class DatasetSettings(ABC):
    """Everything that fixes the files of a run, given the images.

    A run can be continued if its folder was begun with equal settings. A setting that was added in a later version has
    in its metadata, at ``LATER``, the value that means what earlier versions did. At that value it is left out of the
    JSON, so that folders of earlier versions can still be continued.
    """

    folders: ClassVar[tuple[str, ...]]
    """Names of the folders that the run fills."""
    not_in_datalist: ClassVar[tuple[str, ...]] = ()
    """Kinds of files that are not listed in the datalist."""
    several_images: ClassVar[bool] = False
    """Whether a case may have several images, which are all moved by one field."""

    network: str = "auto"
    sampler: str = "auto"
    steps: int | None = None
    recovery: float = 1.0
    symmetry: float = field(default=1.0, metadata={LATER: 0.0})
    slice_axis: int | None = None
    max_displacement_mm: float | None = None
    label_mode: Mode = "nearest"

    @property
    @abstractmethod
    def draws_per_case(self) -> int:
        """Number of draws from every case."""

    @abstractmethod
    def draws_of(self, case: str) -> list[Draw]:
        """The draws from a case, in order."""

    @abstractmethod
    def file_names(self, files: Mapping[str, ImageFile], draw: Draw) -> dict[str, str]:
        """The files of a draw by kind, as paths within the folder of the run.

        Args:
            files: image and, if there is one, label of the case.
            draw: one of ``draws_of`` the case.
        """

    @abstractmethod
    def make(self, files: Mapping[str, ImageFile], draw: Draw, device: str | None) -> DrawResult:
        """Make one draw; nothing is written yet."""

    def listed(self, files: Mapping[str, str]) -> dict[str, Any]:
        """The entry of the datalist for a draw.

        Args:
            files: its files by kind.
        """
        return {key: name for key, name in files.items() if key not in self.not_in_datalist}

    def to_json(self) -> str:
        """The settings as JSON. A network from a file is named by its card and hash, not by the path of the file."""
        described: dict[str, Any] = asdict(self)
        for one in fields(self):
            if LATER in one.metadata and described[one.name] == one.metadata[LATER]:
                del described[one.name]
        if self.network.endswith(".safetensors"):
            network = load_network(self.network)
            described["network"] = {"name": network.card.name, "sha256": network_sha256(network)}
        return json.dumps(described, indent=2) + "\n"

    def transform_options(self, keys: Sequence[str], device: str | None) -> dict[str, Any]:
        """Arguments that ``RandDRDMDeformd`` and ``RandDRDMPaird`` share.

        Args:
            keys: ``image`` and further images, and ``label`` if there is one.
            device: where the network runs.
        """
        return {
            "keys": keys,
            "network": self.network,
            "sampler": self.sampler,
            "steps": self.steps,
            "recovery": self.recovery,
            "symmetry": self.symmetry,
            "mode": [self.label_mode if key == "label" else "bilinear" for key in keys],
            "slice_axis": self.slice_axis,
            "max_displacement_mm": self.max_displacement_mm,
            "seed_key": "seed",
            "device": device,
            "invertible": False,
        }


def sample_of(files: Mapping[str, ImageFile], draw: Draw) -> dict[str, Any]:
    """The dictionary that the transforms are called with."""
    return {**{key: file.data for key, file in files.items()}, "seed": draw.seed}
