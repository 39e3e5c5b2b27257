"""The settings of a run that trains a recovery network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai_drdm.networks.kinds import WORKING_SIZE
from monai_drdm.train.variation import Appearance, Pose
from monai_drdm.training.settings import read_config, RunConfig, setting

_KINDS = ("velocity_unet", "recresacnet")
_OPTIMIZER = {"velocity_unet": "muon", "recresacnet": "adamw"}
_LEARNING_RATE = {
    ("velocity_unet", "muon"): 5e-3,
    ("velocity_unet", "adamw"): 2e-3,
    ("recresacnet", "muon"): 1e-4,
    ("recresacnet", "adamw"): 1e-4,
}
_SMALLEST = 17


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Settings of a run that trains a recovery network.

    Raises:
        TypeError: a setting has a wrong type.
        ValueError: a setting is out of its range, or settings contradict each other.
    """

    data: str = setting("synthetic", "folder of scans, MONAI datalist, or 'synthetic' for random anatomy")
    section: str = setting("training", "section of the datalist")
    synthetic_share: float = setting(
        0.0, "share of random anatomy in every batch of real scans, in whole images", low=0, high=1
    )
    spatial_dims: int = setting(2, "2 or 3", choices=(2, 3))
    slice_axis: int | None = setting(
        None, "axis across which volumes are sliced for 2D; none: all three", low=0, high=2
    )
    mix_dimensions: bool = setting(False, "take 2D images and slices of volumes together")
    image_channel: int | None = setting(None, "channel of images that have several", low=0)
    network: str = setting(
        "", "velocity_unet, or recresacnet as published; empty: that of init, or velocity_unet", choices=("", *_KINDS)
    )
    channels: tuple[int, ...] = setting(
        (16, 32, 48, 64), "features on each grid, of a new velocity_unet", low=2, high=512
    )
    working_size: int = setting(
        0,
        "voxels along the longest side, odd for velocity_unet; 0: that of init, or the network's own",
        low=0,
        high=1025,
    )
    level_low: float = setting(0.02, "smallest deformation level", low=0, high=1)
    level_high: float = setting(1.0, "largest deformation level", low=0, high=1)
    roll_out: float = setting(
        0.5, "share of steps of velocity_unet on images that it has recovered in part", low=0, high=1
    )
    gradient_share: float = setting(
        0.5,
        "share of velocity_unet's loss on differences between neighbours, which keeps outlines smooth",
        low=0,
        high=1,
    )
    folding_weight: float = setting(0.0, "weight of the folding penalty", low=0)
    distance_weight: float = setting(1.0, "weight of recresacnet's distance term", low=0)
    angle_weight: float = setting(1.0, "weight of recresacnet's angle term", low=0)
    smoothness_weight: float = setting(10.0, "weight of recresacnet's smoothness term", low=0)
    flip: float = setting(Pose.flip, "chance of a flip along each axis", low=0, high=1)
    permute: float = setting(Pose.permute, "chance that the axes change places", low=0, high=1)
    rotation_deg: float = setting(Pose.rotation_deg, "largest rotation", low=0, high=180)
    scale: float = setting(Pose.scale, "log of the largest magnification", low=0, high=1)
    shift_frac: float = setting(Pose.shift_frac, "largest shift, as a fraction of the image", low=0, high=0.5)
    gamma: float = setting(Appearance.gamma, "log of the largest gamma", low=0, high=2)
    contrast: float = setting(Appearance.contrast, "largest change of contrast", low=0, high=1)
    bias: float = setting(Appearance.bias, "strength of the bias field", low=0, high=1)
    blur_vox: float = setting(Appearance.blur_vox, "largest blur", low=0, high=5)
    noise: float = setting(Appearance.noise, "largest noise, in units of the intensity range", low=0, high=1)
    validation_share: float = setting(0.1, "share of the scans kept for validation", low=0, high=0.5)
    init: str = setting("", "network to start from: a name or a .safetensors file")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._complete()
        if 0 < self.working_size < _SMALLEST:
            raise ValueError(f"working_size must be {_SMALLEST} or more, got {self.working_size}.")
        if self.network == "velocity_unet" and self.working_size % 2 == 0 and self.working_size > 0:
            raise ValueError(f"working_size must be odd for velocity_unet, got {self.working_size}.")
        if len(self.channels) < 2:
            raise ValueError(f"channels must be two or more numbers, got {self.channels}.")
        if not 0 < self.level_low < self.level_high:
            raise ValueError(
                f"level_low must be above 0 and below level_high, got {self.level_low}, {self.level_high}."
            )
        if self.slice_axis is not None and self.spatial_dims == 3:
            raise ValueError("slice_axis is for 2D networks; leave it out, or set spatial_dims=2.")

    def _complete(self) -> None:
        """Fill in the settings that depend on the network, as far as they are known without reading ``init``."""
        known: dict[str, Any] = {}
        kind = self.network or ("" if self.init else "velocity_unet")
        if kind:
            known["network"] = kind
            known["optimizer"] = self.optimizer or _OPTIMIZER[kind]
            if self.learning_rate is None:
                known["learning_rate"] = _LEARNING_RATE[kind, known["optimizer"]]
            if not self.working_size and not self.init:
                known["working_size"] = WORKING_SIZE[kind][self.spatial_dims]
        for name, value in known.items():
            object.__setattr__(self, name, value)

    @property
    def pose(self) -> Pose:
        """How much images are flipped, rotated, scaled and shifted."""
        return Pose(self.flip, self.permute, self.rotation_deg, self.scale, self.shift_frac)

    @property
    def appearance(self) -> Appearance:
        """How much the intensities of images are changed."""
        return Appearance(self.gamma, self.contrast, self.bias, self.blur_vox, self.noise)


def build_config(file: str | Path | None = None, settings: Sequence[str] = (), **overrides: Any) -> TrainConfig:
    """Settings from a YAML or JSON file, then ``key=value`` strings, then keywords; see ``read_config``."""
    return read_config(TrainConfig, file, settings, **overrides)
