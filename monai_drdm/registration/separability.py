"""Motion separability: how differently near points move in a field, and how differently a network can move them.

Zheng et al., Residual aligner-based network (RAN): motion-separable structure for coarse-to-fine discontinuous
deformable registration, Medical Image Analysis 91 (2024) 103038, arXiv 2203.04290.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_drdm.fields.grid import check_ddf


def motion_separability(
    ddf: Tensor,
    distances: Sequence[float],
    *,
    regions: Tensor | None = None,
    spacing: Sequence[float] | None = None,
) -> Tensor:
    """The largest difference of displacement between two points at most ``p`` apart, for several ``p``.

    ``Δ(p) = max |u_d(x) - u_d(y)|`` over components ``d`` and points with ``max_d |x_d - y_d| <= p``. Each distance
    costs a running maximum and minimum along every axis, O(N), however large it is.

    Args:
        ddf: ``(B, D, *S)`` voxels.
        distances: ``p``, 0 or more, in voxels, or in mm with ``spacing``.
        regions: ``(B, 1, *S)`` or ``(1, 1, *S)`` labels: of the two points one is then in region 1, the other in
            region 2.
        spacing: mm per voxel along each axis; displacements and distances are then in mm.

    Returns:
        ``(B, len(distances))``; NaN where no two points of the regions are so near.

    Raises:
        TypeError: ``ddf`` is not a floating tensor.
        ValueError: distances that are negative, infinite or none, or shapes that do not fit.
    """
    dims = check_ddf(ddf, "motion_separability")
    distances = [float(p) for p in distances]
    if not distances or not all(0 <= p < math.inf for p in distances):
        raise ValueError(f"motion_separability: distances must be one or more numbers of 0 or more, got {distances}.")
    steps = (1.0,) * dims if spacing is None else tuple(float(s) for s in spacing)
    if len(steps) != dims or min(steps) <= 0:
        raise ValueError(f"motion_separability: spacing must be {dims} positive numbers, got {spacing}.")
    if regions is not None and (
        regions.ndim != dims + 2
        or regions.shape[1] != 1
        or regions.shape[0] not in (1, ddf.shape[0])
        or regions.shape[2:] != ddf.shape[2:]
    ):
        raise ValueError(
            f"motion_separability: regions must have shape ({ddf.shape[0]}, 1, *{tuple(ddf.shape[2:])}), got "
            f"{tuple(regions.shape)}."
        )
    moved = ddf.detach() * ddf.new_tensor(steps).view(1, -1, *(1,) * dims)
    found = []
    for p in distances:
        reach = [math.floor(p / step + 1e-9) for step in steps]
        found.append(_range(moved, reach) if regions is None else _between(moved, regions, reach))
    return torch.stack(found, dim=1)


def _range(moved: Tensor, reach: Sequence[int]) -> Tensor:
    """``(B,)`` largest spread of values in any box of points that are within reach of each other."""
    high, low = moved, -moved
    for axis, cells in enumerate(reach):
        high, low = (_running_maximum(one, axis + 2, min(cells + 1, moved.shape[axis + 2])) for one in (high, low))
    return (high + low).flatten(1).amax(dim=1)


def _between(moved: Tensor, regions: Tensor, reach: Sequence[int]) -> Tensor:
    """``(B,)`` largest difference between a point of region 1 and one of region 2 within reach; NaN without any."""
    first, second = regions == 1, regions == 2
    best = moved.new_full((moved.shape[0],), -math.inf)
    for sign in (1.0, -1.0):
        around = (sign * moved).masked_fill(~second, -math.inf)
        for axis, cells in enumerate(reach):
            cells = min(cells, moved.shape[axis + 2] - 1)
            pad = [0] * (2 * (moved.ndim - axis - 3)) + [cells, cells]  # F.pad counts axes from the last
            around = _running_maximum(F.pad(around, pad, value=-math.inf), axis + 2, 2 * cells + 1)
        apart = (around - sign * moved).masked_fill(~first, -math.inf)
        best = torch.maximum(best, apart.flatten(1).amax(dim=1))
    return best.masked_fill(best == -math.inf, math.nan)


def _running_maximum(values: Tensor, dim: int, width: int) -> Tensor:
    """Maximum of every ``width`` neighbours along an axis, in three passes (van Herk 1992): ``width - 1`` fewer."""
    if width == 1:
        return values
    values = values.movedim(dim, -1)
    length = values.shape[-1]
    padded = F.pad(values, [0, -length % width], value=-math.inf)
    blocks = padded.reshape(*padded.shape[:-1], -1, width)
    before = blocks.cummax(dim=-1).values.flatten(-2)
    after = blocks.flip(-1).cummax(dim=-1).values.flip(-1).flatten(-2)
    return torch.maximum(after[..., : length - width + 1], before[..., width - 1 : length]).movedim(-1, dim)


class SeparabilityBound(NamedTuple):
    """A staircase: what the structure of a network allows near points to differ by, at most."""

    starts: tuple[int, ...]
    """Distances in voxels at which the stairs begin."""
    plateaus: tuple[int, ...]
    """Their heights, in voxels."""

    def at(self, distance: float) -> int:
        """The bound ``Δ(p)`` of points ``distance`` voxels apart; 0 below the first stair."""
        stair = bisect_right(self.starts, distance)
        return self.plateaus[stair - 1] if stair else 0


def separability_bound(
    pool_sizes: Sequence[int], *, dilations: Sequence[int], convolutions: int = 2
) -> SeparabilityBound:
    """The upper bound of motion separability that a coarse-to-fine registration network has by its structure.

    Level ``k`` sees ``p_k``-fold pooled features and looks ``r_k`` of them far: stacked convolutions of size 3 look as
    far as their dilations in sum. So it can displace by ``a_k = p_k r_k``. Points that share all levels coarser than
    ``k''`` differ by no more than what is left: ``Δ(p) = Σ_{k ≥ k''} 2 a_k`` for
    ``p_{k''} + Σ_{k > k''} a_k ≤ p < p_{k''-1} + Σ_{k ≥ k''} a_k``.

    The thresholds are those of the paper's figure; the formula in its appendix is printed with another one.

    Args:
        pool_sizes: ``p_k`` of each level, coarse to fine.
        dilations: of the convolutions with which each level compares both images, coarse to fine.
        convolutions: how many of them a level stacks: two in ``ResidualAlignerNet``.

    Returns:
        The staircase.

    Raises:
        ValueError: different numbers of pool sizes and dilations, none, numbers below 1, or pool sizes that grow.
    """
    pools, reaches = list(pool_sizes), [dilation * convolutions for dilation in dilations]
    whole = all(isinstance(one, int) and one >= 1 for one in (*pools, *dilations, convolutions))
    if not pools or len(pools) != len(reaches) or not whole:
        raise ValueError(
            f"separability_bound: pool_sizes and dilations must be as many numbers of 1 or more, and convolutions 1 or "
            f"more, got {pools}, {list(dilations)} and {convolutions}."
        )
    if any(coarse < fine for coarse, fine in pairwise(pools)):
        raise ValueError(f"separability_bound: levels must be ordered coarse to fine, got pool_sizes {pools}.")
    accessible = [p * r for p, r in zip(reversed(pools), reversed(reaches))]  # fine to coarse
    sums = list(accumulate(accessible))
    starts = [p + below for p, below in zip(reversed(pools), [0, *sums])]
    return SeparabilityBound(tuple(starts), tuple(2 * total for total in sums))
