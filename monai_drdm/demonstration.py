"""What ``monai-drdm demo`` runs: deform one scan and its label by one field, and save and plot the result."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged
from numpy.typing import ArrayLike
from torch import Tensor

from monai_drdm.drawn_chest import draw_chest, SPACING_MM
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
    level: float = 0.4,
    seed: int = 0,
) -> list[Path]:
    """Deform a scan and its label and write both, the field, the record, a figure and an animation.

    If the network is 2D and the scan 3D, one in-plane field deforms the whole stack of slices. It is drawn for the
    middle slice across the axis with the largest spacing.

    Args:
        image: NIfTI image; None is a drawn slice through a chest, with its label map.
        label: NIfTI label map of the image; None marks voxels brighter than a quarter of the scan's 99th percentile.
        out: a folder that is new or empty.
        network: registry name or safetensors file; ``auto`` is the default network for the dimensions of the scan.
        level: deformation level in (0, 1].
        seed: fixes the field.

    Returns:
        The files written; the last one is the figure.

    Raises:
        ValueError: a file that cannot be read, or one that does not suit the network; a label without its image.
        FileNotFoundError: a file or the weights do not exist.
        FileExistsError: the folder is not empty.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder. Choose another with --out.")
    scans = _scans(image, label)
    loaded = load_network(auto_network(scans["image"].ndim - 1) if network == "auto" else network)
    planar = scans["image"].ndim == 4 and loaded.card.spatial_dims == 2
    transform = RandDRDMDeformd(
        keys=["image", "label"],
        mode=["bilinear", "nearest"],
        prob=1.0,
        deformation_level=level,
        network=loaded,
        slice_axis=int(np.argmax(spacing_of(scans["image"], None, "image"))) if planar else None,
    )
    transform.set_random_state(seed)
    deformed = {key: torch.as_tensor(value).as_subclass(Tensor) for key, value in transform(scans).items()}
    deformation = transform.last
    assert deformation is not None
    folder.parent.mkdir(parents=True, exist_ok=True)
    # files are moved into place at the end, so that an error leaves none of them behind
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:
        written = _write(Path(partial), deformed, deformation, scans["image"].affine.cpu().numpy())
        written += _plot(scans, deformation, loaded, Path(partial))
        folder.mkdir(exist_ok=True)
        return [path.replace(folder / path.name) for path in written]


def _scans(image: str | os.PathLike[str] | None, label: str | os.PathLike[str] | None) -> dict[str, MetaTensor]:
    """The image and the label that files hold, or the drawn ones."""
    if image is None:
        if label is not None:
            raise ValueError(f"--label {label} needs --image, the scan that it belongs to.")
        drawn = draw_chest()
        affine = torch.diag(torch.tensor([-SPACING_MM, SPACING_MM, 1.0, 1.0], dtype=torch.float64))
        return {key: MetaTensor(value, affine=affine) for key, value in zip(("image", "label"), drawn)}
    scan = _load(Path(image), np.float32)
    return {"image": scan, "label": _foreground(scan) if label is None else _load(Path(label), None)}


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
    scans: Mapping[str, MetaTensor], deformation: Deformation, network: RecoveryNetwork, folder: Path
) -> list[Path]:
    """Save the animation of the recovery and the figure of the deformation; of a volume they show one slice."""
    from monai_drdm.viz import animate_recovery, deformation_figure, recovery_steps  # matplotlib is an extra

    record, numbers = deformation.params, deformation.statistics
    assert record is not None
    found = recovery_steps(scans["image"], record, scans["label"], network=network)
    before, random, after = found.original, found.steps[0], found.steps[-1]
    figure = deformation_figure(
        before.image,
        random.image,
        after.image,
        after.ddf,
        before.label,
        after.label,
        found.spacing,
        f"One field of level {record.deformation_level:.2f}, drawn by {record.network}.\nIt moves voxels by "
        f"{numbers.mean_displacement_mm:.1f} mm on average, {numbers.max_displacement_mm:.1f} mm at most",
        random.label,
    )
    paths = [folder / "recovery.gif", folder / "figure.png"]
    animate_recovery(found).save(paths[0], writer="pillow", dpi=80)
    figure.savefig(paths[1], dpi=110)
    return paths


def _as_meta_tensor(tensor: Tensor) -> MetaTensor:
    """The same tensor, for mypy, which does not know that operations on a ``MetaTensor`` return one."""
    assert isinstance(tensor, MetaTensor)
    return tensor
