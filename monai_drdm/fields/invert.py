"""Inversion of displacement fields."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from monai_drdm.fields.grid import check_ddf, field_dtype, identity_grid
from monai_drdm.fields.warp import sample


class Inverse(NamedTuple):
    """An inverse field and how far to trust it."""

    ddf: Tensor
    """``(B, D, *S)`` voxels: ``compose(original, ddf)`` is the identity up to ``residual``."""
    residual: Tensor
    """``(B,)`` largest ``|ddf(x) + original(x + ddf(x))|`` in voxels."""
    converged: Tensor
    """``(B,)`` bool: the residual is within the tolerance."""


def invert(ddf: Tensor, *, iterations: int = 50, tolerance: float = 1e-3) -> Inverse:
    """The field ``w`` with ``w(x) = -ddf(x + w(x))``.

    The plain fixed-point iteration (Chen et al., Medical Physics 2008) diverges where the field stretches by more than
    a factor of 2 and crawls where it nearly does. Here each voxel accelerates it by Broyden's update of its own small
    inverse Jacobian, which starts as the identity: the first step is the plain one.

    Args:
        ddf: ``(B, D, *S)`` voxels; continued beyond the grid by its border.
        iterations: at most this many.
        tolerance: largest residual accepted, in voxels.

    Returns:
        The inverse, its residual and whether it converged. A field that folds has several inverses or none in places:
        one is returned where it exists.

    Raises:
        TypeError: not a floating tensor.
        ValueError: not of shape ``(B, D, *S)``.
    """
    check_ddf(ddf, "invert")
    field = ddf.to(field_dtype(ddf))
    target = identity_grid(ddf.shape[2:], device=ddf.device, dtype=field.dtype)[None]
    return solve_fixed_point(field, target, iterations, tolerance)


def solve_fixed_point(ddf: Tensor, target: Tensor, iterations: int, tolerance: float) -> Inverse:
    """For each ``p`` in ``target`` ``(B, D, *T)`` the ``w`` with ``w + ddf(p + w) = 0``."""
    dims = ddf.shape[1]
    offset = -sample(ddf, target)
    residual = offset + sample(ddf, target + offset)
    best, best_size = offset, residual.norm(dim=1, keepdim=True)
    eye = torch.eye(dims, device=ddf.device, dtype=ddf.dtype).view(1, dims, dims, *(1,) * (offset.ndim - 2))
    inverse_jacobian = eye.expand(offset.shape[0], -1, -1, *offset.shape[2:])
    for _ in range(iterations):
        if bool((best_size <= tolerance).all()):
            break
        step = -(inverse_jacobian * residual[:, None]).sum(dim=2)
        offset = offset + step
        change = offset + sample(ddf, target + offset) - residual
        residual = residual + change
        inverse_jacobian = _broyden_update(inverse_jacobian, step, change)
        size = residual.norm(dim=1, keepdim=True)
        better = size < best_size
        best, best_size = torch.where(better, offset, best), torch.where(better, size, best_size)
    worst = best_size.flatten(1).amax(dim=1) if best_size.numel() else best_size.new_zeros(offset.shape[0])
    return Inverse(best, worst, worst <= tolerance)


def _broyden_update(inverse_jacobian: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """``B + (s - B y) (s^T B) / (s^T B y)`` at every voxel, for step ``s`` and change of residual ``y``."""
    predicted = (inverse_jacobian * change[:, None]).sum(dim=2)
    row = (step[:, :, None] * inverse_jacobian).sum(dim=1)
    scale = (step * predicted).sum(dim=1, keepdim=True)
    safe = torch.where(scale.abs() < 1e-10, torch.full_like(scale, 1e-10), scale)  # solved voxels no longer move
    return inverse_jacobian + ((step - predicted) / safe)[:, :, None] * row[:, None]
