"""Augmenting a data set on disk, and making registration pairs of it."""

from monai_drdm.augment.overview import draw_overview
from monai_drdm.augment.run import augment, AugmentReport, make_pairs
from monai_drdm.augment.settings import AugmentSettings, PairSettings

__all__ = ["AugmentReport", "AugmentSettings", "PairSettings", "augment", "draw_overview", "make_pairs"]
