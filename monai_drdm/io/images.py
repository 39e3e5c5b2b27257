"""Images that are written back in their own format, with the affine, orientation and data type of the file."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK
import torch
from monai.data import MetaTensor
from numpy.typing import NDArray
from torch import Tensor

from monai_drdm.io.compressed import read_to_end
from monai_drdm.io.ddf import Convention, itk_affine, itk_place, write_field
from monai_drdm.io.files import atomically, ITK_FORMATS, suffix_of
from monai_drdm.io.itk_files import read_with_itk
from monai_drdm.io.nifti import affine_in_monai, read_nifti

IMAGE_SUFFIXES = (".nii", ".nii.gz", ".mha", ".nrrd", ".png")
"""Formats that can be read and written back."""

_ITK_OWN_KEYS = ("ITK_", "NRRD_")  # ITK writes them itself, except this one:
_NRRD_CONTENT = "NRRD_content"


@dataclass(frozen=True)
class ImageFile:
    """An image, and what is needed to write another one in the same format."""

    data: MetaTensor
    """``(C, *S)`` with MONAI's affine, voxel to RAS millimetres; the identity for a file without one."""
    itk_affine: NDArray[Any] | None
    """Voxel to RAS millimetres ``(4, 4)`` as ITK reads the header; None if ITK cannot read the file.

    It may differ from the affine of ``data``, because ITK prefers the qform and converts micrometres."""
    itk_dims: int
    """Number of spatial axes in ITK: 3 for a volume of one slice, although ``data`` may be 2D."""
    suffix: str
    _write: Callable[[NDArray[Any], str, np.dtype[Any] | None], object]
    _nifti_header: Any = None

    def save_like(self, data: Tensor, path: str | os.PathLike[str], dtype: np.dtype[Any] | None = None) -> None:
        """Write an image ``(C, *S)`` of the same shape with the header and data type of this file.

        Values are rounded if the data type is an integer.

        Args:
            data: the image.
            path: a file with the suffix of this one.
            dtype: another data type to write.

        Raises:
            OSError: the file cannot be written; no unfinished file is left.
            ValueError: another shape or suffix, or values that the data type cannot hold: NaN or infinity in a file of
                integers, integers beyond its range.
        """
        if tuple(data.shape) != tuple(self.data.shape):
            raise ValueError(f"save_like: data must have shape {tuple(self.data.shape)}, got {tuple(data.shape)}.")
        suffix_of(path, (self.suffix,), "save_like")
        plain = data.detach().as_subclass(Tensor).cpu()
        values = (plain.float() if plain.dtype in (torch.float16, torch.bfloat16) else plain).numpy()
        atomically(path, lambda part: self._write(values, part, dtype))

    def save_field(self, ddf: Tensor, path: str | os.PathLike[str], *, convention: Convention | None = None) -> None:
        """Write a displacement field of this image, so that ITK finds it where it finds the image.

        The sform and the qform of a NIfTI image may disagree; ITK takes one, nibabel and MONAI the other. A 3D field in
        a NIfTI file gets both, and its vectors are those of the space in which ITK places the image. ``load_ddf`` reads
        them in voxels, with the affine that MONAI gives the image, so that ``ApplyDDFd`` applies the field to it.

        Args:
            ddf: ``(D, *S)`` voxels, on the grid of the image.
            path: as in ``save_ddf``.
            convention: as in ``save_ddf``.

        Raises:
            OSError: the file cannot be written; no unfinished file is left.
            ValueError: another grid, or what ``save_ddf`` refuses.
        """
        if tuple(ddf.shape[1:]) != tuple(self.data.shape[1:]):
            raise ValueError(
                f"save_field: ddf must lie on the grid {tuple(self.data.shape[1:])} of its image, got "
                f"{tuple(ddf.shape[1:])}."
            )
        flat = ddf.shape[0] == 2 or ddf.shape[-1] == 1
        unseen = flat and Path(path).name.lower().endswith((".nii", ".nii.gz"))  # ITK reads no such field
        affine = self.data.affine.numpy() if self.itk_affine is None or unseen else self.itk_affine
        write_field(ddf, affine, path, convention, self.itk_dims == 3, self._nifti_header)


def load_image(path: str | os.PathLike[str], *, keep_slice: bool = False) -> ImageFile:
    """Read an image.

    Args:
        path: a file that ends in one of ``IMAGE_SUFFIXES``. NIfTI axes after the third, and components, are channels.
        keep_slice: return a volume of one slice as 3D instead of 2D.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not readable, or not of 2 or 3 spatial axes of real numbers.
    """
    suffix = suffix_of(path, IMAGE_SUFFIXES, "load_image")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {os.fspath(path)}.")
    return (_load_nifti if suffix.startswith(".nii") else _load_itk)(os.fspath(path), suffix, keep_slice)


def check_plain(path: Path) -> None:
    """Refuse files that readers of MONAI would misread.

    Raises:
        ValueError: a palette image, whose numbers are not intensities, a volume whose affine is not finite, or a
            compressed one that is damaged, whose checksum nibabel does not read.
    """
    name = path.name.lower()
    if name.endswith((".png", ".bmp")):
        from PIL import Image  # an extra that only training needs

        with Image.open(path) as picture:
            if picture.mode == "P":
                raise ValueError("is a palette image; convert it to grey")
    elif name.endswith((".nii", ".nii.gz")):
        file: Any = nib.load(path)
        if not np.isfinite(file.affine).all():
            raise ValueError("its affine holds NaN or infinity")
        if name.endswith(".gz"):
            with gzip.open(path) as stream:
                read_to_end(stream)


