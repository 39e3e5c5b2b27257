"""Augmenting a data set on disk, and making registration pairs of it: what ``augment`` and ``pairs`` run."""

from monai_drdm.augment.deformed_cases import AugmentSettings
from monai_drdm.augment.overview import plot_overview
from monai_drdm.augment.registration_pairs import PairSettings
from monai_drdm.augment.run import augment, AugmentReport, make_pairs

draw_overview = plot_overview  # an earlier name, which still works

__all__ = [
    "AugmentReport",
    "AugmentSettings",
    "PairSettings",
    "augment",
    "draw_overview",
    "make_pairs",
    "plot_overview",
]
