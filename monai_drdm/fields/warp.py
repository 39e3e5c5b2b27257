"""Warping images and label maps through displacement fields."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from monai_drdm.fields.grid import (
    check_ddf,
    check_same_grid,
    field_dtype,
    identity_grid,
    sampling_grid,
    to_grid_sample,
)
from monai_drdm.fields.labels import sample_labels
from monai_drdm.fields.sampling import check_modes, Mode, PaddingMode, sample_nearest, sample_on_grid, samples_on_grid


def warp(image: Tensor, ddf: Tensor, mode: Mode = "bilinear", padding_mode: PaddingMode = "border") -> Tensor:
    """``warped(x) = image(x + ddf(x))``.

    Args:
        image: ``(B, C, *S)``, any dtype.
        ddf: ``(B, D, *S)`` voxels. Either batch size may be 1.
        mode: ``bilinear`` (trilinear in 3D), ``nearest``, ``bicubic`` (2D only) or ``label`` (see ``warp_labels``).
        padding_mode: how the image continues beyond its grid: ``border``, ``zeros`` or ``reflection``.

    Returns:
        ``(B, C, *S)``. ``nearest`` and ``label`` keep the dtype and the set of values exactly. The other modes keep
        a floating dtype and return float32 (float64 with a float64 field) for integers and bools.

    Raises:
        TypeError: ``ddf`` is not a floating tensor.
        ValueError: shapes, mode or padding mode do not fit.
    """
    dims = check_ddf(ddf, "warp")
    if not isinstance(image, Tensor) or image.ndim != dims + 2:
        got = str(tuple(image.shape)) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"warp: image must have shape (B, C, *S) with {dims} spatial axes, got {got}.")
    check_same_grid(image, ddf, "warp", ("image", "ddf"))
    check_modes(mode, padding_mode, dims, "warp")
    _check_real(image, "warp")
    dtype = field_dtype(ddf, image)
    if samples_on_grid(image, mode):
        return sample_on_grid(image, sampling_grid(ddf.to(dtype)), mode, padding_mode)
    coordinates = ddf.to(dtype) + identity_grid(ddf.shape[2:], device=ddf.device, dtype=dtype)
    return sample(image, coordinates, mode, padding_mode)


def warp_labels(
    label: Tensor,
    ddf: Tensor,
    mode: Literal["nearest", "label"] = "label",
    padding_mode: PaddingMode = "border",
) -> Tensor:
    """Warp a label map so that the result holds no label id that the map does not hold.

    ``label`` mode interpolates the indicator of every class linearly and keeps the class with the largest value; of
    equal classes the smallest id wins. Only the 2^D classes at the corners of a sampling cell can win, so the cost does
    not depend on the number of classes, and no volume per class is ever built.

    Args:
        label: ``(B, C, *S)``, any dtype with integer values.
        ddf: ``(B, D, *S)`` voxels.
        mode: ``nearest`` or ``label``.
        padding_mode: as in ``warp``; ``zeros`` gives id 0 outside the map.

    Returns:
        ``(B, C, *S)`` of the dtype of ``label``.

    Raises:
        ValueError: another mode, or shapes that do not fit.
    """
    if mode not in ("nearest", "label"):
        raise ValueError(f"warp_labels: mode must be 'nearest' or 'label', got {mode!r}.")
    return warp(label, ddf, mode, padding_mode)


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
    check_modes(mode, padding_mode, image.ndim - 2, "sample")
    _check_real(image, "sample")
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
    method = sample_nearest if mode == "nearest" else sample_labels
    return method(image, coordinates, padding_mode)


def _check_real(image: Tensor, function: str) -> None:
    if image.is_complex():
        raise TypeError(
            f"{function}: image must be real, got {image.dtype}. Give real and imaginary part as two channels."
        )
