"""A field adapted to one pair of images by optimisation: what a network has not seen in training, it finds here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss
from torch import Tensor

from monai_drdm.fields import compose, exp_svf, mend_folds, resize_ddf, shrink_to_fold_limit
from monai_drdm.training.folding import folding_loss

Look: TypeAlias = Callable[[Tensor], Tensor]
"""The moving images ``(B, 1, *S)`` as they are seen through a field ``(B, D, *S)`` in voxels."""

_WINDOW = 7
_RATE = 0.1
_SMOOTHNESS = 0.5
_SQUARINGS = 4
_COARSER = 2
"""How many times coarser the grid is on which the field is changed."""


def refine_field(look: Look, fixed: Tensor, ddf: Tensor, steps: int) -> Tensor:
    """Improve a field by gradient steps on the pair itself.

    A velocity, whose flow is composed with the field, is optimised for local normalised cross-correlation and smooth
    fields without folds. If the pair gets no better by it, the field stays as it was. What still folds is smoothed
    there and, if that is not enough, scaled down.

    Args:
        look: the moving image through a field; differentiable.
        fixed: ``(1, 1, *S)`` in [0, 1].
        ddf: ``(1, D, *S)`` voxels: where to begin.
        steps: number of gradient steps.

    Returns:
        ``(1, D, *S)`` voxels, without folds.
    """
    shape = fixed.shape[2:]
    coarse = [-(-n // _COARSER) for n in shape]
    similarity = LocalNormalizedCrossCorrelationLoss(len(shape), _WINDOW)
    velocity = ddf.new_zeros(*ddf.shape[:2], *coarse).requires_grad_()
    optimizer = torch.optim.Adam([velocity], lr=_RATE)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            flow = exp_svf(velocity, _SQUARINGS)
            refined = compose(ddf, resize_ddf(flow, shape))
            loss = similarity(look(refined), fixed) + _SMOOTHNESS * _roughness(refined) + folding_loss(flow)
            loss.backward()
            optimizer.step()
    refined = compose(ddf, resize_ddf(exp_svf(velocity.detach(), _SQUARINGS), shape))
    before, after = (similarity(look(one), fixed) + _SMOOTHNESS * _roughness(one) for one in (ddf, refined))
    return shrink_to_fold_limit(mend_folds(torch.where(after < before, refined, ddf)), 0.0)[0]


def _roughness(ddf: Tensor) -> Tensor:
    """Mean squared difference of neighbours along each axis, summed over the axes."""
    axes = [axis for axis, size in enumerate(ddf.shape[2:], 2) if size > 1]
    return sum((torch.diff(ddf, dim=axis).square().mean() for axis in axes), ddf.new_zeros(()))
