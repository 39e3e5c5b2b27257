"""Sampling images, labels and points through displacement fields."""

from __future__ import annotations

from typing import get_args, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_drdm.fields.grid import (
    check_ddf,
    check_same_grid,
    field_dtype,
    identity_grid,
    sampling_grid,
    to_grid_sample,
)

Mode = Literal["bilinear", "nearest", "bicubic", "label"]
PaddingMode = Literal["border", "zeros", "reflection"]

# torch implements gather for signed integers only; the bit pattern is what is moved, so a signed view is exact
_SIGNED_VIEW = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
# every value of these is a float32 too
_FLOAT32_HOLDS = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.float32,
)


def warp(image: Tensor, ddf: Tensor, mode: Mode = "bilinear", padding_mode: PaddingMode = "border") -> Tensor:
    """``warped(x) = image(x + ddf(x))``.

    Args:
        image: ``(B, C, *S)``, any dtype.
        ddf: ``(B, D, *S)`` voxels. Either batch size may be 1.
        mode: ``bilinear`` (trilinear in 3D), ``nearest``, ``bicubic`` (2D only) or ``label`` (see ``warp_labels``).
        padding_mode: ``border``, ``zeros`` or ``reflection``: what lies outside the image.

    Returns:
        ``(B, C, *S)``. ``nearest`` and ``label`` keep the dtype and the set of values exactly. The other modes keep
        a floating dtype and return float32 (float64 with a float64 field) for integers and bools.

    Raises:
        TypeError: ``ddf`` is not a floating tensor.
        ValueError: shapes, mode or padding mode do not fit.
    """
    dims = check_ddf(ddf, "warp")
    if not isinstance(image, Tensor) or image.ndim != dims + 2:
        raise ValueError(f"warp: image must have shape (B, C, *S) with {dims} spatial axes, got {_shape(image)}.")
    check_same_grid(image, ddf, "warp", ("image", "ddf"))
    check_modes(mode, padding_mode, dims, "warp")
    _check_real(image)
    dtype = field_dtype(ddf, image)
    if samples_on_grid(image, mode):
        return sample_on_grid(image, sampling_grid(ddf.to(dtype)), mode, padding_mode)
    coordinates = ddf.to(dtype) + identity_grid(ddf.shape[2:], device=ddf.device, dtype=dtype)
    return sample(image, coordinates, mode, padding_mode)


def samples_on_grid(image: Tensor, mode: Mode) -> bool:
    """Whether ``sample_on_grid`` serves an image: not the votes of ``label``, nor integers that float32 cannot hold."""
    return mode in ("bilinear", "bicubic") or (mode == "nearest" and image.dtype in _FLOAT32_HOLDS)


def sample_on_grid(image: Tensor, grid: Tensor, mode: Mode, padding_mode: PaddingMode) -> Tensor:
    """``sample`` with coordinates as ``sampling_grid`` lays them out, for what ``samples_on_grid`` allows.

    Args:
        image: ``(B, C, *S)``, real.
        grid: ``(B, *T, D)`` in [-1, 1], last array axis first, of the type to compute in. Either batch size may be 1.
        mode: ``bilinear``, ``bicubic`` or ``nearest``.
        padding_mode: as in ``warp``.

    Returns:
        ``(B, C, *T)``, dtype as in ``warp``.
    """
    batch = max(len(image), len(grid))
    image, grid = image.expand(batch, *image.shape[1:]), grid.expand(batch, *grid.shape[1:])
    out = F.grid_sample(image.to(grid.dtype), grid, mode=mode, padding_mode=padding_mode, align_corners=True)
    return out.to(image.dtype) if image.is_floating_point() or mode == "nearest" else out


def sample(image: Tensor, coordinates: Tensor, mode: Mode = "bilinear", padding_mode: PaddingMode = "border") -> Tensor:
    """Values of an image at voxel coordinates: ``sampled(y) = image(coordinates(y))``.

    Args:
        image: ``(B, C, *S)``.
        coordinates: ``(B, D, *T)`` voxel coordinates in the image; ``T`` has as many axes as ``S``.
        mode: as in ``warp``.
        padding_mode: as in ``warp``.

    Returns:
        ``(B, C, *T)``, dtype as in ``warp``.

    Raises:
        TypeError: a complex image.
        ValueError: batch sizes that do not fit, unknown mode or padding mode, or ``bicubic`` outside 2D.
    """
    check_modes(mode, padding_mode, image.ndim - 2, "warp")
    _check_real(image)
    if image.shape[0] != coordinates.shape[0] and 1 not in (image.shape[0], coordinates.shape[0]):
        raise ValueError(
            f"sample: batch sizes of image and coordinates must be equal or 1, got {image.shape[0]} and "
            f"{coordinates.shape[0]}."
        )
    if samples_on_grid(image, mode):
        grid = to_grid_sample(coordinates.to(field_dtype(image, coordinates)), image.shape[2:])
        return sample_on_grid(image, grid, mode, padding_mode)
    batch = max(image.shape[0], coordinates.shape[0])
    image = image.expand(batch, *image.shape[1:])
    coordinates = coordinates.expand(batch, *coordinates.shape[1:])
    if mode == "nearest":
        return _nearest(image, coordinates, padding_mode)
    from monai_drdm.fields.labels import sample_labels

    return sample_labels(image, coordinates, padding_mode)


