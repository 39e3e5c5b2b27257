"""MONAI's elastic deformation as a displacement field, for comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from monai.transforms import Rand2DElastic, Rand3DElastic
from torch import Tensor

from monai_drdm.fields import identity_grid


def elastic_field(shape: Sequence[int], magnitude: float, seed: int) -> Tensor:
    """A random elastic field ``(1, D, *S)`` in voxels, with eight nodes a side in 2D and smoothed in 3D.

    In 2D, MONAI interpolates positions instead of displacements, and its interpolation bends straight lines: points
    move by up to a twentieth of the distance of nodes, in the same ripple every time, even at magnitude 0. The ripple
    is taken off here.
    """
    grid = identity_grid(shape)
    moved = [_moved(grid, magnitude, seed), _moved(grid, 0.0, seed) if len(shape) == 2 else grid]
    return (moved[0] - moved[1])[None]


def _moved(grid: Tensor, magnitude: float, seed: int) -> Tensor:
    shape = tuple(grid.shape[1:])
    options: dict[str, Any] = {"magnitude_range": (magnitude, magnitude), "prob": 1.0, "padding_mode": "border"}
    elastic = (
        Rand2DElastic(spacing=tuple(n / 8 for n in shape), **options)
        if len(shape) == 2
        else Rand3DElastic(sigma_range=(5, 7), **options)
    )
    return torch.as_tensor(elastic.set_random_state(seed % 2**32)(grid)).as_subclass(Tensor)
