"""Reading NIfTI files to their end, and writing images as NIfTI."""

from __future__ import annotations

import gzip
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data.utils import correct_nifti_header_if_necessary
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from monai_drdm.documents import reason_of
from monai_drdm.io.compressed import read_to_end
from monai_drdm.io.files import atomically, suffix_of


def read_nifti(path: str) -> tuple[Any, NDArray[Any]]:
    """A NIfTI image of nibabel, and its values; those of a compressed file have the checksum that it holds.

    Raises:
        ValueError: it cannot be read or is damaged.
    """
    try:
        file: Any = nib.load(path)
        if not issubclass(type(file), nib.nifti1.Nifti1Pair):  # CIFTI ends in .nii too
            raise ValueError(f"it is a {type(file).__name__}, not a NIfTI image")
        if not path.lower().endswith(".gz"):
            return file, np.asanyarray(file.dataobj)
        with gzip.open(path) as stream:
            file = type(file).from_stream(stream)
            values = np.asanyarray(file.dataobj)
            read_to_end(stream)
            return file, values
    except Exception as error:  # on damaged files nibabel raises exceptions of any type
        raise ValueError(f"{path} cannot be read as NIfTI: {reason_of(error)}.") from None


def affine_in_monai(file: Any, shape: Sequence[int]) -> NDArray[Any]:
    """The affine that MONAI gives a NIfTI image: the qform, if the voxels of the sform have another size than the file.

    Args:
        file: of nibabel.
        shape: of the image; that of a field is the shape of the image that it belongs to.
    """
    affine = np.asarray(file.affine, dtype=float)
    if not np.isfinite(affine).all():
        return affine
    copy = type(file)(np.broadcast_to(np.uint8(0), tuple(shape)), affine, file.header)
    with warnings.catch_warnings(), suppress(ValueError, nib.spatialimages.HeaderDataError):  # a qform that is none
        warnings.simplefilter("ignore")  # it changes the copy only
        copy = correct_nifti_header_if_necessary(copy)
    return np.asarray(copy.affine, dtype=float)


def save_image(image: Tensor, affine: ArrayLike, path: str | os.PathLike[str]) -> None:
    """Write an image of one channel as NIfTI with a given affine.

    Args:
        image: ``(*S)`` with 2 or 3 axes. 64-bit integers are written as 32-bit, bools as 8-bit integers and half
            precision as single.
        affine: ``(4, 4)`` voxel to RAS millimetres.
        path: a ``.nii`` or ``.nii.gz`` file.

    Raises:
        ValueError: another number of axes or suffix, or integers beyond 32 bits, which most programs cannot read.
    """
    if image.ndim not in (2, 3):
        raise ValueError(f"save_image: image must have 2 or 3 axes, got {tuple(image.shape)}.")
    image = image.float() if image.dtype in (torch.float16, torch.bfloat16) else image
    array = image.detach().cpu().numpy()
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if array.dtype in (np.int64, np.uint64):
        narrow = array.astype(np.int32)
        if not np.array_equal(narrow, array):
            raise ValueError("save_image: integers beyond 32 bits cannot be written portably. Relabel them first.")
        array = narrow
    suffix_of(path, (".nii", ".nii.gz"), "save_image")
    file = nib.Nifti1Image(array, np.asarray(affine, dtype=float))
    atomically(path, lambda part: nib.save(file, part))
