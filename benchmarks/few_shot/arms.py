"""The arms of the few-shot benchmark: what moves the labelled images, and the settings each may choose from.

Every arm adds to the same change of intensity. Fields are drawn ahead of training, ``Protocol.bank`` for every image,
and kept on the segmenter's grid; each training image takes one of its own at random, then a pose. So all arms cost the
same per iteration. The pose of all arms is what the ``affine`` arm chose.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from monai.transforms import (
    Compose,
    RandAdjustContrast,
    RandGaussianNoise,
    RandGaussianSharpen,
    RandGaussianSmooth,
    RandScaleIntensity,
    RandShiftIntensity,
)
from protocols import Case, Protocol
from torch import Tensor

from monai_drdm.fields import compose, identity_grid, sample
from monai_drdm.train.augmentation import Appearance, change_appearance, Pose, random_pose, uniform

INTENSITY = Appearance(gamma=0.25, contrast=0.2, bias=0.1, blur_vox=0.5, noise=0.03)


@dataclass(frozen=True)
class Setting:
    """How strongly an arm augments: its random pose, and its random field with strength and probability."""

    rotation_deg: float = 0.0
    scale: float = 0.0
    shift_frac: float = 0.0
    flip: float = 0.0
    low: float = 0.0
    high: float = 0.0
    """Range of the strength of fields: node displacement in voxels, noise magnitude or deformation level, by arm."""
    prob: float = 0.0
    amplitude: float = 1.0
    """Lever: displacements are multiplied by a random factor between this value and 1."""
    second: float = 0.0
    """Lever: probability that a field is composed with another field of the same image."""
    smooth: float = 0.0
    """Lever: standard deviation in voxels by which fields are smoothed."""
    guided: int = 1
    """Lever: this many fields are drawn for each that is kept; those that change the label most are kept."""
    ramp: int = 0
    """Lever: number of iterations over which the probability rises from 0."""
    recovery: float = 1.0
    """Lever: factor on every recovery step; a smaller factor leaves more of the random field."""
    steps: int = 0
    """Lever: number of recovery steps, or 0 for the default of the network."""

    def row(self) -> dict[str, float]:
        """The setting as written to rows; levers are left out where they have their default."""
        levers = ("amplitude", "second", "smooth", "guided", "ramp", "recovery", "steps")
        return {
            k: v for k, v in asdict(self).items() if k not in levers or v != Setting.__dataclass_fields__[k].default
        }

    @property
    def pose(self) -> Pose:
        """The random pose of this setting, without its field."""
        return Pose(flip=self.flip, rotation_deg=self.rotation_deg, scale=self.scale, shift_frac=self.shift_frac)


AFFINE = (
    *(
        Setting(rotation_deg=rotation, scale=scale, shift_frac=shift, flip=flip)
        for rotation, scale, shift in ((10.0, 0.1, 0.05), (20.0, 0.2, 0.08), (30.0, 0.3, 0.1))
        for flip in (0.0, 0.5)
    ),
    # Two stronger trials were added because the strongest of the first six was the best.
    Setting(rotation_deg=60.0, scale=0.3, shift_frac=0.1, flip=0.5),
    Setting(rotation_deg=180.0, scale=0.3, shift_frac=0.1, flip=0.5),
)
STRENGTHS: dict[str, dict[int, tuple[tuple[float, ...], ...]]] = {
    "elastic": {2: ((0.0, 1.5), (0.0, 3.0), (0.0, 6.0)), 3: ((0.0, 100.0), (0.0, 250.0), (0.0, 500.0))},
    "torchio": {2: ((0.0, 3.0), (0.0, 6.0), (0.0, 10.0)), 3: ((0.0, 2.0), (0.0, 4.0), (0.0, 7.5))},
    "random": {2: ((0.02, 0.1), (0.05, 0.2), (0.1, 0.4)), 3: ((0.05, 0.2), (0.1, 0.4), (0.2, 0.6))},
    "drdm": {2: ((0.2, 0.5), (0.3, 0.8), (0.6, 1.0)), 3: ((0.2, 0.5), (0.3, 0.8), (0.6, 1.0))},
}
"""Lowest and highest strength that each arm may choose, for 2D and 3D."""
SPARSE = STRENGTHS | {"drdm": {2: ((0.2, 0.5), (0.3, 0.8), (0.3, 0.8, 0.24)), 3: STRENGTHS["drdm"][3]}}
"""The same for the search with 1 subject; a third number is the factor on recovery, a lever that helped there."""
PROBABILITIES = (0.5, 0.9)
POSE = ("rotation_deg", "scale", "shift_frac", "flip")


@dataclass(frozen=True)
class Arm:
    """One augmentation of the labelled images: where its fields come from, and what else it changes."""

    fields: str = ""
    """What draws the fields: `elastic` (MONAI), `torchio`, `random` (ours, without a network) or `drdm`."""
    network: str = ""
    """Network of DRDM: empty for the one in the package, `tuned` for the one given on the command line."""
    setting_of: str = ""
    """The arm whose search result this arm uses; empty for a search of its own."""
    posed: bool = True
    recovers: bool = True
    """Whether its network supports a factor on recovery steps."""
    fixed: tuple[float, float, float] | None = None
    """Lowest and highest strength and probability, instead of those that a search chose."""
    stacked: bool = False
    """Whether a stack of MONAI transforms, each with probability 0.5, replaces ``INTENSITY``."""


ARMS = {
    "none": Arm(posed=False),
    "affine": Arm(),
    "elastic": Arm("elastic"),
    "random": Arm("random"),
    "drdm": Arm("drdm"),
    "drdm-tuned": Arm("drdm", network="tuned", setting_of="drdm"),
    "torchio": Arm("torchio"),
    "bigaug": Arm("elastic", setting_of="elastic", stacked=True),
    "drdm-published": Arm("drdm", network="zheng2026-cmr-2d", setting_of="drdm", recovers=False),
    "drdm-only": Arm("drdm", setting_of="drdm", posed=False),
    "elastic-only": Arm("elastic", setting_of="elastic", posed=False),
    "random-only": Arm("random", setting_of="random", posed=False),
    "random-equal": Arm("random", posed=False, fixed=(0.06, 0.32, 0.9)),
}
CORE = ("affine", "elastic", "random", "drdm", "drdm-tuned")
PAPER = {
    "drdm-only": ("none", "bigaug", "elastic-only", "random-only", "random-equal", "affine"),
    "drdm": ("affine", "elastic", "random"),
}
"""DRDM alone as in the paper's Table 2, and with poses; each with the arms that it is compared with. The paper has none
and BigAug, not the others. `random-equal` moves the middle of images about as far as DRDM alone does, and as often: by
rank the range of ``consistency.py``."""


def candidates(
    arm: str,
    dims: int,
    pose: Setting,
    strengths: dict[str, dict[int, tuple[tuple[float, ...], ...]]] = STRENGTHS,
    probabilities: tuple[float, ...] = PROBABILITIES,
) -> list[Setting]:
    """The settings that the search of an arm tries; all arms but ``affine`` use the pose that ``affine`` chose."""
    if arm == "affine":
        return list(AFFINE)
    if not ARMS[arm].fields or ARMS[arm].setting_of or ARMS[arm].fixed:
        return []
    kept = {key: getattr(pose, key) for key in POSE}
    return [
        Setting(**kept, low=low, high=high, prob=prob, recovery=rest[0] if rest else 1.0)
        for low, high, *rest in strengths[ARMS[arm].fields][dims]
        for prob in probabilities
    ]


def stack(seed: int) -> Compose:
    """Intensity transforms of Zhang et al., Generalizing deep learning for medical image segmentation (2020)."""
    transforms = Compose(
        [
            RandGaussianSharpen(prob=0.5),
            RandGaussianSmooth((0.25, 1.5), (0.25, 1.5), (0.25, 1.5), prob=0.5),
            RandGaussianNoise(prob=0.5, std=0.1),
            RandShiftIntensity(0.1, prob=0.5),
            RandAdjustContrast(prob=0.5, gamma=(0.5, 2.0)),
            RandScaleIntensity(0.1, prob=0.5),
        ]
    )
    return transforms.set_random_state(seed)


class Augmenter:
    """Random training batches of one arm."""

    def __init__(
        self,
        protocol: Protocol,
        setting: Setting,
        cases: list[Case],
        banks: list[Tensor | None],
        stack: Compose | None = None,
    ) -> None:
        self.protocol, self.setting, self.stack = protocol, setting, stack
        self.images = torch.cat([case.image for case in cases])
        self.labels = torch.cat([case.label for case in cases])
        there = [bank for bank in banks if bank is not None]
        self.bank = torch.cat(there) if there else None

    def batch(self, generator: torch.Generator, iteration: int) -> tuple[Tensor, Tensor]:
        """Draw a batch of images and labels, each ``(B, 1, *grid)``."""
        count, size = len(self.images), self.protocol.batch
        chosen = torch.randint(count, (size,), generator=generator)
        shape = self.protocol.grid
        matrix, shift = random_pose(generator, size, shape, self.setting.pose)
        form = (1, -1, *(1,) * len(shape))
        centre = torch.tensor([(n - 1) / 2 for n in shape]).view(form)
        turned = torch.einsum("bij,bj...->bi...", matrix, identity_grid(shape).expand(size, -1, *shape) - centre)
        position = turned + centre + shift.view(size, -1, *form[2:])
        if self.bank is not None:
            ddf = self._ddf(chosen, generator, iteration)
            position = position + sample(ddf, position)
        image = sample(self.images[chosen], position)
        label = sample(self.labels[chosen], position, "nearest")
        if self.stack is not None:
            return torch.stack([self.stack(one).as_tensor().clamp(0, 1) for one in image]), label
        return change_appearance(image, generator, INTENSITY), label

    def _ddf(self, chosen: Tensor, generator: torch.Generator, iteration: int) -> Tensor:
        assert self.bank is not None
        setting, size = self.setting, len(chosen)

        def drawn() -> Tensor:
            return self.bank[chosen, torch.randint(self.bank.shape[1], (size,), generator=generator)].float()

        def chance(prob: float) -> Tensor:
            return (torch.rand(size, generator=generator) < prob).view(-1, 1, *(1,) * len(self.protocol.grid))

        fires = chance(setting.prob * min(1.0, iteration / setting.ramp) if setting.ramp else setting.prob)
        ddf = drawn() * fires
        if setting.second:
            ddf = compose(ddf, drawn() * (fires & chance(setting.second)))
        if setting.amplitude < 1:
            ddf = ddf * uniform(generator, (size, *(1,) * (ddf.ndim - 1)), setting.amplitude, 1.0)
        return ddf
