"""How well pairs are registered: overlap, distances, landmarks, folds, consistency and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance
from monai.networks.utils import one_hot
from torch import Tensor

from monai_drdm.fields import compose, fold_fraction, sample, warp

Register = Callable[[Tensor, Tensor], Tensor]
"""From moving and fixed images ``(1, 1, *S)`` to the field ``(1, D, *S)`` in voxels."""


@dataclass(frozen=True)
class RegistrationScore:
    """The measures of one pair; those that cannot be computed are NaN."""

    dice: tuple[float, ...]
    """Overlap of every structure."""
    hd95: tuple[float, ...]
    """95th percentile of the distances between surfaces of every structure, in units of ``spacing``."""
    tre: float
    """Mean distance between the landmarks of the moving image and those of the fixed image, moved by the field."""
    fold_fraction: float
    """Share of folding cells, by the determinants at their corners."""
    inverse_consistency_vox: float
    """Mean distance of the two fields, from moving to fixed and back, composed, from the identity."""
    error_vox: float
    """Mean distance to the known field."""
    seconds: float
    """Time of one registration."""


@torch.no_grad()
def evaluate_registration(
    register: Register,
    moving: Tensor,
    fixed: Tensor,
    *,
    moving_label: Tensor | None = None,
    fixed_label: Tensor | None = None,
    structures: Sequence[int] = (),
    moving_points: Tensor | None = None,
    fixed_points: Tensor | None = None,
    ddf: Tensor | None = None,
    inside: Tensor | None = None,
    spacing: Sequence[float] | None = None,
    both_ways: bool = True,
) -> RegistrationScore:
    """Register one pair and measure the quality of the field.

    Args:
        register: a network's ``register``, or any other method.
        moving: ``(1, 1, *S)``.
        fixed: ``(1, 1, *S)``.
        moving_label: ``(1, 1, *S)`` label ids; warped by nearest neighbour.
        fixed_label: ``(1, 1, *S)`` label ids.
        structures: label ids to measure.
        moving_points: ``(N, D)`` voxels, the same landmarks as ``fixed_points``.
        fixed_points: ``(N, D)`` voxels.
        ddf: ``(1, D, *S)`` the known field.
        inside: ``(1, 1, *S)`` bool, where the known field counts.
        spacing: mm per voxel, for ``hd95`` and ``tre``; None: voxels.
        both_ways: also register fixed onto moving, for the inverse consistency.

    Returns:
        The score.

    Raises:
        ValueError: the field has a wrong shape, or the spacing is wrong.
    """
    dims, structures = moving.ndim - 2, tuple(int(one) for one in structures)
    steps = _steps(spacing, dims, fixed.device)
    start = _now(fixed.device)
    found = register(moving, fixed)
    seconds = _now(fixed.device) - start
    if found.shape != (1, dims, *fixed.shape[2:]):
        raise ValueError(
            f"register must give a field (1, {dims}, *{tuple(fixed.shape[2:])}), got {tuple(found.shape)}."
        )
    dice: tuple[float, ...] = ()
    hd95: tuple[float, ...] = ()
    if moving_label is not None and fixed_label is not None and structures:
        dice, hd95 = _overlap(warp(moving_label, found, "nearest"), fixed_label, structures, steps)
    tre = error = consistency = np.nan
    if moving_points is not None and fixed_points is not None and len(fixed_points):
        tre = float(((_moved(fixed_points, found) - moving_points) * steps).norm(dim=-1).mean())
    if both_ways:
        consistency = float(compose(found, register(fixed, moving)).norm(dim=1).mean())
    if ddf is not None:
        mask = torch.ones_like(fixed, dtype=torch.bool) if inside is None else inside
        error = float((found - ddf).norm(dim=1, keepdim=True)[mask].mean())
    return RegistrationScore(dice, hd95, tre, float(fold_fraction(found)[0]), consistency, error, seconds)


def _steps(spacing: Sequence[float] | None, dims: int, device: torch.device) -> Tensor:
    """Voxel size along each axis: ``spacing``, or 1."""
    if spacing is None:
        return torch.ones(dims, device=device)
    if len(spacing) != dims or min(spacing) <= 0:
        raise ValueError(f"evaluate_registration: spacing must be {dims} positive numbers, got {tuple(spacing)}.")
    return torch.tensor([float(s) for s in spacing], device=device)


def _now(device: torch.device) -> float:
    """The time in seconds, after all pending work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _overlap(
    warped: Tensor, fixed: Tensor, structures: Sequence[int], steps: Tensor
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Dice and 95th percentile of the surface distance, for every structure."""
    dice, hd95 = [], []
    for value in structures:
        a, b = warped == value, fixed == value
        total = float(a.sum() + b.sum())
        dice.append(2 * float((a & b).sum()) / total if total else np.nan)
        if bool(a.any()) and bool(b.any()):
            first, second = (one_hot(one.to(torch.uint8), 2) for one in (a, b))
            distance = compute_hausdorff_distance(first, second, percentile=95, spacing=steps.tolist())
            hd95.append(float(distance[0, 0]))
        else:
            hd95.append(np.nan)
    return tuple(dice), tuple(hd95)


def _moved(points: Tensor, ddf: Tensor) -> Tensor:
    """``p + ddf(p)`` of landmarks ``(N, D)``."""
    at = points.to(ddf.dtype).T.reshape(1, ddf.shape[1], -1, *(1,) * (ddf.ndim - 3))
    return points + sample(ddf, at)[0].flatten(1).T