def _load_nifti(path: str, suffix: str, keep_slice: bool) -> ImageFile:
    file, values = read_nifti(path)
    if values.dtype.kind not in "biuf" or not 2 <= values.ndim <= 5 or 0 in values.shape:
        raise ValueError(f"{path} must hold real numbers in 2 to 5 axes, got {values.dtype} of shape {values.shape}.")
    shape = values.shape
    spatial = shape[:3] if len(shape) > 2 and (keep_slice or shape[2] > 1) else shape[:2]
    channels = values.reshape(*spatial, -1, order="F")  # all axes after the spatial ones become channels
    slope, inter = file.dataobj.slope, file.dataobj.inter

    def write(output: NDArray[Any], part: str, dtype: np.dtype[Any] | None) -> None:
        array = np.moveaxis(output, 0, -1).reshape(shape, order="F")
        scaling = (slope, inter) if dtype is None else (1.0, 0.0)
        if scaling != (1.0, 0.0):
            array = (array - inter) / slope
        dtype = file.get_data_dtype() if dtype is None else dtype
        copy = type(file)(_as_dtype(array, dtype), file.affine, file.header)
        copy.header.set_data_dtype(dtype)
        copy.header.set_slope_inter(*scaling)
        try:
            nib.save(copy, part)
        except nib.spatialimages.HeaderDataError as error:
            raise ValueError(f"{path}: its header cannot be written again: {error}") from error

    data = np.ascontiguousarray(np.moveaxis(channels, -1, 0))
    return _image_file(data, affine_in_monai(file, shape), itk_place(path), suffix, write, file.header)


def _load_itk(path: str, suffix: str, keep_slice: bool) -> ImageFile:
    if suffix == ".png":
        _check_png(path)
    image, compressed = read_with_itk(path)
    values = SimpleITK.GetArrayFromImage(image)  # (…, y, x[, C])
    dims, vector = image.GetDimension(), image.GetNumberOfComponentsPerPixel() > 1
    if values.dtype.kind not in "biuf" or dims not in (2, 3) or 0 in values.shape:
        raise ValueError(
            f"{path} must be a 2D or 3D image of real numbers, got {dims}D of {image.GetPixelIDTypeAsString()}."
        )
    channels = values if vector else values[..., None]
    channels = channels.transpose(dims, *range(dims - 1, -1, -1))  # (C, x, y, …)
    single = dims == 3 and channels.shape[3] == 1 and not keep_slice

    def write(output: NDArray[Any], part: str, dtype: np.dtype[Any] | None) -> None:
        full, dtype = output[..., None] if single else output, values.dtype if dtype is None else dtype
        array = full.transpose(*range(dims, 0, -1), 0)
        copy = SimpleITK.GetImageFromArray(
            np.ascontiguousarray(_as_dtype(array if vector else array[..., 0], dtype)), isVector=vector
        )
        copy.CopyInformation(image)
        for key in image.GetMetaDataKeys():
            if key == _NRRD_CONTENT or not key.startswith(_ITK_OWN_KEYS):
                copy.SetMetaData(key, image.GetMetaData(key))
        SimpleITK.WriteImage(copy, part, useCompression=compressed or suffix == ".png", imageIO=ITK_FORMATS[suffix])

    place = itk_affine(image)
    affine = np.eye(4) if suffix == ".png" else place
    data = np.ascontiguousarray(channels[..., 0] if single else channels)
    return _image_file(data, affine, (place, dims), suffix, write)


def _check_png(path: str) -> None:
    """Refuse PNG files whose values, and so class numbers, ITK changes on reading: palettes and fewer than 8 bits."""
    with open(path, "rb") as file:
        head = file.read(26)
    depth, colour = head[24:25], head[25:26]
    plain = colour in (b"\0", b"\2", b"\6") and depth in (b"\x08", b"\x10")
    if len(head) == 26 and head[12:16] == b"IHDR" and not plain:  # ITK refuses what is cut off
        raise ValueError(
            f"{path} must be a grey, RGB or RGBA PNG of 8 or 16 bits, got colour type {colour[0]} of {depth[0]} bits. "
            "Convert palettes and 1-bit masks to 8-bit grey first."
        )


def _image_file(
    values: NDArray[Any],
    affine: NDArray[Any],
    itk: tuple[NDArray[Any] | None, int],
    suffix: str,
    write: Callable[[NDArray[Any], str, np.dtype[Any] | None], object],
    nifti_header: Any = None,
) -> ImageFile:
    native = values.astype(values.dtype.newbyteorder("="), copy=False)
    data = MetaTensor(torch.from_numpy(native), affine=torch.from_numpy(affine))
    return ImageFile(data, *itk, suffix, write, nifti_header)


def _as_dtype(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Convert values to a data type. For integers, floating values are rounded and clipped to the range of the type."""
    if dtype.kind not in "iu":
        return values.astype(dtype)
    limits = np.iinfo(dtype)
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise ValueError(f"save_like: a file of {dtype} cannot hold NaN or infinity.")
        top = float(limits.max)
        top = top if top <= limits.max else np.nextafter(top, 0)  # 2⁶³ - 1 is not representable as float64
        values = np.clip(np.round(values.astype(np.float64)), limits.min, top)
    elif values.size and values.dtype.kind in "iu" and (values.min() < limits.min or values.max() > limits.max):
        raise ValueError(f"save_like: a file of {dtype} cannot hold {values.min()} to {values.max()}.")
    return values.astype(dtype)
