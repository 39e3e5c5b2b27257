"""How alike two images are, voxel by voxel: local normalised cross-correlation, without convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FLAT = 1e-5
"""Variances in a window count as at least this."""


class LocalCorrelation:
    """The squared local normalised cross-correlation of other images with one, within windows around every voxel.

    The values are those of MONAI's ``LocalNormalizedCrossCorrelationLoss``, with the other sign. Windows continue as
    zeros beyond the border. What concerns the fixed image alone is computed once.

    Args:
        fixed: ``(B, 1, *S)``.
        window: voxels along each side of a window, odd.
    """

    def __init__(self, fixed: Tensor, window: int) -> None:
        self.fixed, self.window = fixed, window
        self.size = window ** (fixed.ndim - 2)
        self.sum, squares = self._in_windows(fixed, fixed * fixed)
        self.variance = (squares - self.sum * self.sum / self.size).clamp(min=_FLAT)

    def __call__(self, moved: Tensor) -> Tensor:
        """``(B, 1, *S)`` in [0, 1], up to rounding: 1 where windows are alike up to brightness and contrast."""
        sums, squares, products = self._in_windows(moved, moved * moved, moved * self.fixed)
        shared = products - sums * self.sum / self.size
        variance = (squares - sums * sums / self.size).clamp(min=_FLAT)
        alike: Tensor = shared * shared / (variance * self.variance)
        return alike

    def mean(self, moved: Tensor, seen: Tensor) -> Tensor:
        """The mean over all :meth:`whole` windows, 0 if there are none."""
        whole = self.whole(seen).to(moved.dtype)
        return (self(moved) * whole).sum() / whole.sum().clamp(min=1.0)

    def whole(self, seen: Tensor) -> Tensor:
        """Around which voxels windows are without a voxel that is not ``seen``, a mask of the shape of the images."""
        return box_sum(1.0 - seen.to(self.fixed.dtype), self.window) < 0.5

    def _in_windows(self, *images: Tensor) -> tuple[Tensor, ...]:
        return box_sum(torch.cat(images, dim=1), self.window).chunk(len(images), dim=1)


def box_sum(values: Tensor, window: int) -> Tensor:
    """The sums of ``(B, C, *S)`` over a window around every voxel, which continue as zeros beyond the border.

    Differentiable. Shifted copies are added axis by axis, which is several times faster than convolutions on a CPU.

    Args:
        values: ``(B, C, *S)``.
        window: voxels along each side of the window, odd.
    """
    out: Tensor = _BoxSum.apply(values, window)  # type: ignore[no-untyped-call]
    return out


class _BoxSum(torch.autograd.Function):
    """Sums over a window; as a linear map it is its own transpose."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, window: int) -> Tensor:
        """Add up the neighbours within the window."""
        ctx.window = window
        return _add_neighbours(values, window // 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Add up the gradients within the window."""
        return _add_neighbours(grads[0], ctx.window // 2), None


def _add_neighbours(values: Tensor, reach: int) -> Tensor:
    for axis, size in enumerate(values.shape[2:], 2):
        total = values.clone()
        for step in range(1, min(reach, size - 1) + 1):
            total.narrow(axis, 0, size - step).add_(values.narrow(axis, step, size - step))
            total.narrow(axis, step, size - step).add_(values.narrow(axis, 0, size - step))
        values = total
    return values
