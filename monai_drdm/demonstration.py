"""What ``monai-drdm demo`` runs: deform one scan and its label by one field, and save and plot the result."""

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
from monai_drdm.io.images import check_plain
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

    If the network is 2D and the scan 3D, one in-plane field deforms the whole stack of slices. It is drawn for the
    middle slice across the axis with the largest spacing.

    Args:
        image: NIfTI image; None is the MR volume in nibabel's test data.
        label: NIfTI label map; None marks voxels brighter than a quarter of the scan's 99th percentile.
        out: a folder that is new or empty.
        network: registry name or safetensors file; ``auto`` is the default 2D network.
        level: deformation level in (0, 1].
        seed: fixes the field.

    Returns:
        The files written.

    Raises:
        ValueError: a file that cannot be read, or one that does not suit the network.
        FileNotFoundError: a file or the weights do not exist.
        FileExistsError: the folder is not empty.
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
    # files are moved into place at the end, so that an error leaves none of them behind
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:
        written = _write(Path(partial), deformed, deformation, scan.affine.cpu().numpy())
        written.append(Path(partial) / "figure.png")
        _plot(_tensors(scans), deformed, deformation, loaded, written[-1])
        folder.mkdir(exist_ok=True)
        return [path.replace(folder / path.name) for path in written]


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
    """Read the first channel, or the first volume of a series, ``(1, *S)``; a volume of one slice becomes 2D.

    Args:
        path: the file.
        dtype: of the result; None keeps the dtype of the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}. Pass a NIfTI file with --image or --label.")
    try:
        check_plain(path)
        loaded = Compose([LoadImaged("image", dtype=dtype), EnsureChannelFirstd("image")])({"image": os.fspath(path)})
    except Exception as error:  # readers raise exceptions of any type for damaged files
        raise ValueError(f"{path} cannot be read as an image: {error.__cause__ or error}") from None
    scan = loaded["image"][:1]
    return _as_meta_tensor(scan[..., 0] if scan.ndim == 4 and scan.shape[-1] == 1 else scan)


def _foreground(scan: MetaTensor) -> MetaTensor:
    """A label map of what is bright in a scan."""
    bright = float(np.percentile(scan.numpy(), 99))
    return _as_meta_tensor((scan > _FOREGROUND * bright).to(torch.uint8))


def _plot(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    deformation: Deformation,
    network: RecoveryNetwork,
    path: Path,
) -> None:
    """Save the figure of a deformation; of a volume it shows one slice."""
    from monai_drdm.viz import deformation_figure  # needs matplotlib, which is an extra

    record, numbers = deformation.params, deformation.statistics
    assert record is not None
    planar = record.slice_axis is not None
    hidden_axis = record.slice_axis if planar else 2 if deformation.ddf.shape[0] == 3 else None
    in_plane = [d for d in range(deformation.ddf.shape[0]) if d != hidden_axis]
    spacing = [deformation.spacing[d] for d in in_plane]

    def plane(volume: Tensor) -> Tensor:
        """The middle slice across the axis that the figure leaves out."""
        return volume if hidden_axis is None else volume.select(hidden_axis + 1, volume.shape[hidden_axis + 1] // 2)

    image = before["image"].float()
    network_input = plane(image) if planar else image
    model = DRDM(network, record.sampler, record.steps)
    random_field = model.diffuse(
        network_input.shape[1:], record.deformation_level, [record.seed], spacing if planar else deformation.spacing
    )
    diffused = warp(network_input[None], random_field)[0]
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
    """The image and label of a sample as plain tensors."""
    return {key: value.as_tensor() for key, value in sample.items() if isinstance(value, MetaTensor)}


def _as_meta_tensor(tensor: Tensor) -> MetaTensor:
    """The same tensor, for mypy, which does not know that operations on a ``MetaTensor`` return one."""
    assert isinstance(tensor, MetaTensor)
    return tensor
