"""Removing folds: smooth a field where it folds, or scale the whole field down."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_drdm.fields.grid import check_ddf
from monai_drdm.fields.jacobian import fold_fraction, jacobian_determinant
from monai_drdm.fields.resize import gaussian_smooth

_ROUNDS_BEFORE_GROWTH = 50
_GROWTH = 1.1


def shrink_to_fold_limit(ddf: Tensor, max_fold_fraction: float = 1e-4, *, halvings: int = 6) -> tuple[Tensor, Tensor]:
    """Scale each field down until its corner fold fraction is within a limit, and no further.

    Args:
        ddf: ``(B, D, *S)`` voxels.
        max_fold_fraction: largest accepted ``fold_fraction``.
        halvings: number of bisection steps; the scale found is within ``2^-halvings`` of the largest accepted one.

    Returns:
        The fields and their scales ``(B,)`` in [0, 1]; fields within the limit come back unchanged with scale 1.

    Raises:
        ValueError: a negative limit or one above 1.
    """
    check_ddf(ddf, "shrink_to_fold_limit")
    if not 0.0 <= max_fold_fraction <= 1.0:
        raise ValueError(f"shrink_to_fold_limit: max_fold_fraction must be in [0, 1], got {max_fold_fraction}.")
    scale = torch.ones(ddf.shape[0], device=ddf.device, dtype=ddf.dtype)
    for b in (fold_fraction(ddf) > max_fold_fraction).nonzero().flatten().tolist():
        low, high = 0.0, 1.0  # the identity does not fold, so scale 0 is always accepted
        for _ in range(halvings):
            middle = (low + high) / 2
            if bool(fold_fraction(ddf[b : b + 1] * middle)[0] <= max_fold_fraction):
                low = middle
            else:
                high = middle
        scale[b] = low
    return ddf * scale.view(-1, *(1,) * (ddf.ndim - 1)), scale


def mend_folds(ddf: Tensor, *, min_determinant: float = 0.05, sigma_vox: float = 2.0, rounds: int = 80) -> Tensor:
    """Remove folds locally and leave the rest of the field unchanged.

    Around every cell whose corner determinant is below ``min_determinant`` the field is blended with its Gaussian
    smoothing. This is repeated until no cell folds. Fields without folds are returned unchanged.

    Args:
        ddf: ``(B, D, *S)`` voxels.
        min_determinant: in a field that folds, cells with a smaller determinant are smoothed.
        sigma_vox: width of the smoothing and of the blend, in voxels; it grows if folds are left after 50 rounds.
        rounds: largest number of repetitions; a field that folds over a large region may keep some folds.

    Returns:
        ``(B, D, *S)`` voxels. The result for one field does not depend on the others in the batch.
    """
    check_ddf(ddf, "mend_folds")
    for done in range(rounds):
        determinant = jacobian_determinant(ddf)
        folded = (determinant <= 0).flatten(1).any(dim=1)
        if not bool(folded.any()):
            break
        low = (determinant < min_determinant) & folded.view(-1, *(1,) * (determinant.ndim - 1))
        width = sigma_vox * _GROWTH ** max(0, done - _ROUNDS_BEFORE_GROWTH)
        weight = (gaussian_smooth(_cells_to_voxels(low, ddf), width) * 4).clamp(max=1)
        ddf = ddf + weight * (gaussian_smooth(ddf, width) - ddf)
    return ddf


def _cells_to_voxels(cells: Tensor, ddf: Tensor) -> Tensor:
    """Mark every voxel that is a corner of a marked cell: ``(B, 1, *S)`` of the field's dtype."""
    marked = cells[:, None].to(ddf.dtype)
    for axis, size in enumerate(ddf.shape[2:]):
        if size > 1:
            before, after = [0, 0] * ddf.shape[1], [0, 0] * ddf.shape[1]
            before[-2 * axis - 2], after[-2 * axis - 1] = 1, 1  # F.pad counts axes from the last
            marked = torch.maximum(F.pad(marked, before), F.pad(marked, after))
    return marked
