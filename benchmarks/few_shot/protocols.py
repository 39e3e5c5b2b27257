"""The tasks of the few-shot benchmark: subjects, grid, segmenter, and how predictions are judged.

| protocol | images | subjects to learn from | validation | test |
|---|---|---|---|---|
| `acdc` | cardiac MR slices at 96², both phases of a patient | patients 1-60 | 61-70 | 71-80 |
| `hippocampus` | hippocampus T1 crops, 48×64×48 voxels of 1 mm | cases 1-140 | 141-160 | 161-200 |
| `ixi` | brains in T1, 40×48×40 voxels of 4 mm, 12 structures | subjects 1-26 | 27-30 | 31-40 |

A case is a volume: Dice and HD95 are taken over all its slices at once.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from common.labels import margins, resize_nearest
from common.scans import data_folder, DOMAINS, scans
from monai.metrics import compute_hausdorff_distance
from monai.networks.nets import UNet
from monai.networks.utils import one_hot
from torch import Tensor

from monai_drdm.fields import resize_image


@dataclass(frozen=True)
class Protocol:
    """One task and the training of its segmenter, which is the same for all arms."""

    name: str
    domain: str
    grid: tuple[int, ...]
    resample: bool
    """Whether images are resampled to the grid; otherwise they are centred on it."""
    structures: tuple[str, ...]
    channels: tuple[int, ...]
    batch: int
    cap: int
    """Largest number of iterations."""
    least: int
    """Smallest number of iterations."""
    patience: int
    """Training ends when the validation Dice has not risen by ``RISE`` for this many iterations."""
    every: int
    """Number of iterations between validations."""
    bank: int
    """Number of fields drawn for every image before training."""
    learning_rate: float = 2e-3


PRECISION = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
"""Precision of the segmenter's convolutions: bfloat16 where the processor supports it natively."""
RISE = 0.002
"""Smallest increase of the validation Dice that counts as progress."""
WARM_UP, EMA = 100, 0.99
"""Iterations over which the learning rate rises, and the decay of the averaged weights."""

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "acdc",
            "acdc",
            (96, 96),
            True,
            ("RV", "MYO", "LV"),
            (16, 32, 64, 96),
            batch=8,
            cap=4000,
            least=1500,
            patience=1000,
            every=100,
            bank=16,
        ),
        Protocol(
            "hippocampus",
            "hippocampus3d",
            (48, 64, 48),
            False,
            ("anterior", "posterior"),
            (16, 32, 64),
            batch=2,
            cap=2000,
            least=800,
            patience=600,
            every=100,
            bank=16,
        ),
        Protocol(
            "ixi",
            "ixi3d",
            (40, 48, 40),
            True,
            (
                *("hippocampus", "amygdala", "caudate", "putamen", "pallidum", "thalamus", "lateral ventricles"),
                *("brainstem", "cerebellum", "white matter", "cortex", "3rd and 4th ventricle, CSF"),
            ),
            (16, 32, 64),
            batch=2,
            cap=2000,
            least=800,
            patience=600,
            every=100,
            bank=16,
        ),
    )
}


def recipe(protocol: Protocol) -> str:
    """Hash of everything that determines training; results of different recipes are not compared."""
    return hashlib.sha256(repr((protocol, RISE, WARM_UP, EMA)).encode()).hexdigest()[:8]


class Case(NamedTuple):
    """A labelled volume: one image in 3D, or all its slices in 2D."""

    name: str
    source: Tensor  # (N, 1, *S) as stored; fields are drawn on it
    image: Tensor  # (N, 1, *grid) in [0, 1]
    label: Tensor  # (N, 1, *grid) uint8


@cache
def subjects(protocol: Protocol, split: str) -> dict[int, list[Case]]:
    """The cases of every subject of a split; a cardiac patient has one for each of the two phases."""
    if protocol.domain == "acdc":
        archive = dict(np.load(data_folder() / "acdc" / "acdc2d_160.npz"))  # unpacked once
        found: dict[int, list[Case]] = {}
        for patient in DOMAINS["acdc"].splits[split]:
            for phase in (0, 1):
                chosen = np.flatnonzero((archive["patient"] == patient) & (archive["phase"] == phase))
                image, label = (torch.from_numpy(archive[key][chosen])[:, None] for key in ("image", "label"))
                case = _case(protocol, f"patient{patient:03d}-{('ED', 'ES')[phase]}", image.float(), label)
                found.setdefault(patient, []).append(case)
        return found
    return {scan.number: [_case(protocol, scan.name, scan.image, scan.label)] for scan in scans(protocol.domain, split)}


def labelled(protocol: Protocol, count: int, seed: int) -> list[int]:
    """The subjects that a run learns from; with the same seed, a smaller set is contained in a larger one."""
    pool = list(subjects(protocol, "pool"))
    random.Random(seed).shuffle(pool)  # noqa: S311
    return pool[:count]


def _case(protocol: Protocol, name: str, image: Tensor, label: Tensor) -> Case:
    flat = image.flatten(1)
    low, high = (flat.quantile(q, dim=1).view(-1, *(1,) * (image.ndim - 1)) for q in (0.005, 0.995))
    unit = ((image - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return Case(name, image, to_grid(unit, protocol), to_grid(label, protocol))


def to_grid(image: Tensor, protocol: Protocol) -> Tensor:
    """Bring images (floating point) or labels (integers) to the segmenter's grid."""
    if not protocol.resample:
        return F.pad(image, margins(image, protocol.grid))
    return (resize_image if image.is_floating_point() else resize_nearest)(image, protocol.grid)


def build_segmenter(protocol: Protocol) -> UNet:
    """The U-Net that all arms train."""
    strides = (2,) * (len(protocol.channels) - 1)
    return UNet(len(protocol.grid), 1, len(protocol.structures) + 1, protocol.channels, strides, num_res_units=1)


def autocast() -> torch.autocast:
    """Context that sets the precision of the segmenter."""
    return torch.autocast("cpu", torch.bfloat16, enabled=PRECISION == "bfloat16")


@torch.no_grad()
def predict(segmenter: torch.nn.Module, case: Case) -> Tensor:
    """Predicted labels of a case, ``(N, 1, *grid)`` uint8."""
    segmenter.eval()
    with autocast():
        return segmenter(case.image).float().argmax(1, keepdim=True).byte()


def hd95_of(protocol: Protocol, predicted: Tensor, label: Tensor) -> list[float | None]:
    """95th percentile of surface distances in voxels; None if label or prediction do not contain the structure."""
    classes = len(protocol.structures) + 1
    volumes = [
        one_hot(v if len(protocol.grid) == 3 else v.permute(1, 2, 3, 0)[None], classes) for v in (predicted, label)
    ]
    found = compute_hausdorff_distance(*volumes, percentile=95)[0].tolist()
    there = [bool((predicted == v).any() and (label == v).any()) for v in range(1, classes)]
    return [float(distance) if known else None for distance, known in zip(found, there)]
