"""Label maps through displacement fields: no new ids, whatever their number, size or dtype."""

from __future__ import annotations

from itertools import product
from typing import Literal

import torch
from torch import Tensor

from monai_drdm.fields.grid import field_dtype
from monai_drdm.fields.warp import fold_coordinates, gather_voxels, PaddingMode, warp

_CHUNK = 1 << 19  # voxels handled at once, so that working memory does not grow with the volume


def warp_labels(
    label: Tensor,
    ddf: Tensor,
    mode: Literal["nearest", "label"] = "label",
    padding_mode: PaddingMode = "border",
) -> Tensor:
    """Warp a label map without inventing label ids.

    ``label`` mode interpolates the indicator of every class linearly and keeps the class with the largest value, ties
    going to the smallest id. Only the 2^D classes at the corners of a sampling cell can win, so the cost does not
    depend on the number of classes, and no per-class volume is ever built.

    Args:
        label: ``(B, C, *S)``, any dtype with integer values.
        ddf: ``(B, D, *S)`` voxels.
        mode: ``nearest`` or ``label``.
        padding_mode: ``zeros`` reads id 0 outside.

    Returns:
        ``(B, C, *S)`` of the dtype of ``label``.

    Raises:
        ValueError: another mode, or shapes that do not fit.
    """
    if mode not in ("nearest", "label"):
        raise ValueError(f"warp_labels: mode must be 'nearest' or 'label', got {mode!r}.")
    return warp(label, ddf, mode, padding_mode)


def sample_labels(label: Tensor, coordinates: Tensor, padding_mode: PaddingMode) -> Tensor:
    """Per-class linear interpolation and argmax at ``(B, D, *T)`` voxel coordinates, in chunks of voxels."""
    flat = coordinates.to(field_dtype(coordinates)).flatten(2)
    chunks = [_vote(label, part, padding_mode) for part in torch.split(flat, _CHUNK, dim=2)]
    return torch.cat(chunks, dim=2).reshape(*label.shape[:2], *coordinates.shape[2:])


def _vote(label: Tensor, coordinates: Tensor, padding_mode: PaddingMode) -> Tensor:
    """Winner among the corner labels of each sampling cell, at ``(B, D, N)`` coordinates: ``(B, C, N)``."""
    shape = label.shape[2:]
    axes = [fold_coordinates(coordinates[:, d], size, padding_mode) for d, size in enumerate(shape)]
    position = torch.stack(axes, dim=1)
    low = position.floor()
    fraction = position - low
    corners, weights = [], []
    for offset in product((0, 1), repeat=len(shape)):
        step = torch.tensor(offset, device=label.device).view(1, -1, 1)
        corners.append(gather_voxels(label, low.long() + step, padding_mode))
        weights.append(torch.where(step.bool(), fraction, 1 - fraction).prod(dim=1)[:, None])
    # votes closer than rounding are ties: which of two equal classes wins must not hang on the order of a sum
    best, best_votes = corners[0], torch.full_like(weights[0].expand(corners[0].shape), -1.0)
    for corner in corners:
        votes = sum(
            (weight * (other == corner) for weight, other in zip(weights, corners)), torch.zeros_like(best_votes)
        )
        tied = (votes - best_votes).abs() <= 1e-6
        better = torch.where(tied, _less(corner, best), votes > best_votes)
        best = torch.where(better, corner, best)
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
