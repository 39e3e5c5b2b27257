"""Measures of deformation fields."""

from monai_drdm.metrics.displacement import log_jacobian, log_jacobian_std, mean_displacement, remove_affine
from monai_drdm.metrics.statistics import field_statistics, FieldStatistics

__all__ = [
    "FieldStatistics",
    "field_statistics",
    "log_jacobian",
    "log_jacobian_std",
    "mean_displacement",
    "remove_affine",
]
