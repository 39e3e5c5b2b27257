"""Where two images push each other: what the demons of Thirion (Medical Image Analysis 2, 1998) would do next."""

from __future__ import annotations

import torch
from torch import Tensor

from monai_drdm.fields import gaussian_smooth

WIDTHS = (0.0, 1.0, 2.0, 3.0)
"""Standard deviations, in voxels, of the smoothing before forces are computed: the wider, the farther they look."""
GAIN = 4.0
"""Forces of half a voxel at most, brought to the size of what else a network sees."""
_FLAT = 1e-3


def demons_forces(moving: Tensor, fixed: Tensor) -> Tensor:
    """Steps towards ``moving(x + u) = fixed(x)``, voxel by voxel, from images smoothed to several widths.

    ``u = (f - m) g / (|g|² + (f - m)² + ε)``, with ``g`` the mean gradient of both images.

    Args:
        moving: ``(B, 1, *S)`` in [0, 1].
        fixed: ``(B, 1, *S)`` in [0, 1].

    Returns:
        ``(B, 4 D, *S)``: for every width the components of ``u`` in voxels, none longer than half a voxel.
    """
    axes, found = list(range(2, moving.ndim)), []
    for width in WIDTHS:
        a, b = (gaussian_smooth(one, width) for one in (moving, fixed))
        gradient = torch.cat(torch.gradient((a + b) / 2, dim=axes), dim=1)
        apart = b - a
        found.append(apart * gradient / (gradient.square().sum(dim=1, keepdim=True) + apart.square() + _FLAT))
    return torch.cat(found, dim=1)
