"""Random multi-scale velocity fields (paper §3.2).

Gaussian noise is drawn on lattices whose spacing doubles from one to the next, with a strength in proportion to the
spacing. The lattices are interpolated linearly and summed. Numbers are drawn on the device of the given generators, one
generator per sample. With CPU generators the field of a sample depends on its seed only, not on the device or the rest
of the batch; training uses generators on its own device, which is faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CONTROL_SIZE = 64
"""Nodes per axis of the published control grid, which spans twice the image."""
SCALES = 4
"""Lattices summed: node spacings 1, 2, 4, 8."""
NODE_STD = 4e-5
"""Published standard deviation at the finest nodes, as a fraction of the control grid."""


def control_grid_velocity(generators: Sequence[torch.Generator], spatial_dims: int, std: float = NODE_STD) -> Tensor:
    """The published recipe: noise at 64, 32, 16, 8 nodes per axis with std ``std · (1, 2, 4, 8)``, summed at 64.

    Args:
        generators: one per sample; the field is made on their device.
        spatial_dims: 2 or 3.
        std: per-node standard deviation of the finest lattice, as a fraction of the control grid.

    Returns:
        ``(B, D, 64, …)`` fractions of the control grid.
    """
    size = (CONTROL_SIZE,) * spatial_dims
    mode = "bilinear" if spatial_dims == 2 else "trilinear"
    device = generators[0].device if generators else torch.device("cpu")
    total = torch.zeros(len(generators), spatial_dims, *size, dtype=torch.float32, device=device)
    for scale in range(SCALES):
        noise = draw_normal((spatial_dims, *(CONTROL_SIZE >> scale,) * spatial_dims), generators) * (std * 2**scale)
        total += F.interpolate(noise, size, mode=mode, align_corners=False)
    return total


def isotropic_velocity(
    generators: Sequence[torch.Generator],
    shape: Sequence[int],
    spacing: Sequence[float] | None = None,
    *,
    finest_node: float = 1 / 32,
    scales: int = SCALES,
) -> Tensor:
    """The spectrum of ``control_grid_velocity`` on nodes that are isotropic in millimetres, for any shape and spacing.

    Args:
        generators: one per sample; the field is made on their device.
        shape: spatial shape ``S``.
        spacing: mm per voxel along each axis; None is isotropic.
        finest_node: node spacing of the finest lattice as a fraction of the longest physical side; the default is
            the published one. Lattice ``k`` has ``2^k`` times the spacing and ``2^k`` times the strength.
        scales: number of lattices.

    Returns:
        ``(B, D, *S)`` velocities in voxels. Their strength is fixed: at the nodes of the finest lattice the standard
        deviation is 1/1000 of the longest physical side.

    Raises:
        ValueError: shape and spacing do not fit, or sizes are not positive.
    """
    dims = len(shape)
    spacing = [1.0] * dims if spacing is None else [float(s) for s in spacing]
    if dims not in (2, 3) or min(shape) < 1:
        raise ValueError(f"isotropic_velocity: shape must be 2 or 3 sizes of 1 or more, got {tuple(shape)}.")
    if len(spacing) != dims or not all(0 < s < math.inf for s in spacing):
        raise ValueError(f"isotropic_velocity: spacing must be {dims} positive numbers in mm, got {tuple(spacing)}.")
    longest = max(n * s for n, s in zip(shape, spacing))
    device = generators[0].device if generators else torch.device("cpu")
    total = torch.zeros(len(generators), dims, *shape, dtype=torch.float32, device=device)
    for scale in range(scales):
        node = longest * finest_node * 2**scale
        matrices = [_interpolation_matrix(n, s / node) for n, s in zip(shape, spacing)]
        lattice = draw_normal((dims, *(m.shape[1] for m in matrices)), generators)
        for axis, matrix in enumerate(matrices):
            with torch.autocast(device.type, enabled=False):
                lattice = torch.movedim(torch.movedim(lattice, axis + 2, -1) @ matrix.T.to(device), -1, axis + 2)
        total += lattice * 2**scale
    per_axis = torch.tensor([1e-3 * longest / s for s in spacing], dtype=torch.float32, device=device).view(
        1, dims, *(1,) * dims
    )
    return total * per_axis


def draw_normal(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normal numbers ``(B, *shape)``, sample ``b`` from ``generators[b]``."""
    normal = [torch.randn((1, *shape), generator=g, dtype=torch.float32, device=g.device) for g in generators]
    return torch.cat(normal)


def _interpolation_matrix(size: int, nodes_per_voxel: float) -> Tensor:
    """``(size, N)``: linear interpolation from N lattice nodes, centred on the axis, to ``size`` voxel centres."""
    # The number of nodes follows from the physical extent, so a finer grid of the same extent has the same lattice. It
    # is even, so that the centre lies between two nodes as in the published control grid.
    nodes = 2 * math.ceil(size / 2 * nodes_per_voxel - 1e-6) + 2
    position = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) * nodes_per_voxel + (nodes - 1) / 2
    weights = 1 - (position[:, None] - torch.arange(nodes, dtype=torch.float64)[None]).abs()
    return weights.clamp(min=0).float()
