"""Summary statistics of one field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from monai_drdm.fields import fold_fraction, voxels_to_mm
from monai_drdm.metrics.displacement import log_jacobian


@dataclass(frozen=True)
class FieldStatistics:
    """Summary statistics of one field."""

    mean_displacement_vox: float
    max_displacement_vox: float
    mean_displacement_mm: float
    max_displacement_mm: float
    fold_fraction: float
    """Fraction of grid cells that fold, by ``fields.fold_fraction``."""
    log_jacobian_min: float
    """Smallest logarithm of the corner determinant; determinants below 0.001, as in folds, count as 0.001."""
    log_jacobian_mean: float
    log_jacobian_std: float

    def to_dict(self) -> dict[str, float]:
        """The numbers by name."""
        return asdict(self)


def field_statistics(ddf: Tensor, spacing: Sequence[float]) -> FieldStatistics:
    """Compute the statistics of one field.

    Args:
        ddf: ``(1, D, *S)`` voxels.
        spacing: mm per voxel along each axis.

    Returns:
        The statistics; they are read back from the device in one transfer.

    Raises:
        ValueError: more than one field, or a spacing that does not fit.
    """
    if ddf.shape[0] != 1:
        raise ValueError(f"field_statistics: ddf must hold one field (1, D, *S), got {tuple(ddf.shape)}.")
    length_vox = ddf.norm(dim=1)
    length_mm = voxels_to_mm(ddf, spacing).norm(dim=1)
    logarithm = log_jacobian(ddf)
    folds = fold_fraction(ddf)[0].to(length_vox.dtype)
    numbers = torch.stack((
        length_vox.mean(), length_vox.max(), length_mm.mean(), length_mm.max(), folds,
        logarithm.min(), logarithm.mean(), logarithm.std(unbiased=False),
    ))  # fmt: skip
    return FieldStatistics(*numbers.tolist())
