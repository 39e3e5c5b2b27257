"""What a recovery network is trained to make small."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_drdm.fields import jacobian_determinant, warp

_EPSILON = 1e-7


def distance_loss(predicted: Tensor, ddf: Tensor) -> Tensor:
    """How far the prediction misses the way back: ``mean |p + ψ|² / (|ψ|² + ε)`` (published).

    Args:
        predicted: ``(B, D, *S)``, the prediction sampled where ``ψ`` points (``sample_at``).
        ddf: ``(B, D, *S)`` displacements ``ψ`` to undo, in the same units.

    Returns:
        A number; 1 for a prediction of nothing.
    """
    missed = (predicted + ddf).square().sum(dim=1)
    return (missed / (ddf.square().sum(dim=1) + _EPSILON)).mean()


def angle_loss(predicted: Tensor, ddf: Tensor) -> Tensor:
    """Mean cosine between prediction and displacement, -1 if they are opposite everywhere (published).

    Args:
        predicted: as in ``distance_loss``.
        ddf: as in ``distance_loss``.
    """
    return F.cosine_similarity(predicted, ddf, dim=1).mean()


def smoothness_loss(ddf: Tensor, free: float = 1e-4) -> Tensor:
    """Mean size of differences between neighbours beyond what is free: ``mean relu(|Δ| - free)`` (published).

    Args:
        ddf: ``(B, D, *S)``.
        free: differences up to this cost nothing, in the units of ``ddf``; published in fractions of the image size.
    """
    axes = [d for d in range(2, ddf.ndim) if ddf.shape[d] > 1]
    if not axes:
        return ddf.sum() * 0.0
    return torch.stack([F.relu(ddf.diff(dim=d).abs() - free).mean() for d in axes]).mean()


def folding_loss(ddf: Tensor, margin: float = 0.1) -> Tensor:
    """Mean shortfall of corner determinants below a margin: ``mean relu(margin - det)``.

    Zero on fields whose cells keep more than the margin of their volume at every corner. The released term crosses the
    wrong differences and leaves out the identity: it is zero on fields that fold everywhere.

    Args:
        ddf: ``(B, D, *S)`` voxels.
        margin: determinants above this cost nothing.
    """
    return F.relu(margin - jacobian_determinant(ddf)).mean()


def velocity_loss(predicted: Tensor, velocity: Tensor, gradient_share: float = 0.0) -> Tensor:
    """Error of a velocity, relative to what it should be.

    Args:
        predicted: ``(B, D, *S)``.
        velocity: ``(B, D, *S)``.
        gradient_share: as in ``relative_energy``.

    Returns:
        A number; 1 for a prediction of nothing.
    """
    return relative_energy(predicted - velocity, velocity, gradient_share, _EPSILON)


def relative_energy(left: Tensor, start: Tensor, gradient_share: float = 0.0, epsilon: float = 1e-3) -> Tensor:
    """Mean square of what is left of a field, and of its differences between neighbours, relative to its start.

    The square of a multi-scale field is that of its coarsest part; of differences every scale has its part, and they
    are what makes an outline rough.

    Args:
        left: ``(B, D, *S)``.
        start: ``(B, D, *S)`` in the same units.
        gradient_share: weight of the differences, in [0, 1]; the squares have the rest.
        epsilon: added to the mean square of the start, and a tenth of it to that of its differences.

    Returns:
        A number, the mean over samples; 1 if nothing has changed.
    """
    dims = tuple(range(1, start.ndim))
    ratio = left.square().mean(dim=dims) / (start.square().mean(dim=dims) + epsilon)
    if gradient_share > 0:
        rough = _roughness(left) / (_roughness(start) + 0.1 * epsilon)
        ratio = (1 - gradient_share) * ratio + gradient_share * rough
    return ratio.mean()


def _roughness(field: Tensor) -> Tensor:
    """Mean square of differences between neighbours, summed over axes: ``(B,)``."""
    total = field.new_zeros(field.shape[0])
    for d in range(2, field.ndim):
        if field.shape[d] > 1:
            total = total + field.diff(dim=d).square().flatten(1).mean(dim=1)
    return total


def sample_at(predicted: Tensor, ddf: Tensor) -> Tensor:
    """The prediction ``p`` at ``x + ψ(x)``, continued by its border: what ``distance_loss`` compares.

    Args:
        predicted: ``(B, D, *S)``.
        ddf: ``(B, D, *S)`` voxels.
    """
    return warp(predicted, ddf, "bilinear", "border")
