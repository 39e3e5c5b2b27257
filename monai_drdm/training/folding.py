"""The penalty that keeps the fields of any network from folding."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from monai_drdm.fields import jacobian_determinant


def folding_loss(ddf: Tensor, margin: float = 0.1) -> Tensor:
    """Mean shortfall of the corner determinants below a margin: ``mean relu(margin - det)``.

    It is zero for fields whose cells keep more than the margin of their volume at every corner. The term of the
    authors' release takes differences along the wrong axes and omits the identity: it is zero for fields that fold
    everywhere.

    Args:
        ddf: ``(B, D, *S)`` voxels.
        margin: determinants above this cost nothing.
    """
    return F.relu(margin - jacobian_determinant(ddf)).mean()