def _check_real(image: Tensor) -> None:
    if image.is_complex():
        raise TypeError(f"warp: image must be real, got {image.dtype}. Warp real and imaginary part as two channels.")


def check_modes(mode: str, padding_mode: str, spatial_dims: int, function: str) -> None:
    """Raise ``ValueError`` unless both modes are known and fit the number of spatial dimensions."""
    if mode not in get_args(Mode):
        raise ValueError(f"{function}: mode must be one of {get_args(Mode)}, got {mode!r}.")
    if padding_mode not in get_args(PaddingMode):
        raise ValueError(f"{function}: padding_mode must be one of {get_args(PaddingMode)}, got {padding_mode!r}.")
    if mode == "bicubic" and spatial_dims != 2:
        raise ValueError(f"{function}: mode 'bicubic' exists in 2D only, got {spatial_dims}D data. Use 'bilinear'.")


def fold_coordinates(coordinates: Tensor, size: int, padding_mode: PaddingMode) -> Tensor:
    """Bring one axis of coordinates into ``[0, size - 1]`` (``zeros`` leaves them as they are)."""
    if padding_mode == "zeros":
        return coordinates
    if padding_mode == "reflection" and size > 1:
        period = 2.0 * (size - 1)
        wrapped = torch.remainder(coordinates, period)
        return torch.minimum(wrapped, period - wrapped)
    return coordinates.clamp(0, size - 1)


def gather_voxels(image: Tensor, index: Tensor, padding_mode: PaddingMode) -> Tensor:
    """Values of an image at integer coordinates, whatever its dtype.

    Args:
        image: ``(B, C, *S)``.
        index: ``(B, D, N)`` int64 coordinates; those outside read 0 under ``zeros`` and the edge otherwise.
        padding_mode: as in ``warp``.

    Returns:
        ``(B, C, N)`` of the image's dtype.
    """
    flat = torch.zeros_like(index[:, 0])
    inside = torch.ones_like(flat, dtype=torch.bool)
    for d, size in enumerate(image.shape[2:]):
        clamped = index[:, d].clamp(0, size - 1)
        if padding_mode == "zeros" and size > 1:
            inside &= clamped == index[:, d]
        flat = flat * size + clamped
    bits = image.flatten(2)
    bits = bits.view(_SIGNED_VIEW[image.dtype]) if image.dtype in _SIGNED_VIEW else bits
    out = torch.gather(bits, 2, flat[:, None].expand(-1, image.shape[1], -1))
    if padding_mode == "zeros":
        out = out.masked_fill(~inside[:, None], 0)
    return out.view(image.dtype)


def _nearest(image: Tensor, coordinates: Tensor, padding_mode: PaddingMode) -> Tensor:
    axes = [fold_coordinates(coordinates[:, d], size, padding_mode) for d, size in enumerate(image.shape[2:])]
    index = torch.stack(axes, dim=1).round().long().flatten(2)
    return gather_voxels(image, index, padding_mode).reshape(*image.shape[:2], *coordinates.shape[2:])


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
    from monai_drdm.fields.invert import solve_fixed_point

    dims = check_ddf(ddf, "warp_points")
    if not isinstance(points, Tensor) or points.ndim != 3 or points.shape[-1] != dims:
        raise ValueError(f"warp_points: points must have shape (B, N, {dims}), got {_shape(points)}.")
    dtype = field_dtype(ddf, points)
    target = points.to(dtype).transpose(1, 2)
    target = target.reshape(*target.shape, *(1,) * (dims - 1))  # (B, D, N, 1[, 1])
    solution = solve_fixed_point(ddf.to(dtype), target, iterations, tolerance)
    return (target + solution.ddf).flatten(2).transpose(1, 2)


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
