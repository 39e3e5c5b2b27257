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
from monai_drdm.io.files import check_utf8, ITK_FORMATS
from monai_drdm.io.itk_files import read_with_itk

DICOM_SUFFIXES = (".dcm", ".ima")
_MAX_STRETCH = 0.15  # so that one missing slice of a dozen is accepted
_MAX_HOLE = 2.5  # steps; so that two missing slices in a row are not
_SAME_PLANE = 1e-2  # of the cosines of directions


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
    """Refuse series that are not one volume: ITK would stack the slices evenly, one behind the other.

    Raises:
        ValueError: slices of several orientations, several at one place, or so many missing that the volume would be
            stretched, or would have a hole.
    """
    found = [_place(file) for file in files]
    placed = [one for one in found if one is not None]
    if not placed:
        return
    if len(placed) < len(files):
        raise ValueError(f"{len(files) - len(placed)} of {len(files)} slices do not say where they lie")
    planes = np.array([plane for _, plane in placed])
    if np.abs(planes - planes[0]).max() > _SAME_PLANE:
        raise ValueError("slices lie in several orientations, as those of a localizer do; separate them first")
    normal = np.cross(planes[0, :3], planes[0, 3:])
    steps = np.diff(np.sort([float(np.dot(normal, place)) for place, _ in placed]))
    if steps.min() < 1e-3:
        raise ValueError("several slices lie at one place, as those of several time points do; separate them first")
    usual, mean, largest = float(np.median(steps)), float(steps.mean()), float(steps.max())
    if abs(mean / usual - 1) > _MAX_STRETCH or largest > _MAX_HOLE * usual:
        raise ValueError(
            f"slices are missing: most lie {usual:g} mm apart, in the mean they lie {mean:g} mm and at most "
            f"{largest:g} mm apart"
        )


def _place(file: str) -> tuple[list[float], list[float]] | None:
    """Position of a DICOM slice in mm, and the directions of its rows and columns; None if they are not in the header.

    Raises:
        ValueError: they are no finite numbers.
    """
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(file)
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
        texts = [reader.GetMetaData(tag).split("\\") for tag in ("0020|0032", "0020|0037")]
    except RuntimeError:
        return None
    place, plane = ([float(number) for number in text] for text in texts)
    if (len(place), len(plane)) != (3, 6) or not np.isfinite([*place, *plane]).all():
        raise ValueError(f"{os.path.basename(file)} does not say where it lies: {place} and {plane}")
    return place, plane


def load_with_itk(files: Sequence[str]) -> MetaTensor:
    """Read one image ``(C, *S)`` as float32 from one file, or from the slices of a DICOM series.

    Raises:
        ValueError: it cannot be read, or the slices of a series are not one volume.
    """
    for file in files:
        check_utf8(file)
    image = _read_series(files) if len(files) > 1 else read_with_itk(files[0])[0]
    values = SimpleITK.GetArrayFromImage(image)  # (…, y, x[, C])
    dims = image.GetDimension()
    if values.dtype.kind not in "biuf":
        raise ValueError(f"real numbers are needed, got {image.GetPixelIDTypeAsString()}")
    channels = values if image.GetNumberOfComponentsPerPixel() > 1 else values[..., None]
    channels = np.ascontiguousarray(channels.transpose(dims, *range(dims - 1, -1, -1)), dtype=np.float32)
    affine = torch.from_numpy(itk_affine(image)) if dims in (2, 3) else torch.eye(4)
    return MetaTensor(torch.from_numpy(channels), affine=affine)


def _read_series(files: Sequence[str]) -> SimpleITK.Image:
    _check_steps(files)
    try:
        return SimpleITK.ReadImage(list(files), imageIO=ITK_FORMATS[".dcm"])
    except RuntimeError as error:
        raise ValueError(str(error).strip().splitlines()[-1]) from None
