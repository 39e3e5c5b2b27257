"""Sampling images, labels and points through displacement fields."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_drdm.fields.grid import (
    check_ddf,
    check_same_grid,
    field_dtype,
    identity_grid,
    sampling_grid,
    shape_of,
    to_grid_sample,
)
from monai_drdm.fields.labels import sample_labels
from monai_drdm.fields.voxels import check_modes, fold_coordinates, gather_voxels, Mode, PaddingMode

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
        raise ValueError(f"warp: image must have shape (B, C, *S) with {dims} spatial axes, got {shape_of(image)}.")
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
    return sample_labels(image, coordinates, padding_mode)


def _check_real(image: Tensor) -> None:
    if image.is_complex():
        raise TypeError(f"warp: image must be real, got {image.dtype}. Warp real and imaginary part as two channels.")


def _nearest(image: Tensor, coordinates: Tensor, padding_mode: PaddingMode) -> Tensor:
    axes = [fold_coordinates(coordinates[:, d], size, padding_mode) for d, size in enumerate(image.shape[2:])]
    index = torch.stack(axes, dim=1).round().long().flatten(2)
    return gather_voxels(image, index, padding_mode).reshape(*image.shape[:2], *coordinates.shape[2:])


def warp_labels(
    label: Tensor,
    ddf: Tensor,
    mode: Literal["nearest", "label"] = "label",
    padding_mode: PaddingMode = "border",
) -> Tensor:
    """Warp a label map without inventing label ids.

    ``label`` mode interpolates the indicator of every class linearly and keeps the class with the largest value, ties
    going to the smallest id. Only the 2^D classes at the corners of a sampling cell can win, so the cost does not
    depend on the number of classes, and no per-class volume is ever built.

    Args:
        label: ``(B, C, *S)``, any dtype with integer values.
        ddf: ``(B, D, *S)`` voxels.
        mode: ``nearest`` or ``label``.
        padding_mode: ``zeros`` reads id 0 outside.

    Returns:
        ``(B, C, *S)`` of the dtype of ``label``.

    Raises:
        ValueError: another mode, or shapes that do not fit.
    """
    if mode not in ("nearest", "label"):
        raise ValueError(f"warp_labels: mode must be 'nearest' or 'label', got {mode!r}.")
    return warp(label, ddf, mode, padding_mode)
