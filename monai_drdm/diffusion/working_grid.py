"""The grid that a network works on, and resampling of images to it and of fields from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from monai_drdm.fields import resize_ddf, resize_image
from monai_drdm.fields.intensity import to_unit_range


@dataclass(frozen=True)
class WorkingGrid:
    """A grid over the extent of an image, whose longest physical side has the working size of the network.

    The other sides keep their proportion. An axis of 2 voxels or more keeps at least 2, because displacements along an
    axis of one voxel would have no scale.
    """

    full_shape: tuple[int, ...]
    shape: tuple[int, ...]
    """Spatial shape of the working grid."""
    spacing: tuple[float, ...]
    """Spacing of the working grid, in the units of the image's."""

    @classmethod
    def of(cls, shape: Sequence[int], spacing: Sequence[float], working_size: int, *, odd: bool = False) -> WorkingGrid:
        """The working grid of an image.

        Args:
            shape: spatial shape of the image.
            spacing: mm per voxel along each axis.
            working_size: voxels along the longest physical side.
            odd: make all sizes odd, for networks that use the half grid, which keeps both ends.

        Raises:
            ValueError: shape and spacing do not fit, or are not positive.
        """
        shape, spacing = tuple(int(n) for n in shape), tuple(float(s) for s in spacing)
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"shape must be 2 or 3 sizes of 1 or more, got {shape}.")
        if len(spacing) != len(shape) or not all(0 < s < math.inf for s in spacing):
            raise ValueError(f"spacing must be {len(shape)} positive numbers in mm, got {spacing}.")
        # the extent is from centre to centre of the outer voxels, so that working voxels are isotropic on thin axes too
        extent = [(n - 1) * s for n, s in zip(shape, spacing)]
        step = max(extent) / max(working_size - 1, 1)
        every = 2 if odd else 1
        work = tuple(every * max(round(e / step / every), 1) + 1 if n > 1 else 1 for n, e in zip(shape, extent))
        work_spacing = tuple(e / (w - 1) if n > 1 else s for n, s, e, w in zip(shape, spacing, extent, work))
        return cls(shape, work, work_spacing)

    def image_to_working(self, image: Tensor, input_range: tuple[float, float]) -> Tensor:
        """Resample images ``(B, C, *full)`` to the working grid and scale them to the network's intensity range.

        The 0.5th and 99.5th percentiles of each sample are mapped to the ends of the range and intensities outside are
        clipped. A constant image is mapped to the lower end. Returns float32 ``(B, C, *S)``.
        """
        unit = resize_image(to_unit_range(image.to(torch.float32)), self.shape)
        return unit * (input_range[1] - input_range[0]) + input_range[0]

    def ddf_to_full(self, ddf: Tensor) -> Tensor:
        """Resize a field ``(B, D, *G)`` over the same extent to the grid of the image, in voxels of that grid."""
        return self._resized(ddf, self.full_shape)

    def ddf_to_compact(self, ddf: Tensor) -> Tensor:
        """Resize a field ``(B, D, *G)`` to the coarser of its own grid and the grid of the image, axis by axis."""
        return self._resized(ddf, [min(sizes) for sizes in zip(ddf.shape[2:], self.full_shape)])

    def _resized(self, ddf: Tensor, shape: Sequence[int]) -> Tensor:
        """Resize a field; along axes where the image has one voxel the displacement is set to 0."""
        moves = torch.tensor([n > 1 for n in self.full_shape], device=ddf.device)
        return resize_ddf(ddf, shape) * moves.view(1, -1, *(1,) * len(shape))
