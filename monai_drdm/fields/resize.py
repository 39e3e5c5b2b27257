"""Changing the grid of fields and images, and smoothing them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_drdm.fields.grid import check_ddf, field_dtype

_LINEAR = {2: "bilinear", 3: "trilinear"}


def resize_ddf(ddf: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample a field to another grid over the same extent; its vectors are scaled to voxels of the new grid.

    Args:
        ddf: ``(B, D, *S)`` voxels of its grid.
        shape: the new spatial shape.

    Returns:
        ``(B, D, *shape)`` voxels of the new grid.

    Raises:
        ValueError: wrong number of axes, or sizes below 1.
    """
    dims = check_ddf(ddf, "resize_ddf")
    shape = _check_shape(shape, dims, "resize_ddf")
    if shape == tuple(ddf.shape[2:]):
        return ddf
    scale = [(new - 1) / (old - 1) if old > 1 and new > 1 else new / old for old, new in zip(ddf.shape[2:], shape)]
    ddf = ddf.to(field_dtype(ddf))
    factors = _constants(tuple(scale), ddf.device, ddf.dtype).view(1, -1, *(1,) * dims)
    return _linear(ddf * factors, shape)


def resize_image(image: Tensor, shape: Sequence[int]) -> Tensor:
    """Resample an image linearly to another grid over the same extent; axes that become shorter are smoothed first.

    Args:
        image: ``(B, C, *S)`` floating.
        shape: the new spatial shape.

    Returns:
        ``(B, C, *shape)``.

    Raises:
        TypeError: not a floating image.
        ValueError: wrong number of axes, or sizes below 1.
    """
    if not image.is_floating_point():
        raise TypeError(f"resize_image: image must be floating, got {image.dtype}.")
    shape = _check_shape(shape, image.ndim - 2, "resize_image")
    if shape == tuple(image.shape[2:]):
        return image
    sigma = [max(0.0, (old / new - 1) / 2) for old, new in zip(image.shape[2:], shape)]
    return _linear(gaussian_smooth(image, sigma), shape)


def crop(tensor: Tensor, shape: Sequence[int], *, centre: bool = False) -> Tensor:
    """The first, or the central, ``shape`` voxels of ``(B, C, *S)``."""
    for axis, size in enumerate(shape):
        start = (tensor.shape[axis + 2] - size) // 2 if centre else 0
        tensor = tensor.narrow(axis + 2, start, size)
    return tensor


def gaussian_smooth(tensor: Tensor, sigma: float | Sequence[float]) -> Tensor:
    """Separable Gaussian smoothing; beyond the border the border value continues.

    Args:
        tensor: ``(B, C, *S)`` floating.
        sigma: standard deviation in voxels, one or one per axis; 0 leaves an axis alone.

    Returns:
        ``(B, C, *S)`` of the same dtype.

    Raises:
        ValueError: a negative sigma or a wrong number of them.
    """
    dims = tensor.ndim - 2
    sigmas = list(sigma) if isinstance(sigma, Sequence) else [float(sigma)] * dims
    if len(sigmas) != dims or not all(s >= 0 for s in sigmas):
        raise ValueError(f"gaussian_smooth: sigma must be one number or {dims} of them, 0 or more, got {sigma}.")
    for axis, s in enumerate(sigmas):
        if s > 0 and tensor.shape[axis + 2] > 1:
            tensor = _smooth_axis(tensor, axis + 2, s)
    return tensor


@lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Constants on a device. They are cached, because copying them to a device makes the host wait for it."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device, dtype=dtype)


def _smooth_axis(tensor: Tensor, dim: int, sigma: float) -> Tensor:
    radius = max(1, math.ceil(3 * sigma))
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
    total = sum(weights)
    length = tensor.shape[dim]
    index = torch.arange(-radius, length + radius, device=tensor.device).clamp(0, length - 1)
    padded = tensor.index_select(dim, index)
    out = torch.zeros_like(tensor)
    for k, weight in enumerate(weights):
        out.add_(padded.narrow(dim, k, length), alpha=weight / total)
    return out


def _linear(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return F.interpolate(tensor, shape, mode=_LINEAR[len(shape)], align_corners=True)


def _check_shape(shape: Sequence[int], dims: int, function: str) -> tuple[int, ...]:
    sizes = tuple(int(s) for s in shape)
    if len(sizes) != dims or min(sizes) < 1:
        raise ValueError(f"{function}: shape must have {dims} sizes of 1 or more, got {tuple(shape)}.")
    return sizes
