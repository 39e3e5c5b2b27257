"""A field adapted to one pair of images by optimisation: what a network has not seen in training, it finds here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from monai.losses import LocalNormalizedCrossCorrelationLoss
from torch import Tensor

from monai_drdm.fields import compose, exp_svf, mend_folds, resize_ddf, resize_image, shrink_to_fold_limit
from monai_drdm.training.folding import folding_loss

Look: TypeAlias = Callable[[Tensor], Tensor]
"""The moving images ``(B, 1, *T)`` as they are seen through a field ``(B, D, *T)``, in voxels of its grid.

The grid may be finer or coarser than that of the fixed image, and has the same extent."""

_WINDOW = 5
_RATE = 0.1
_SMOOTHNESS = 0.5
_SQUARINGS = 4
_FINEST = 2
"""How many times coarser the finest grid is on which the field is changed."""
_FEWEST = 6
"""Nodes along the longest side of the coarsest grid on which the field is changed, at least."""
_COMPARED = 64
"""Voxels along the longest side of the coarsest grid on which images are compared, at least."""


def refine_field(smoothed: Callable[[float], Look], fixed: Tensor, ddf: Tensor, steps: int) -> Tensor:
    """Improve a field by gradient steps on the pair itself, coarse to fine.

    On each of several grids, every one twice finer than the one before, a velocity is optimised for local normalised
    cross-correlation and smooth fields without folds; its flow is composed with the field. Large images are compared on
    coarser grids first. If the pair gets no better by it, the field stays as it was. What still folds is smoothed there
    and, if that is not enough, scaled down.

    Args:
        smoothed: the moving image, smoothed by so many of its voxels, through a field; differentiable.
        fixed: ``(1, 1, *S)`` in [0, 1].
        ddf: ``(1, D, *S)`` voxels: where to begin.
        steps: number of gradient steps on all grids together.

    Returns:
        ``(1, D, *S)`` voxels, without folds.
    """
    shape, refined = fixed.shape[2:], ddf
    grids = _grids(max(shape))
    for number, coarser in enumerate(grids):
        share = steps * (number + 1) // len(grids) - steps * number // len(grids)
        apart = min(coarser // 2, max(1, max(shape) // _COMPARED))
        seen = [-(-n // apart) for n in shape]
        flow = _Search(smoothed((apart - 1) / 2), resize_image(fixed, seen), resize_ddf(refined, seen)).flow(
            [-(-n // coarser) for n in shape], share
        )
        refined = compose(refined, resize_ddf(flow, shape))
    search = _Search(smoothed(0.0), fixed, ddf)
    refined = torch.where(search.loss(refined) < search.loss(ddf), refined, ddf)
    return shrink_to_fold_limit(mend_folds(refined), 0.0)[0]


def _grids(longest: int) -> list[int]:
    """How many times coarser the grids are on which the field is changed, coarse to fine."""
    grids = [_FINEST]
    while longest / (2 * grids[0]) >= _FEWEST:
        grids.insert(0, 2 * grids[0])
    return grids


class _Search:
    """Looks for a flow that improves a field on one grid."""

    def __init__(self, look: Look, fixed: Tensor, ddf: Tensor) -> None:
        self.look, self.fixed, self.ddf = look, fixed, ddf
        self.similarity = LocalNormalizedCrossCorrelationLoss(fixed.ndim - 2, _WINDOW)

    def loss(self, ddf: Tensor) -> Tensor:
        """Unlikeness and roughness."""
        unlike: Tensor = self.similarity(self.look(ddf), self.fixed)
        return unlike + _SMOOTHNESS * _roughness(ddf)

    def flow(self, coarse: Sequence[int], steps: int) -> Tensor:
        """The flow ``(1, D, *coarse)`` to compose the field with."""
        shape = self.ddf.shape[2:]
        velocity = self.ddf.new_zeros(*self.ddf.shape[:2], *coarse).requires_grad_()
        optimizer = torch.optim.Adam([velocity], lr=_RATE)
        with torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                flow = exp_svf(velocity, _SQUARINGS)
                loss = self.loss(compose(self.ddf, resize_ddf(flow, shape))) + folding_loss(flow)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return exp_svf(velocity.detach(), _SQUARINGS)


def _roughness(ddf: Tensor) -> Tensor:
    """Mean squared difference of neighbours along each axis, summed over the axes."""
    axes = [axis for axis, size in enumerate(ddf.shape[2:], 2) if size > 1]
    return sum((torch.diff(ddf, dim=axis).square().mean() for axis in axes), ddf.new_zeros(()))
