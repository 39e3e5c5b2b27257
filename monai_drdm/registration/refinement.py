"""A field adapted to one pair of images by optimisation: what a network has not seen in training, it finds here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from monai_drdm.fields import compose, exp_svf, mend_folds, resize_ddf, resize_image, shrink_to_fold_limit
from monai_drdm.registration.similarity import LocalCorrelation
from monai_drdm.training.folding import folding_loss

Look: TypeAlias = Callable[[Tensor, Sequence[int]], tuple[Tensor, Tensor]]
"""The moving image ``(1, 1, *T)`` as it is seen, on a grid of shape ``T``, through a field ``(1, D, *S)``, and where it
is seen: points outside it show its border.

The field is in voxels of its own grid, which may be coarser; all grids have the extent of the fixed image."""

_WINDOW = 5
_RATE = 0.1
_SMOOTHNESS = 0.5
_SQUARINGS = 4
_SAME = 1e-6
"""Losses that differ by no more than this are the same."""
_FINEST = 2
"""How many times coarser the finest grid is on which the field is changed."""
_FEWEST = 6
"""Nodes along the longest side of the coarsest grid on which the field is changed, at least."""
_COMPARED = 64
"""Voxels along the longest side of the coarsest grid on which images are compared, at least."""


def refine_field(smoothed: Callable[[float], Look], fixed: Tensor, ddf: Tensor, steps: int) -> Tensor:
    """Improve a field by gradient steps on the pair itself, coarse to fine.

    On each of several grids, every one twice finer than the one before, a velocity is optimised for local normalised
    cross-correlation and smooth fields without folds; its flow is composed with the field. The field lives on a grid
    two times coarser than the image, which is as fine as the finest velocity: so composing fields and comparing
    neighbours cost an eighth. Only windows that show the moving image alone are compared. Large images are compared on
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
    shape = fixed.shape[2:]
    found = resize_ddf(ddf, _coarser(shape, _FINEST))
    grids = _grids(max(shape))
    for number, coarser in enumerate(grids):
        share = steps * (number + 1) // len(grids) - steps * number // len(grids)
        apart = min(coarser // 2, max(1, max(shape) // _COMPARED))
        search = _Search(smoothed((apart - 1) / 2), resize_image(fixed, _coarser(shape, apart)))
        flow = search.flow(found, _coarser(shape, coarser), share)
        found = compose(found, resize_ddf(flow, found.shape[2:]))
    last = _Search(smoothed(0.0), fixed)
    last.warn_of_nothing(ddf)
    refined = last.better(resize_ddf(found, shape), ddf)
    return shrink_to_fold_limit(mend_folds(refined), 0.0)[0]


def _grids(longest: int) -> list[int]:
    """How many times coarser the grids are on which the field is changed, coarse to fine."""
    grids = [_FINEST]
    while longest / (2 * grids[0]) >= _FEWEST:
        grids.insert(0, 2 * grids[0])
    return grids


def _coarser(shape: Sequence[int], factor: int) -> list[int]:
    """The shape of a grid so many times coarser."""
    return [-(-n // factor) for n in shape]


class _Search:
    """Looks for a flow that makes the moving image look more like the fixed one."""

    def __init__(self, look: Look, fixed: Tensor) -> None:
        self.look, self.shape = look, fixed.shape[2:]
        self.likeness = LocalCorrelation(fixed, _WINDOW)

    def loss(self, ddf: Tensor) -> Tensor:
        """Unlikeness, where the windows show the moving image alone, and roughness."""
        moved, seen = self.look(ddf, self.shape)
        return _SMOOTHNESS * _roughness(ddf) - self.likeness.mean(moved, seen)

    def better(self, new: Tensor, old: Tensor) -> Tensor:
        """The new field if its loss is lower, where both show the moving image; otherwise the old one."""
        views = [self.look(one, self.shape) for one in (new, old)]
        seen = views[0][1] & views[1][1]
        gain = self.likeness.mean(views[0][0], seen) - self.likeness.mean(views[1][0], seen)
        return torch.where(gain > _SMOOTHNESS * (_roughness(new) - _roughness(old)) + _SAME, new, old)

    def warn_of_nothing(self, ddf: Tensor) -> None:
        """Say so if no window shows the moving image alone."""
        seen = self.look(ddf, self.shape)[1]
        if not bool(self.likeness.whole(seen).any()):
            warnings.warn(
                "refine changed nothing, because the moving image covers too little of the fixed one: no window of "
                f"{_WINDOW} voxels shows nothing but it. Is the starting position right?",
                stacklevel=2,
            )

    def flow(self, ddf: Tensor, coarse: Sequence[int], steps: int) -> Tensor:
        """The flow ``(1, D, *coarse)`` to compose a field with."""
        velocity = ddf.new_zeros(*ddf.shape[:2], *coarse).requires_grad_()
        optimizer = torch.optim.Adam([velocity], lr=_RATE)
        with torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                flow = exp_svf(velocity, _SQUARINGS)
                loss = self.loss(compose(ddf, resize_ddf(flow, ddf.shape[2:])))
                if folding_loss(flow.detach()) > 0:
                    loss = loss + folding_loss(flow)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return exp_svf(velocity.detach(), _SQUARINGS)


def _roughness(ddf: Tensor) -> Tensor:
    """Mean squared difference of neighbours along each axis, summed over the axes."""
    axes = [axis for axis, size in enumerate(ddf.shape[2:], 2) if size > 1]
    return sum((torch.diff(ddf, dim=axis).square().mean() for axis in axes), ddf.new_zeros(()))
