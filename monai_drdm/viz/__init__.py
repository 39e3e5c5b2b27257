"""Figures of deformations. Needs matplotlib (``pip install monai-drdm[viz]``)."""

from monai_drdm.viz.figures import deformation_figure, draw_jacobian, draw_warped_grid
from monai_drdm.viz.sheets import contact_sheet, SheetEntry

__all__ = ["SheetEntry", "contact_sheet", "deformation_figure", "draw_jacobian", "draw_warped_grid"]
