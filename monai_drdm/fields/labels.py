"""Sampling label maps: a vote among neighbouring voxels that never makes a new label id."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from monai_drdm.fields.grid import field_dtype
from monai_drdm.fields.sampling import gather_voxels, PaddingMode, reachable_coordinates

_CHUNK = 1 << 19  # voxels per chunk; working memory does not grow with the volume
_SAME_BITS = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
"""Signed types of the same size for the unsigned ones, between which older versions of torch cannot choose."""


def sample_labels(label: Tensor, coordinates: Tensor, padding_mode: PaddingMode) -> Tensor:
    """Interpolate each class linearly at voxel coordinates and keep the largest (mode ``label`` of ``fields.warp``).

    Args:
        label: ``(B, C, *S)``, any dtype with integer values.
        coordinates: ``(B, D, *T)`` voxel coordinates in the label map.
        padding_mode: as in ``fields.warp``.

    Returns:
        ``(B, C, *T)`` of the dtype of ``label``.
    """
    flat = coordinates.to(field_dtype(coordinates)).flatten(2)
    chunks = [_vote(label, part, padding_mode) for part in torch.split(flat, _CHUNK, dim=2)]
    return torch.cat(chunks, dim=2).reshape(*label.shape[:2], *coordinates.shape[2:])


def _vote(label: Tensor, coordinates: Tensor, padding_mode: PaddingMode) -> Tensor:
    """The winning label ``(B, C, N)`` among the corners of each sampling cell, at ``(B, D, N)`` coordinates."""
    shape = label.shape[2:]
    axes = [reachable_coordinates(coordinates[:, d], size, padding_mode) for d, size in enumerate(shape)]
    position = torch.stack(axes, dim=1)
    low = position.floor()
    fraction = position - low
    corners, weights = [], []
    for offset in product((0, 1), repeat=len(shape)):
        step = torch.tensor(offset, device=label.device).view(1, -1, 1)
        corners.append(gather_voxels(label, low.long() + step, padding_mode))
        weights.append(torch.where(step.bool(), fraction, 1 - fraction).prod(dim=1)[:, None])
    # votes that differ by rounding only are equal: the winner must not depend on the order of summation
    bits = _SAME_BITS.get(label.dtype, label.dtype)
    best, best_votes = corners[0], torch.full_like(weights[0].expand(corners[0].shape), -1.0)
    for corner in corners:
        votes = sum(
            (weight * (other == corner) for weight, other in zip(weights, corners)), torch.zeros_like(best_votes)
        )
        tied = (votes - best_votes).abs() <= 1e-6
        better = torch.where(tied, _less(corner, best), votes > best_votes)
        best = torch.where(better, corner.view(bits), best.view(bits)).view(label.dtype)
        best_votes = torch.where(better, votes, best_votes)
    return best


def _less(first: Tensor, second: Tensor) -> Tensor:
    """``first < second``, also for the unsigned types that torch cannot compare."""
    if first.dtype in (torch.uint16, torch.uint32):
        return first.long() < second.long()
    if first.dtype == torch.uint64:  # flipping the top bit turns unsigned order into signed order
        flip = torch.iinfo(torch.int64).min
        return (first.view(torch.int64) ^ flip) < (second.view(torch.int64) ^ flip)
    return first < second
