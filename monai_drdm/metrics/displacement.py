"""Measures of displacement, of its non-affine part, and of local volume change."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_drdm.fields import identity_grid, jacobian_determinant
from monai_drdm.fields.grid import check_ddf, field_dtype


def mean_displacement(ddf: Tensor) -> Tensor:
    """Mean length of the displacement of each field, ``(B,)`` in voxels."""
    check_ddf(ddf, "mean_displacement")
    length: Tensor = ddf.to(field_dtype(ddf)).norm(dim=1)
    return length.flatten(1).mean(dim=1)


def remove_affine(ddf: Tensor) -> Tensor:
    """Subtract from each field its best affine fit (least squares over all voxels).

    What is left is the part of the deformation that an affine augmentation cannot produce.

    Args:
        ddf: ``(B, D, *S)`` voxels.

    Returns:
        ``(B, D, *S)`` voxels.
    """
    dims = check_ddf(ddf, "remove_affine")
    dtype = field_dtype(ddf)
    grid = identity_grid(ddf.shape[2:], device=ddf.device, dtype=torch.float64).flatten(1)
    design = torch.cat((torch.ones_like(grid[:1]), grid - grid.mean(dim=1, keepdim=True)))  # (D + 1, N)
    values = ddf.to(torch.float64).flatten(2)  # (B, D, N)
    gram = design @ design.T
    coefficients = values @ design.T @ torch.linalg.pinv(gram, hermitian=True)
    rest: Tensor = (values - coefficients @ design).to(dtype)
    return rest.reshape(ddf.shape[0], dims, *ddf.shape[2:])


def log_jacobian(ddf: Tensor, floor: float = 1e-3) -> Tensor:
    """Logarithm of the corner Jacobian determinant of each cell, as ``jacobian_determinant`` lays them out.

    Args:
        ddf: ``(B, D, *S)`` voxels.
        floor: smaller determinants are set to this, so that folds count as extreme compression.
    """
    return jacobian_determinant(ddf).clamp(min=floor).log()


def log_jacobian_std(ddf: Tensor, floor: float = 1e-3) -> Tensor:
    """Standard deviation of ``log_jacobian`` of each field, ``(B,)``."""
    return torch.std(log_jacobian(ddf, floor).flatten(1), dim=1, correction=0)
