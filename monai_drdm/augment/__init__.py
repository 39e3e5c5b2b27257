"""Augmenting a data set on disk."""

from monai_drdm.augment.overview import draw_overview
from monai_drdm.augment.run import augment, AugmentReport
from monai_drdm.augment.settings import AugmentSettings

__all__ = ["AugmentReport", "AugmentSettings", "augment", "draw_overview"]
