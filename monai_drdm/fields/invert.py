"""Inversion of displacement fields, and the landmarks that move with the images under them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from monai_drdm.fields.grid import check_ddf, field_dtype, identity_grid, shape_of
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


def warp_points(points: Tensor, ddf: Tensor, *, iterations: int = 50, tolerance: float = 1e-3) -> Tensor:
    """Move landmarks as ``warp`` moves the image under them: the ``q`` with ``q + ddf(q) = p``.

    Solved per point by the iteration of ``invert``.

    Args:
        points: ``(B, N, D)`` voxel coordinates in the unwarped image. Either batch size may be 1.
        ddf: ``(B, D, *S)`` voxels.
        iterations: at most this many.
        tolerance: stop when no point misses its equation by more than this, in voxels.

    Returns:
        ``(B, N, D)`` voxel coordinates in the warped image, floating.

    Raises:
        TypeError: ``ddf`` is not a floating tensor.
        ValueError: shapes do not fit.
    """
    dims = check_ddf(ddf, "warp_points")
    if not isinstance(points, Tensor) or points.ndim != 3 or points.shape[-1] != dims:
        raise ValueError(f"warp_points: points must have shape (B, N, {dims}), got {shape_of(points)}.")
    dtype = field_dtype(ddf, points)
    target = points.to(dtype).transpose(1, 2)
    target = target.reshape(*target.shape, *(1,) * (dims - 1))  # (B, D, N, 1[, 1])
    solution = solve_fixed_point(ddf.to(dtype), target, iterations, tolerance)
    return (target + solution.ddf).flatten(2).transpose(1, 2)


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
