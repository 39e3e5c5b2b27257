"""Figures of deformations. Needs matplotlib (``pip install monai-drdm[viz]``)."""

from matplotlib.figure import Figure

from monai_drdm.viz.curves import separability_figure
from monai_drdm.viz.figures import deformation_figure, plot_jacobian, plot_warped_grid
from monai_drdm.viz.registration import registration_figure
from monai_drdm.viz.sheets import contact_sheet, middle_plane, SheetEntry

# names of before, which go on working
draw_jacobian, draw_warped_grid = plot_jacobian, plot_warped_grid

__all__ = [
    "Figure",
    "SheetEntry",
    "contact_sheet",
    "deformation_figure",
    "draw_jacobian",
    "draw_warped_grid",
    "middle_plane",
    "plot_jacobian",
    "plot_warped_grid",
    "registration_figure",
    "separability_figure",
]
