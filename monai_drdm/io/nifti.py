"""Writing images and displacement fields as NIfTI."""

from __future__ import annotations

import os
from typing import Any

import nibabel as nib
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

_DISPLACEMENT_INTENT = 1006


def save_image(image: Tensor, affine: ArrayLike, path: str | os.PathLike[str]) -> None:
    """Write one channel as NIfTI with a given affine.

    Args:
        image: ``(*S)`` with 2 or 3 axes; 64-bit integers become 32-bit where they fit, bools 8-bit,
            half precision single.
        affine: ``(4, 4)`` voxel to RAS millimetres.
        path: a ``.nii`` or ``.nii.gz`` file.

    Raises:
        ValueError: another number of axes, or integers beyond 32 bits, which most readers of NIfTI do not know.
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
    _save(array, affine, path)


def save_ddf(ddf: Tensor, affine: ArrayLike, path: str | os.PathLike[str]) -> None:
    """Write a displacement field as a NIfTI vector image of RAS millimetres (intent 1006).

    A field in world terms is ``A[:3, :3] · u_vox``. Readers that follow the intent, such as SimpleITK, turn it into
    their own orientation.

    Args:
        ddf: ``(D, *S)`` voxels. A 2D field is written as one slice without a third component of motion.
        affine: ``(4, 4)`` voxel to RAS millimetres.
        path: a ``.nii`` or ``.nii.gz`` file.

    Raises:
        ValueError: not a field of 2 or 3 dimensions.
    """
    if ddf.ndim not in (3, 4) or ddf.shape[0] != ddf.ndim - 1:
        raise ValueError(f"save_ddf: ddf must have shape (D, *S) with D = len(S) in {{2, 3}}, got {tuple(ddf.shape)}.")
    matrix = np.asarray(affine, dtype=float)
    vectors = np.moveaxis(ddf.detach().cpu().double().numpy(), 0, -1)  # (*S, D)
    world = vectors @ matrix[:3, : ddf.shape[0]].T
    if ddf.shape[0] == 2:
        world = world[:, :, None]
    _save(world[:, :, :, None].astype(np.float32), matrix, path, _DISPLACEMENT_INTENT)


def _save(array: NDArray[Any], affine: ArrayLike, path: str | os.PathLike[str], intent: int = 0) -> None:
    file = nib.Nifti1Image(array, np.asarray(affine, dtype=float))
    file.header.set_intent(intent)
    nib.save(file, os.fspath(path))
