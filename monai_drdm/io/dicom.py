"""Reading images through ITK that are never written back, such as DICOM series, MetaImage and TIFF."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK
import torch
from monai.data import MetaTensor

from monai_drdm.io.ddf import itk_affine
from monai_drdm.io.files import check_utf8

DICOM_SUFFIXES = (".dcm", ".ima")
_MAX_STRETCH = 0.15  # so that one missing slice of a dozen is accepted


def find_series(folder: str | os.PathLike[str]) -> tuple[list[tuple[str, ...]], list[str]]:
    """Find the DICOM series in a folder, each as its files in the order of their positions, and files of no series.

    Series are distinguished by UID, sequence, slice thickness and matrix, so that a scout is not stacked on a scan.
    """
    name = os.fspath(folder)
    reader = SimpleITK.ImageSeriesReader
    series = [tuple(reader.GetGDCMSeriesFileNames(name, uid, True)) for uid in reader.GetGDCMSeriesIDs(name, True)]
    known = {os.path.basename(file) for files in series for file in files}
    rest = (path for path in Path(folder).iterdir() if path.name not in known and not path.name.startswith("."))
    return sorted(series), sorted(str(path) for path in rest if path.name.lower().endswith(DICOM_SUFFIXES))


def _check_steps(files: Sequence[str]) -> None:
    """Refuse series that are not one volume: several time points, or large gaps, which ITK would stack evenly.

    Raises:
        ValueError: several slices at one place, or so many missing that the volume would be stretched.
    """
    places = [_place_along_normal(file) for file in files]
    if len(places) < 2 or None in places:
        return
    steps = np.diff(np.sort(np.array(places, dtype=float)))
    if steps.min() < 1e-3:
        raise ValueError("several slices lie at one place, as those of several time points do; separate them first")
    usual, mean = float(np.median(steps)), float(steps.mean())
    if abs(mean / usual - 1) > _MAX_STRETCH:
        raise ValueError(f"slices are missing: most lie {usual:g} mm apart, in the mean they lie {mean:g} mm apart")


def _place_along_normal(file: str) -> float | None:
    """Position of a DICOM slice along the normal of its plane, in mm; None if the header does not have it."""
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(file)
    try:
        reader.ReadImageInformation()
        place, plane = (
            [float(number) for number in reader.GetMetaData(tag).split("\\")] for tag in ("0020|0032", "0020|0037")
        )
    except (RuntimeError, ValueError):
        return None
    return float(np.dot(np.cross(plane[:3], plane[3:]), place))


def load_with_itk(files: Sequence[str]) -> MetaTensor:
    """Read one image ``(C, *S)`` as float32 from one file, or from the slices of a DICOM series.

    Raises:
        ValueError: it cannot be read, or the slices of a series do not lie at even steps.
    """
    for file in files:
        check_utf8(file)
    _check_steps(files)
    try:
        image = SimpleITK.ReadImage(files[0] if len(files) == 1 else list(files))
    except RuntimeError as error:
        raise ValueError(str(error).strip().splitlines()[-1]) from None
    values = SimpleITK.GetArrayFromImage(image)  # (…, y, x[, C])
    dims = image.GetDimension()
    if values.dtype.kind not in "biuf":
        raise ValueError(f"real numbers are needed, got {image.GetPixelIDTypeAsString()}")
    channels = values if image.GetNumberOfComponentsPerPixel() > 1 else values[..., None]
    channels = np.ascontiguousarray(channels.transpose(dims, *range(dims - 1, -1, -1)), dtype=np.float32)
    affine = torch.from_numpy(itk_affine(image)) if dims in (2, 3) else torch.eye(4)
    return MetaTensor(torch.from_numpy(channels), affine=affine)
