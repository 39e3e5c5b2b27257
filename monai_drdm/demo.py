"""The demonstration: one scan and its label through a MONAI pipeline, deformed by one field, saved and drawn."""

from __future__ import annotations

import os
import tempfile
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
from monai_drdm.networks import auto_network, load_network, RecoveryNetwork
from monai_drdm.samples import spacing_of
from monai_drdm.transforms import Deformation, RandDRDMDeformd

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

    transform = RandDRDMDeformd(
        keys=["image", "label"],
        mode=["bilinear", "nearest"],
        prob=1.0,
        deformation_level=level,
        network=loaded,
        slice_axis=axis,
    )
    transform.set_random_state(seed)
    scans = {"image": scan, "label": segmentation}
    deformed = _tensors(transform(scans))
    deformation = transform.last
    assert deformation is not None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:  # all files, or none
        made = _write(Path(partial), deformed, deformation, scan.affine.cpu().numpy())
        made.append(Path(partial) / "figure.png")
        _draw(_tensors(scans), deformed, deformation, loaded, made[-1])
        folder.mkdir(exist_ok=True)
        return [path.replace(folder / path.name) for path in made]


def _write(folder: Path, sample: Mapping[str, Tensor], deformation: Deformation, affine: ArrayLike) -> list[Path]:
    assert deformation.params is not None
    image, label, ddf, record = (
        folder / name for name in ("image.nii.gz", "label.nii.gz", "field.nii.gz", "record.json")
    )
    save_image(sample["image"][0], affine, image)
    save_image(sample["label"][0], affine, label)
    save_ddf(deformation.ddf, affine, ddf)
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


def _draw(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    deformation: Deformation,
    network: RecoveryNetwork,
    path: Path,
) -> None:
    from monai_drdm.viz import deformation_figure  # matplotlib is an extra

    record, numbers = deformation.params, deformation.statistics
    assert record is not None
    planar = record.slice_axis is not None
    across = record.slice_axis if planar else 2 if deformation.ddf.shape[0] == 3 else None
    in_plane = [d for d in range(deformation.ddf.shape[0]) if d != across]
    spacing = [deformation.spacing[d] for d in in_plane]

    def plane(volume: Tensor) -> Tensor:
        """The middle slice across the axis that the figure leaves out."""
        return volume if across is None else volume.select(across + 1, volume.shape[across + 1] // 2)

    image = before["image"].float()
    seen = plane(image) if planar else image
    model = DRDM(network, record.sampler, record.steps)
    start = model.diffuse(
        seen.shape[1:], record.deformation_level, [record.seed], spacing if planar else deformation.spacing
    )
    diffused = warp(seen[None], start)[0]
    title = (
        f"{record.network}, sampler {record.sampler}, level {record.deformation_level:.2f}: mean displacement "
        f"{numbers.mean_displacement_mm:.1f} mm, largest {numbers.max_displacement_mm:.1f} mm"
    )
    figure = deformation_figure(
        plane(image)[0],
        (diffused if planar else plane(diffused))[0],
        plane(after["image"])[0],
        plane(deformation.ddf)[in_plane],
        plane(before["label"])[0],
        plane(after["label"])[0],
        spacing,
        title,
    )
    figure.savefig(path, dpi=110)


def _tensors(sample: Mapping[Any, object]) -> dict[Any, Tensor]:
    """Plain tensors of a dictionary of them."""
    return {key: value.as_tensor() for key, value in sample.items() if isinstance(value, MetaTensor)}


def _meta(tensor: Tensor) -> MetaTensor:
    assert isinstance(tensor, MetaTensor)
    return tensor
