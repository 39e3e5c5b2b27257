"""Coordinate grids and checks of arguments. Only this module converts to the axis order of ``grid_sample``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def identity_grid(
    shape: Sequence[int], *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Voxel coordinates of every grid point.

    Args:
        shape: spatial shape ``S``.
        device: where the grid lives.
        dtype: floating type of the grid.

    Returns:
        ``(D, *S)`` tensor whose component ``d`` at ``x`` is ``x[d]``.
    """
    axes = [torch.arange(size, device=device, dtype=dtype) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def to_grid_sample(coordinates: Tensor, shape: Sequence[int]) -> Tensor:
    """Convert voxel coordinates to the layout of ``torch.nn.functional.grid_sample`` with ``align_corners=True``.

    Args:
        coordinates: ``(B, D, *T)`` voxel coordinates in a grid of shape ``shape``.
        shape: spatial shape ``S`` of the sampled tensor.

    Returns:
        ``(B, *T, D)`` coordinates in [-1, 1], last array axis first.
    """
    axes = [
        coordinates[:, d] / ((size - 1) / 2) - 1.0 if size > 1 else coordinates[:, d] * 0.0
        for d, size in enumerate(shape)
    ]
    return torch.stack(axes[::-1], dim=-1)


def sampling_grid(ddf: Tensor) -> Tensor:
    """Where ``warp`` samples, ``x + ddf(x)``, in the layout of ``grid_sample``.

    The result is that of ``to_grid_sample``, but no identity grid is built on the way, which saves memory and time.

    Args:
        ddf: ``(B, D, *S)`` voxels, floating.

    Returns:
        ``(B, *S, D)`` coordinates in [-1, 1], last array axis first, in the type of ``ddf``.
    """
    batch, dims, *shape = ddf.shape
    axes = [_axis_coordinates(size, dims - 1 - d, ddf) for d, size in enumerate(shape)]
    scales = [2.0 / (size - 1) if size > 1 else 0.0 for size in shape]
    if torch.is_grad_enabled() and ddf.requires_grad:
        parts = [torch.add(axis, ddf[:, d], alpha=scale) for d, (axis, scale) in enumerate(zip(axes, scales))]
        return torch.stack(parts[::-1], dim=-1)
    grid = ddf.new_empty((batch, *shape, dims))
    for d, (axis, scale) in enumerate(zip(axes, scales)):
        torch.add(axis, ddf[:, d], alpha=scale, out=grid[..., dims - 1 - d])
    return grid


def _axis_coordinates(size: int, axes_after: int, ddf: Tensor) -> Tensor:
    """Coordinates in [-1, 1] along an axis that ``axes_after`` more axes follow; 0 along an axis of length 1."""
    if size == 1:
        return ddf.new_zeros((1,) * (axes_after + 1))
    return torch.linspace(-1.0, 1.0, size, device=ddf.device, dtype=ddf.dtype).view(-1, *(1,) * axes_after)


def field_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which coordinates are computed: float64 if any of the tensors is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_ddf(ddf: Tensor, function: str, argument: str = "ddf") -> int:
    """Check that a tensor has the form of a displacement field and return its number of spatial dimensions.

    Raises:
        TypeError: not a floating tensor.
        ValueError: not of shape ``(B, D, *S)`` with ``D = len(S)`` in {2, 3}.
    """
    if not isinstance(ddf, Tensor) or not ddf.is_floating_point():
        got = ddf.dtype if isinstance(ddf, Tensor) else type(ddf).__name__
        raise TypeError(f"{function}: {argument} must be a floating tensor (B, D, *S), got {got}.")
    dims = ddf.ndim - 2
    if dims not in (2, 3) or ddf.shape[1] != dims or 0 in ddf.shape:
        raise ValueError(
            f"{function}: {argument} must have shape (B, D, *S) with D = len(S) in {{2, 3}} and no empty axis, "
            f"got {tuple(ddf.shape)}. Add a batch axis with ddf[None] if it is missing."
        )
    return dims


def check_same_grid(first: Tensor, second: Tensor, function: str, names: tuple[str, str]) -> None:
    """Check that two batched tensors share their spatial shape and have batch sizes that match or are 1.

    Raises:
        ValueError: they do not; the message names both shapes.
    """
    if first.shape[2:] != second.shape[2:]:
        raise ValueError(
            f"{function}: {names[0]} and {names[1]} must share one grid, got spatial shapes "
            f"{tuple(first.shape[2:])} and {tuple(second.shape[2:])}. Use resize_ddf to change a field's grid."
        )
    if first.shape[0] != second.shape[0] and 1 not in (first.shape[0], second.shape[0]):
        raise ValueError(
            f"{function}: batch sizes of {names[0]} and {names[1]} must be equal or 1, "
            f"got {first.shape[0]} and {second.shape[0]}."
        )
