"""Deformation-field algebra on plain tensors.

One convention holds everywhere in this package:

* A displacement field ``ddf`` is a floating tensor ``(B, D, *S)`` with ``D = len(S)`` in {2, 3}.
* Its components are displacements in voxels of its own grid, in array axis order: component ``d`` moves along
  ``S[d]``.
* Voxel centres lie at integers (``align_corners=True``). Along an axis of length 1 every coordinate reads the
  only voxel.
* Warping pulls back: ``warp(image, ddf)(x) = image(x + ddf(x))``, as in ``monai.networks.blocks.Warp``.

A stationary velocity field (SVF) has the same form. Coordinates are never computed below float32.
"""

from monai_drdm.fields.compose import compose, exp_svf, power
from monai_drdm.fields.grid import identity_grid
from monai_drdm.fields.guard import mend_folds, shrink_to_fold_limit
from monai_drdm.fields.invert import Inverse, invert, warp_points
from monai_drdm.fields.jacobian import fold_fraction, jacobian_determinant
from monai_drdm.fields.random_velocity import control_grid_velocity, isotropic_velocity
from monai_drdm.fields.resize import crop, gaussian_smooth, resize_ddf, resize_image
from monai_drdm.fields.units import fractions_to_voxels, mm_to_voxels, voxels_to_fractions, voxels_to_mm
from monai_drdm.fields.warp import sample, warp, warp_labels

__all__ = [
    "Inverse",
    "compose",
    "control_grid_velocity",
    "crop",
    "exp_svf",
    "fold_fraction",
    "fractions_to_voxels",
    "gaussian_smooth",
    "identity_grid",
    "invert",
    "isotropic_velocity",
    "jacobian_determinant",
    "mend_folds",
    "mm_to_voxels",
    "power",
    "resize_ddf",
    "resize_image",
    "sample",
    "shrink_to_fold_limit",
    "voxels_to_fractions",
    "voxels_to_mm",
    "warp",
    "warp_labels",
    "warp_points",
]
