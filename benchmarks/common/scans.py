"""The labelled scans of the benchmarks, their fixed splits, and the choice of images from a split.

| domain | images | pool | validation | test |
|---|---|---|---|---|
| `acdc` | cardiac MR slices, 160²; fields are made at 256² | patients 1-60 | 61-70 | 71-80 |
| `ixi` | slices of brain T1, five about the middle of each of the three axes | subjects 1-26 | 27-30 | 31-40 |
| `cxr` | chest X-rays, 256² | images 1-40 | 41-45 | 46-60 |
| `limbct` | slices of CT of limbs, five through the tumour, of `tools/limb_data.py` | files 1-20 | 21-28 | 29-36 |
| `limbmr` | the same of T1 MR | files 1-28 | 29-38 | 39-49 |
| `ixi3d` | brain T1 volumes, 80×96×80 | subjects 1-26 | 27-30 | 31-40 |
| `nuclei` | nuclei under the microscope, 256², of `tools/nuclei_data.py` | images 1-500 | 501-564 | 565-664 |
| `hippocampus3d` | hippocampus T1 crops, about 35×50×36 | 1-140 | 141-160 | 161-200 |

Files are sorted by name. Nothing but the pool is ever trained on, choices are made on validation.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from monai_drdm.fields import resize_image

_DRAW = 1_000_000
_PARTNER = 500_000
_IXI_OFFSETS = (-8, -4, 0, 4, 8)
_TUMOUR = 2
_LIMB_DEPTHS = (0.2, 0.35, 0.5, 0.65, 0.8)
# In a slice, single nuclei have too few voxels, so classes are merged to: deep grey matter, ventricles and CSF,
# hindbrain, white matter, cortical grey matter.
_IXI_MERGED = torch.tensor([0, 1, 1, 1, 1, 1, 1, 2, 3, 3, 4, 5, 2], dtype=torch.uint8)


@dataclass(frozen=True)
class Domain:
    """One image set."""

    name: str
    spatial_dims: int
    classes: int
    """Number of foreground classes in the labels."""
    splits: dict[str, range]
    """Numbers of the patients, subjects or files in each split, counted from 1."""
    field_size: int | None = None
    """Side of the grid on which fields are drawn and measured, or None for the grid of the images."""


def _splits(pool: int, validation: int, test: int) -> dict[str, range]:
    edges = (1, pool + 1, validation + 1, test + 1)
    return {name: range(a, b) for name, a, b in zip(("pool", "validation", "test"), edges, edges[1:])}


DOMAINS = {
    domain.name: domain
    for domain in (
        Domain("acdc", 2, 3, _splits(60, 70, 80), field_size=256),
        Domain("ixi", 2, 5, _splits(26, 30, 40)),
        Domain("cxr", 2, 1, _splits(40, 45, 60)),
        Domain("nuclei", 2, 1, _splits(500, 564, 664)),
        Domain("limbct", 2, 2, _splits(20, 28, 36)),
        Domain("limbmr", 2, 2, _splits(28, 38, 49)),
        Domain("ixi3d", 3, 12, _splits(26, 30, 40)),
        Domain("hippocampus3d", 3, 2, _splits(140, 160, 200)),
    )
}


class Scan(NamedTuple):
    """A labelled image."""

    name: str
    number: int
    """Unique within the domain; seeds are derived from it."""
    image: Tensor  # (1, 1, *S) float32
    label: Tensor  # (1, 1, *S) uint8


class Draw(NamedTuple):
    """An image with the seeds of two independent fields."""

    scan: Scan
    seed: int
    partner: int


def data_folder() -> Path:
    """The folder of scans that ``MONAI_DRDM_DATA`` names."""
    folder = os.environ.get("MONAI_DRDM_DATA")
    if not folder or not Path(folder).is_dir():
        raise SystemExit("Set MONAI_DRDM_DATA to the folder that holds acdc/acdc2d_160.npz.")
    return Path(folder)


@cache
def scans(domain: str, split: str) -> list[Scan]:
    """All images of a split, in order."""
    members = DOMAINS[domain].splits[split]
    if domain == "acdc":
        return _acdc(members)
    if domain == "ixi":
        return _ixi_slices(members)
    if domain in ("limbct", "limbmr"):
        return _limb_slices(f"limbs/{domain.removeprefix('limb')}", members)
    return _files({"cxr": "cxr", "ixi3d": "ixi", "hippocampus3d": "hippocampus", "nuclei": "nuclei"}[domain], members)


def draws(domain: str, split: str, count: int) -> list[Draw]:
    """Choose ``count`` images spread evenly over a split; a smaller split is repeated with other seeds.

    The seed of the first draw of an ACDC slice is its number, as in ``samplers.py``.
    """
    every = scans(domain, split)
    if len(every) >= count:
        chosen = [(every[i], 0) for i in np.linspace(0, len(every) - 1, count).round().astype(int)]
    else:
        chosen = [(every[i % len(every)], i // len(every)) for i in range(count)]
    return [Draw(scan, scan.number + _DRAW * k, scan.number + _DRAW * k + _PARTNER) for scan, k in chosen]


def acdc_slices(patients: range, count: int, size: int = 256) -> list[tuple[int, Tensor]]:
    """``count`` slices spread evenly over the given patients, as ``(index, (1, 1, size, size) image)``."""
    archive = np.load(data_folder() / "acdc" / "acdc2d_160.npz")
    indices = np.flatnonzero(np.isin(archive["patient"], list(patients)))
    chosen = indices[np.linspace(0, len(indices) - 1, count).round().astype(int)]
    images = torch.from_numpy(archive["image"][chosen]).float()[:, None]
    return [(int(i), resize_image(image[None], (size, size))) for i, image in zip(chosen, images)]


def _acdc(patients: range) -> list[Scan]:
    archive = np.load(data_folder() / "acdc" / "acdc2d_160.npz")
    indices = np.flatnonzero(np.isin(archive["patient"], list(patients)))
    images, labels = archive["image"][indices], archive["label"][indices]
    return [
        Scan(str(i), int(i), torch.from_numpy(image)[None, None].float(), torch.from_numpy(label)[None, None])
        for i, image, label in zip(indices, images, labels)
    ]


def _files(folder: str, members: range) -> list[Scan]:
    paths = sorted((data_folder() / folder / "images").iterdir())
    found = []
    for number in members:
        image = paths[number - 1]
        label = image.parent.parent / "labels" / image.name
        found.append(Scan(image.name.split(".")[0], number, _read(image).float(), _read(label).round().byte()))
    return found


def _read(path: Path) -> Tensor:
    """Read an image or label file as ``(1, 1, *S)``."""
    if path.suffix == ".png":
        return torch.from_numpy(np.array(Image.open(path)))[None, None]
    return torch.from_numpy(np.asarray(nib.load(path).dataobj, dtype=np.float32))[None, None]


def _ixi_slices(members: range) -> list[Scan]:
    """Five slices around the middle of the brain, along each axis of each subject."""
    found = []
    for volume in _files("ixi", members):
        image, label = volume.image[0, 0], _IXI_MERGED[volume.label[0, 0].long()]
        for axis in range(3):
            inside = label.bool().movedim(axis, 0).flatten(1).any(1).nonzero()
            for k, offset in enumerate(_IXI_OFFSETS):
                at = int(inside.float().mean()) + offset
                found.append(
                    Scan(
                        f"{volume.name} axis {axis} slice {at}",
                        100 * volume.number + 10 * axis + k,
                        image.select(axis, at)[None, None],
                        label.select(axis, at)[None, None],
                    )
                )
    return found


def _limb_slices(folder: str, members: range) -> list[Scan]:
    """Five slices through the tumour of each patient, across the axis of thick slices."""
    found = []
    for volume in _files(folder, members):
        inside = (volume.label[0, 0] == _TUMOUR).flatten(0, 1).any(0).nonzero()
        first, last = int(inside.min()), int(inside.max())
        for k, depth in enumerate(_LIMB_DEPTHS):
            at = first + round(depth * (last - first))
            image, label = (part[..., at] for part in (volume.image, volume.label))
            found.append(Scan(f"{volume.name} slice {at}", 10 * volume.number + k, image, label))
    return found
