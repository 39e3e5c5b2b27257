"""Figures of deformations. Needs matplotlib (``pip install monai-drdm[viz]``)."""

from monai_drdm.viz.figures import deformation_figure, draw_jacobian, draw_warped_grid

__all__ = ["deformation_figure", "draw_jacobian", "draw_warped_grid"]
