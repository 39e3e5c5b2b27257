"""Conversions between voxels, millimetres and the published fractions of the image size.

The package computes in voxels. Millimetres occur only in public arguments, and fractions only in the inputs and outputs
of the published networks. A fraction of 1 is the length of the longest side in voxels, along every axis, so that shapes
keep their proportions on grids that are not square.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monai_drdm.fields.grid import check_ddf


def voxels_to_mm(ddf: Tensor, spacing: Sequence[float]) -> Tensor:
    """Displacements ``(B, D, *S)`` in millimetres along the array axes, from voxels and spacing in mm per voxel."""
    return ddf * _per_axis(ddf, spacing, "voxels_to_mm")


def mm_to_voxels(ddf: Tensor, spacing: Sequence[float]) -> Tensor:
    """Displacements ``(B, D, *S)`` in voxels, from millimetres along the array axes and spacing in mm per voxel."""
    return ddf / _per_axis(ddf, spacing, "mm_to_voxels")


def voxels_to_fractions(ddf: Tensor) -> Tensor:
    """Displacements ``(B, D, *S)`` as fractions of the longest side, from voxels."""
    check_ddf(ddf, "voxels_to_fractions")
    return ddf / max(ddf.shape[2:])


def fractions_to_voxels(ddf: Tensor) -> Tensor:
    """Displacements ``(B, D, *S)`` in voxels, from fractions of the longest side."""
    check_ddf(ddf, "fractions_to_voxels")
    return ddf * max(ddf.shape[2:])


def _per_axis(ddf: Tensor, spacing: Sequence[float], function: str) -> Tensor:
    dims = check_ddf(ddf, function)
    if len(spacing) != dims or not all(0 < s < float("inf") for s in spacing):
        raise ValueError(f"{function}: spacing must be {dims} positive numbers in mm, got {tuple(spacing)}.")
    return torch.as_tensor(list(spacing), device=ddf.device, dtype=ddf.dtype).view(1, dims, *(1,) * dims)
