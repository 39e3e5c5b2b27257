"""Drawing a deformation from an image and a seed, and everything that is known about it afterwards.

This part does not need MONAI. Plain tensors go in, a ``Deformation`` comes out, and it warps plain tensors::

    drawer = FieldDrawer("auto", deformation_level=0.5)
    deformation = drawer.draw(image, spacing=(1.0, 1.0), seed=7)  # (C, *S)
    moved, label = deformation.warp(image), deformation.warp(label, "nearest")
"""

from monai_drdm.deformation.drawing import FieldDrawer
from monai_drdm.deformation.record import (
    BankedParams,
    Deformation,
    DeformationParams,
    DeformationStatistics,
    PairParams,
)
from monai_drdm.deformation.seeds import stable_hash
from monai_drdm.deformation.stored_field import ComposedField, StoredField

__all__ = [
    "BankedParams",
    "ComposedField",
    "Deformation",
    "DeformationParams",
    "DeformationStatistics",
    "FieldDrawer",
    "PairParams",
    "StoredField",
    "stable_hash",
]
