"""Warping images and labels by one field."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_drdm.fields import warp
from monai_drdm.fields.grid import field_dtype, sampling_grid
from monai_drdm.fields.sampling import check_modes, Mode, PaddingMode, sample_on_grid, samples_on_grid


class FieldWarper:
    """Warps several images by the same fields. Where they are sampled is computed only once.

    Args:
        ddf: ``(B, D, *S)`` voxels.
    """

    def __init__(self, ddf: Tensor) -> None:
        self.ddf = ddf
        self._grids: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, image: Tensor, mode: Mode = "bilinear", padding_mode: PaddingMode = "border") -> Tensor:
        """``warped(x) = image(x + ddf(x))``.

        Args:
            image: ``(B, C, *S)``, on any device.
            mode: as in ``monai_drdm.fields.warp``.
            padding_mode: as in ``monai_drdm.fields.warp``.

        Returns:
            ``(B, C, *S)`` on the image's device.
        """
        check_modes(mode, padding_mode, image.ndim - 2, "warp")
        if not samples_on_grid(image, mode):
            return warp(image, self.ddf.to(image.device), mode, padding_mode)
        key = image.device, field_dtype(self.ddf, image)
        if key not in self._grids:
            self._grids[key] = sampling_grid(self.ddf.to(*key))
        return sample_on_grid(image, self._grids[key], mode, padding_mode)


def is_interpolated(image: Tensor, mode: Mode) -> bool:
    """Whether a mode interpolates values that the image's type cannot hold. Integers then become float32."""
    return mode in ("bilinear", "bicubic") and not image.is_floating_point()


def unmoved(image: Tensor, mode: Mode) -> Tensor:
    """The image of a call that moves nothing, in the type that a moved one has, so that batches can be collated."""
    return image.to(torch.float32) if is_interpolated(image, mode) else image
