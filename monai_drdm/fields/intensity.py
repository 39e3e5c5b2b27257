"""Samples of the voxels of an image, and the range in which its intensities lie."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_PERCENTILES = (0.005, 0.995)
_QUANTILE_SAMPLES = 1 << 20  # enough for a percentile; torch.quantile takes at most 2^24 values
_SAMPLES_PER_PLANE = 4


def spread_voxels(image: Tensor, count: int) -> Tensor:
    """Some values of each image, spread over it so that no row, column or plane is left out.

    Every n-th value is taken, with the smallest n from ``values / count`` on that has no common divisor with a side of
    the image and of which every plane across every axis gets a value. Planes may be left out only along axes so long
    that there are fewer than 4 samples for each of their planes.

    Args:
        image: ``(B, C, *S)``, any dtype.
        count: how many values; there may be somewhat fewer, and up to twice as many.

    Returns:
        ``(B, N)`` of the same dtype.
    """
    return image.flatten(1)[:, :: _stride(tuple(image.shape[1:]), count)]


def robust_range(image: Tensor) -> tuple[Tensor, Tensor]:
    """The 0.5th and the 99.5th percentile of each image, of large ones from some 10⁶ of their voxels.

    Where both are equal, as in an image that is mostly empty, minimum and maximum are taken instead.

    Args:
        image: ``(B, C, *S)``, floating.

    Returns:
        Two tensors ``(B, 1, …)`` with as many axes as the image.
    """
    some = spread_voxels(image, _QUANTILE_SAMPLES)
    low, high = -_upper_quantile(-some, 1 - _PERCENTILES[0]), _upper_quantile(some, _PERCENTILES[1])
    flatline, flat = low >= high, image.flatten(1)
    low = torch.where(flatline, flat.amin(dim=1), low)
    high = torch.where(flatline, flat.amax(dim=1), high)
    form = (-1, *(1,) * (image.ndim - 1))
    return low.view(form), high.view(form)


def to_unit_range(image: Tensor) -> Tensor:
    """Scale the robust range of each image ``(B, C, *S)`` to [0, 1] and clip what is outside; a constant becomes 0."""
    low, high = robust_range(image)
    width = torch.where(high > low, high - low, torch.ones_like(low))
    return ((image - low) / width).clamp(0.0, 1.0)


@lru_cache(maxsize=256)
def _stride(shape: tuple[int, ...], count: int) -> int:
    """Which n it is that ``spread_voxels`` takes, for images of shape ``(C, *S)``."""
    stride = max(1, math.prod(shape) // count)
    # a stride with a common divisor would select voxels of some slices only
    while any(math.gcd(stride, n) > 1 for n in shape[1:]) or not _meets_all_planes(shape, stride):
        stride += 1
    return stride


def _meets_all_planes(shape: tuple[int, ...], stride: int) -> bool:
    """Whether a stride meets every plane across every axis but the last, of which it meets all anyway."""
    total, inner = math.prod(shape), math.prod(shape[1:])
    for n in shape[1:-1]:
        inner //= n
        # a stride within one plane passes no plane by
        if stride > inner and n * _SAMPLES_PER_PLANE <= total // stride:
            met = torch.arange(0, total, stride) // inner % n
            if bool((torch.bincount(met, minlength=n) == 0).any()):
                return False
    return True


def _upper_quantile(values: Tensor, share: float) -> Tensor:
    """``torch.quantile(values, share, dim=1)`` for shares near 1, without sorting all values."""
    position = share * (values.shape[1] - 1)
    above = values.shape[1] - math.floor(position)
    lower, upper = values.topk(above, dim=1).values[:, [above - 1, max(above - 2, 0)]].unbind(dim=1)
    return torch.lerp(lower, upper, position - math.floor(position))
