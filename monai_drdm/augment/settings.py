"""What fixes the result of augmenting a data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from monai_drdm._version import __version__
from monai_drdm.fields.warp import Mode
from monai_drdm.networks import load_network, network_sha256
from monai_drdm.transforms import RandDRDMDeformd


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

    def to_json(self) -> str:
        """The settings as JSON, the network of a file by its name and hash: the same file may be called otherwise."""
        described: dict[str, Any] = asdict(self)
        if self.network.endswith(".safetensors"):
            network = load_network(self.network)
            described["network"] = {"name": network.card.name, "sha256": network_sha256(network)}
        return json.dumps(described, indent=2) + "\n"
