"""Figures of deformations. Needs matplotlib (``pip install monai-drdm[viz]``)."""

from matplotlib.figure import Figure

from monai_drdm.viz.curves import separability_figure
from monai_drdm.viz.figures import deformation_figure, plot_jacobian, plot_labels, plot_warped_grid, show_image
from monai_drdm.viz.planes import Plane
from monai_drdm.viz.recovery import animate_recovery, recovery_steps, recovery_strip, RecoverySteps
from monai_drdm.viz.registration import registration_figure
from monai_drdm.viz.rows import case_rows, CaseRow, Panel
from monai_drdm.viz.sheets import contact_sheet, middle_plane, SheetEntry

# earlier names, which still work
draw_jacobian, draw_warped_grid = plot_jacobian, plot_warped_grid

__all__ = [
    "CaseRow",
    "Figure",
    "Panel",
    "Plane",
    "RecoverySteps",
    "SheetEntry",
    "animate_recovery",
    "case_rows",
    "contact_sheet",
    "deformation_figure",
    "draw_jacobian",
    "draw_warped_grid",
    "middle_plane",
    "plot_jacobian",
    "plot_labels",
    "plot_warped_grid",
    "recovery_steps",
    "recovery_strip",
    "registration_figure",
    "separability_figure",
    "show_image",
]
