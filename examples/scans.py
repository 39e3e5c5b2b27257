"""From files of scans to images of one size, and from labels of that size back to files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.transforms import Resize, ScaleIntensityRangePercentiles
from monai.utils import convert_to_tensor
from torch import nn, Tensor
from tqdm import tqdm

from monai_drdm.io import load_image, save_image
from monai_drdm.io.datalists import Case, find_cases, read_cases


def load_case(case: Case, size: Sequence[int]) -> list[dict[str, Any]]:
    """The slices of a scan, or the whole of it, at one size and in [0, 1], with their labels if there are any.

    Raises:
        ValueError: files that do not go together, or not with the size. The message names them.
    """
    found: list[dict[str, Any]] = []
    volume = load_image(case.image).data.as_tensor()
    _check_image(case, volume, size)
    images = _pieces(ScaleIntensityRangePercentiles(0.5, 99.5, 0, 1, clip=True)(volume.float()), len(size))
    labels = [None] * len(images)
    if case.label is not None:
        label = load_image(case.label).data.as_tensor()
        _check_label(case, label, volume)
        labels = _pieces(label.float(), len(size))
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        one = {"name": f"{case.name}/{number}", "image": _resized(image, size, _linear(size))}
        found.append(one if label is None else {**one, "label": _resized(label, size, "nearest-exact").byte()})
    return found


def load_cases(cases: Sequence[Case], size: Sequence[int]) -> list[dict[str, Any]]:
    """What ``load_case`` gives for each of several scans, in one list."""
    return [one for case in cases for one in load_case(case, size)]


def find_groups(
    datalist: str | os.PathLike[str], unlabelled: str | os.PathLike[str]
) -> tuple[list[Case], list[Case], list[Case]]:
    """Labelled scans of a MONAI datalist, unlabelled ones of a folder, and the datalist's validation scans, if any."""
    labelled = read_cases(datalist)
    sections = json.loads(Path(datalist).read_text(encoding="utf-8-sig"))
    return labelled, find_cases(unlabelled), read_cases(datalist, "validation") if "validation" in sections else []


def _check_image(case: Case, volume: Tensor, size: Sequence[int]) -> None:
    if not isinstance(size, Sequence) or len(size) not in (2, 3):
        raise ValueError(f"size must be two numbers for slices, such as [96, 96], or three for volumes, got {size!r}.")
    if len(volume) != 1:
        raise ValueError(f"{case.image} has {len(volume)} channels, expected one. Write one channel to a file.")
    axes = volume.ndim - 1
    if axes not in (len(size), 3):
        wanted = "slices" if len(size) == 2 else "volumes"
        raise ValueError(f"{case.image} has {axes} axes, but size={list(size)} asks for {wanted}. Choose another size.")


def _check_label(case: Case, label: Tensor, volume: Tensor) -> None:
    if label.shape != volume.shape:
        shapes = f"{tuple(label.shape[1:])}, but {case.image} has {tuple(volume.shape[1:])}"
        raise ValueError(f"{case.label} has the shape {shapes}. A label must lie on the grid of its image.")
    values = label.double().unique()
    if not bool(((values >= 0) & (values <= 255) & (values == values.round())).all()):
        shown = [float(one) for one in values[:5]]
        raise ValueError(f"{case.label} must hold whole numbers from 0 to 255, got values such as {shown}.")


def _resized(image: Tensor, size: Sequence[int], mode: str) -> Tensor:
    return convert_to_tensor(Resize(size, mode=mode)(image), track_meta=False)


def _pieces(volume: Tensor, dims: int) -> list[Tensor]:
    """The slices of a volume ``(C, *S)`` if the network is two-dimensional, else the volume."""
    return [volume] if volume.ndim == dims + 1 else list(volume.unbind(-1))


def _linear(size: Sequence[int]) -> str:
    return "bilinear" if len(size) == 2 else "trilinear"


@torch.no_grad()
def label_folder(network: nn.Module, size: Sequence[int], images: Path, out: Path) -> None:
    """Write what a network finds in all images of a folder, on their own grids and with their affines.

    Raises:
        FileExistsError: ``out`` holds files, which might be the images themselves.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose a new folder.")
    network.eval()
    out.mkdir(parents=True, exist_ok=True)
    for case in tqdm(find_cases(images), desc="predicting"):
        volume = load_image(case.image).data
        sliced = volume.ndim > len(size) + 1
        shape = volume.shape[1:-1] if sliced else volume.shape[1:]
        logits = [network(one["image"][None])[0] for one in load_case(case, size)]
        labels = [_resized(one, shape, _linear(size)).argmax(0).byte() for one in logits]
        save_image(torch.stack(labels, -1) if sliced else labels[0], volume.affine, out / f"{case.name}.nii.gz")
