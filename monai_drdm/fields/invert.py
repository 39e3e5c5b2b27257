"""Inversion of displacement fields, and moving points, which needs the inverse at these points only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from monai_drdm.fields.grid import check_ddf, field_dtype, identity_grid
from monai_drdm.fields.warp import sample


class Inverse(NamedTuple):
    """An inverse field and its error."""

    ddf: Tensor
    """``(B, D, *S)`` voxels: ``compose(original, ddf)`` is the identity up to ``residual``."""
    residual: Tensor
    """``(B,)`` largest ``|ddf(x) + original(x + ddf(x))|`` in voxels."""
    converged: Tensor
    """``(B,)`` bool: the residual is within the tolerance."""


def invert(ddf: Tensor, *, iterations: int = 50, tolerance: float = 1e-3) -> Inverse:
    """The field ``w`` with ``w(x) = -ddf(x + w(x))``.

    The plain fixed-point iteration (Chen et al., Medical Physics 2008) diverges where the field stretches by more than
    a factor of 2, and converges slowly where it stretches nearly as much. Here every voxel has its own small inverse
    Jacobian, which starts as the identity and is improved by Broyden's update. The first step is therefore the plain
    one.

    Args:
        ddf: ``(B, D, *S)`` voxels; beyond the grid its border values continue.
        iterations: largest number of iterations.
        tolerance: largest residual accepted, in voxels.

    Returns:
        The inverse, its residual and whether it converged. Where a field folds, a point may have several inverses or
        none; one of them is returned if there is any.

    Raises:
        TypeError: not a floating tensor.
        ValueError: not of shape ``(B, D, *S)``.
    """
    check_ddf(ddf, "invert")
    field = ddf.to(field_dtype(ddf))
    target = identity_grid(ddf.shape[2:], device=ddf.device, dtype=field.dtype)[None]
    return solve_fixed_point(field, target, iterations, tolerance)


def warp_points(points: Tensor, ddf: Tensor, *, iterations: int = 50, tolerance: float = 1e-3) -> Tensor:
    """Move landmarks with the image that ``warp`` moves: find the ``q`` with ``q + ddf(q) = p``.

    Each point is solved by the iteration of ``invert``.

    Args:
        points: ``(B, N, D)`` voxel coordinates in the image before warping. Either batch size may be 1.
        ddf: ``(B, D, *S)`` voxels.
        iterations: largest number of iterations.
        tolerance: the iteration stops when ``|q + ddf(q) - p|`` is within this for all points, in voxels.

    Returns:
        ``(B, N, D)`` voxel coordinates in the warped image, floating.

    Raises:
        TypeError: ``ddf`` is not a floating tensor.
        ValueError: shapes do not fit.
    """
    dims = check_ddf(ddf, "warp_points")
    if not isinstance(points, Tensor) or points.ndim != 3 or points.shape[-1] != dims:
        got = str(tuple(points.shape)) if isinstance(points, Tensor) else type(points).__name__
        raise ValueError(f"warp_points: points must have shape (B, N, {dims}), got {got}.")
    dtype = field_dtype(ddf, points)
    target = points.to(dtype).transpose(1, 2)
    target = target.reshape(*target.shape, *(1,) * (dims - 1))  # (B, D, N, 1[, 1])
    solution = solve_fixed_point(ddf.to(dtype), target, iterations, tolerance)
    return (target + solution.ddf).flatten(2).transpose(1, 2)


def solve_fixed_point(ddf: Tensor, target: Tensor, iterations: int, tolerance: float) -> Inverse:
    """For each point ``p`` of ``target`` find the ``w`` with ``w + ddf(p + w) = 0``.

    Args:
        ddf: ``(B, D, *S)`` voxels, float32 or float64.
        target: ``(B, D, *T)`` voxel coordinates.
        iterations: largest number of iterations.
        tolerance: largest residual accepted, in voxels.

    Returns:
        ``w`` as ``(B, D, *T)``, with residual and convergence. Each point keeps the best value of all iterations.
    """
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
    """``B + (s - B y) (s^T B) / (s^T B y)`` at every voxel, with step ``s`` and change of residual ``y``."""
    predicted = (inverse_jacobian * change[:, None]).sum(dim=2)
    row = (step[:, :, None] * inverse_jacobian).sum(dim=1)
    scale = (step * predicted).sum(dim=1, keepdim=True)
    safe = torch.where(scale.abs() < 1e-10, torch.full_like(scale, 1e-10), scale)  # a solved voxel does not step
    return inverse_jacobian + ((step - predicted) / safe)[:, :, None] * row[:, None]
