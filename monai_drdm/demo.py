"""The demonstration: one scan and its label through a MONAI pipeline, deformed by one field, saved and drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged
from numpy.typing import ArrayLike
from torch import Tensor

from monai_drdm.diffusion import DRDM
from monai_drdm.fields import warp
from monai_drdm.io import save_ddf, save_image
from monai_drdm.networks import auto_network, load_network, RecResACNet
from monai_drdm.transforms import Deformation, RandDRDMDeformd
from monai_drdm.transforms.inputs import spacing_of

_FOREGROUND = 0.25


def run_demo(
    image: str | os.PathLike[str] | None,
    label: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    network: str = "auto",
    level: float = 0.6,
    seed: int = 0,
) -> list[Path]:
    """Deform a scan and its label and write both, the field, the record and a figure.

    A 3D scan is deformed by a 2D network through one in-plane field, drawn on the middle slice across its coarsest
    axis and applied to the whole stack.

    Args:
        image: NIfTI image; None is the MR volume in nibabel's test data.
        label: NIfTI label map; None is what is brighter than a quarter of the scan's 99th percentile.
        out: a folder that is new or empty.
        network: registry name or safetensors file; ``auto`` is the default 2D network.
        level: deformation level in (0, 1].
        seed: fixes the field.

    Returns:
        The files written.

    Raises:
        ValueError: anything that does not fit.
        FileNotFoundError: a file or the weights are not there.
        FileExistsError: the folder holds something already.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder. Choose another with --out.")
    source = Path(image) if image is not None else Path(str(files("nibabel"))) / "tests" / "data" / "example4d.nii.gz"
    scan = _load(source, np.float32)
    segmentation = _foreground(scan) if label is None else _load(Path(label), None)
    loaded = load_network(auto_network(2) if network == "auto" else network)
    planar = scan.ndim == 4 and loaded.card.spatial_dims == 2
    axis = int(np.argmax(spacing_of(scan, None, "image"))) if planar else None

    seen = {"image": scan, "label": segmentation}
    plane = seen if axis is None else {key: _middle_slice(volume, axis) for key, volume in seen.items()}
    transform = RandDRDMDeformd(
        keys=["image", "label"], mode=["bilinear", "nearest"], prob=1.0, deformation_level=level, network=loaded
    )
    transform.set_random_state(seed)
    deformed = _tensors(transform(plane))
    deformation = transform.last
    assert deformation is not None
    field = deformation.ddf if axis is None else _lift(deformation.ddf, axis, tuple(scan.shape[1:]))
    whole = deformed if axis is None else _tensors(transform(seen, field=field))
    paths = _write(folder, whole, field, deformation, scan.affine.cpu().numpy())
    _draw(_tensors(plane), deformed, deformation, loaded, folder / "figure.png")
    return [*paths, folder / "figure.png"]


def _write(
    folder: Path, sample: Mapping[str, Tensor], field: Tensor, deformation: Deformation, affine: ArrayLike
) -> list[Path]:
    assert deformation.params is not None
    folder.mkdir(parents=True, exist_ok=True)
    image, label, ddf, record = (
        folder / name for name in ("image.nii.gz", "label.nii.gz", "field.nii.gz", "record.json")
    )
    save_image(sample["image"][0], affine, image)
    save_image(sample["label"][0], affine, label)
    save_ddf(field, affine, ddf)
    record.write_text(deformation.params.to_json() + "\n", encoding="utf-8")
    return [image, label, ddf, record]


def _load(path: Path, dtype: type | None) -> MetaTensor:
    """The first channel or volume of a series, ``(1, *S)``; one slice becomes 2D. None keeps the file's dtype."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}. Pass a NIfTI file with --image or --label.")
    try:
        loaded = Compose([LoadImaged("image", dtype=dtype), EnsureChannelFirstd("image")])({"image": os.fspath(path)})
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read as an image: {error.__cause__ or error}") from None
    scan = loaded["image"][:1]
    return _meta(scan[..., 0] if scan.ndim == 4 and scan.shape[-1] == 1 else scan)


def _foreground(scan: MetaTensor) -> MetaTensor:
    bright = float(np.percentile(scan.numpy(), 99))
    return _meta((scan > _FOREGROUND * bright).to(torch.uint8))


def _middle_slice(volume: MetaTensor, axis: int) -> MetaTensor:
    """The middle slice ``(C, *S)`` across a spatial axis, with an affine that keeps its in-plane spacing."""
    spacing = [s for d, s in enumerate(spacing_of(volume, None, "image")) if d != axis]
    plane = volume.as_tensor().select(axis + 1, volume.shape[axis + 1] // 2)
    return MetaTensor(plane, affine=torch.diag(torch.tensor([*spacing, 1.0, 1.0], dtype=torch.float64)))


def _lift(ddf: Tensor, axis: int, shape: tuple[int, ...]) -> Tensor:
    """An in-plane field ``(2, *S)`` as a field ``(3, *shape)`` that moves every slice alike and none across."""
    planes = list(ddf)
    planes.insert(axis, torch.zeros_like(planes[0]))
    return torch.stack(planes).unsqueeze(axis + 1).expand(3, *shape).contiguous()


def _draw(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    deformation: Deformation,
    network: RecResACNet,
    path: Path,
) -> None:
    from monai_drdm.viz import deformation_figure  # matplotlib is an extra

    record, numbers = deformation.params, deformation.statistics
    assert record is not None
    model = DRDM(network, record.sampler, record.steps)
    image = before["image"].float()
    start = model.diffuse(image.shape[1:], record.deformation_level, [record.seed], deformation.spacing)
    diffused = warp(image[None], start)[0]
    panels = [image, diffused, after["image"], deformation.ddf, before["label"], after["label"]]
    if image.ndim == 4:  # the middle slice across the last axis; of the field, its in-plane part
        panels = [panel[..., panel.shape[-1] // 2] for panel in panels]
    original, random, recovered, field, label, recovered_label = panels
    title = (
        f"{record.network}, sampler {record.sampler}, level {record.deformation_level:.2f}: mean displacement "
        f"{numbers.mean_displacement_mm:.1f} mm, largest {numbers.max_displacement_mm:.1f} mm"
    )
    figure = deformation_figure(
        original[0], random[0], recovered[0], field[:2], label[0], recovered_label[0], deformation.spacing[:2], title
    )
    figure.savefig(path, dpi=110)


def _tensors(sample: Mapping[Any, object]) -> dict[Any, Tensor]:
    """Plain tensors of a dictionary of them."""
    return {key: value.as_tensor() for key, value in sample.items() if isinstance(value, MetaTensor)}


def _meta(tensor: Tensor) -> MetaTensor:
    assert isinstance(tensor, MetaTensor)
    return tensor
