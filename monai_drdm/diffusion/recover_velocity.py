"""Recovery with a network that predicts velocities: few cheap steps, each a small diffeomorphism.

Three corrections are added to the predictions of the network.

*Smoothing in flat regions.* A network recognises a deformation only where the image has structure. In flat regions it
predicts no velocity, and the random field would stay as rough as it was drawn. Before each step the field is therefore
blended with its own smoothing where the deformed image is flat.

*Subtracting the prediction for the original image.* The original image is realistic by definition, but for anatomy that
is unlike its training data a network predicts a velocity for it too, which would bias all draws in the same direction.
This prediction is therefore warped by the field and subtracted from the one for the deformed image. It changes little
with the level, so it is computed at every fourth step only.

*Keeping symmetry.* If the original image is symmetric, as a brain is, each step also takes off a share of that part of
the field which breaks the symmetry (``symmetry.py``), so that both halves stay alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from monai_drdm.diffusion.recover import Callback, RecoveryStep
from monai_drdm.diffusion.schedule import integration_times, levels_of_batch
from monai_drdm.diffusion.symmetry import find_mirror, half_grid, keep_symmetry
from monai_drdm.fields import compose, exp_svf, gaussian_smooth, mend_folds, resize_ddf, resize_image, warp
from monai_drdm.networks import VelocityUNet

Predict = Callable[[Tensor, Tensor], Tensor]
"""A function that predicts velocities from images and levels, as a network does."""

OVER_RELAXATION = 1.25
"""Every step is longer by this factor than its share of the way; later steps correct what is too much."""

_FLAT = 0.07  # slope, in intensity ranges per voxel, at which a region counts as half flat
_SMOOTHING = 3 / 80  # standard deviation as a fraction of the longest side, about the finest node spacing
_EDGE_SIGMA_VOX, _REACH_SIGMA_VOX = 1.0, 2.0
_ANCHOR_EVERY = 4
_ASYMMETRY_LEFT = 0.05  # of the random field, in all steps together, in symmetric images
_SQUARINGS = 6  # a step of 8 voxels of the half grid starts with 1/8 voxel, a larger one with more


@torch.no_grad()
def recover_velocity(
    network: VelocityUNet,
    image: Tensor,
    ddf: Tensor,
    levels: Sequence[float],
    *,
    steps: int = 12,
    over_relaxation: float = OVER_RELAXATION,
    symmetry: float = 1.0,
    predict: Predict | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Remove a random field of known level in few steps (Algorithm 2 with velocities).

    At step ``k`` of ``K`` the remaining level is ``s_k = s (1 - k / K)``. The network predicts the velocity that undoes
    a deformation of that level, for the deformed image and for the original one. The field is composed with the flow of
    their difference, integrated for the time that belongs to this step.

    Args:
        network: a ``VelocityUNet``.
        image: ``(B, C, *S)`` original images in the network's input range, sizes odd.
        ddf: ``(B, D, *H)`` voxels of the half grid, the diffused field.
        levels: deformation level of each image.
        steps: number of steps, 1 or more; each costs one prediction, every fourth step two.
        over_relaxation: factor on every step. A larger one gives images closer to the original, a smaller one leaves
            more of the random field.
        symmetry: how far fields are kept symmetric where images are, in [0, 1].
        predict: is called instead of ``network``, for example the same network compiled or in lower precision.
        callback: called after each step; its ``time`` is the number of steps left.
        progress: show a progress bar.

    Returns:
        ``(B, D, *H)`` voxels of the half grid.

    Raises:
        ValueError: ``steps`` below 1, a level outside (0, 1], or a network whose predictions are not finite.
    """
    if steps < 1:
        raise ValueError(f"sampler 'velocity': steps must be 1 or more, got {steps}.")
    levels, predict = levels_of_batch(levels, ddf.shape[0], "recover_velocity"), predict or network
    low, high = network.card.input_range
    unseen = flatness((image - low) / (high - low), ddf.shape[2:])
    left, share = timetable(levels, steps, ddf)
    kept = min(1.0, over_relaxation / OVER_RELAXATION) * symmetry
    mirror = half_grid(find_mirror((image - low) / (high - low)), image.shape[2:]) if kept > 0 else None
    if mirror is not None and not bool(mirror.weight.any()):
        mirror = None
    for k in tqdm(range(steps), desc="recover", unit="step", disable=not progress):
        if k % _ANCHOR_EVERY == 0:
            anchor = predict(image, left[k])
        if mirror is not None:
            ddf = keep_symmetry(ddf, mirror, 1 - _ASYMMETRY_LEFT ** (kept / steps))
        ddf = recovery_step(predict, image, unseen, ddf, left[k], over_relaxation * share[k], anchor)
        if callback is not None:
            callback(RecoveryStep(k, steps - 1 - k, ddf))
    if not bool(torch.isfinite(ddf).all()):
        raise ValueError(
            f"network {network.card.name!r} predicts velocities that are NaN or infinite. Check its weights."
        )
    return mend_folds(ddf)


def timetable(levels: Sequence[float], steps: int, ddf: Tensor) -> tuple[Tensor, Tensor]:
    """The remaining level before each step and the integration time of the step, ``(K, B)`` each, on the device."""
    left = [[level * (1 - k / steps) for level in levels] for k in range(steps + 1)]
    times = [integration_times(row, ddf.shape[1]) for row in left]
    share = [[a - b for a, b in zip(*rows)] for rows in pairwise(times)]
    return ddf.new_tensor(left[:-1]), ddf.new_tensor(share)


def recovery_step(
    predict: Predict,
    image: Tensor,
    unseen: Tensor,
    ddf: Tensor,
    level: Tensor,
    time: Tensor,
    anchor: Tensor | None = None,
) -> Tensor:
    """One step: smooth the field in flat regions, then compose it with the flow of the predicted velocity.

    Nothing is read back from the device, so the host does not wait for it.

    Args:
        predict: velocities ``(B, D, *H)`` from images and levels.
        image: as in ``recover_velocity``.
        unseen: ``flatness`` of the image.
        ddf: ``(B, D, *H)`` voxels of the half grid.
        level: ``(B,)`` level of each field.
        time: ``(B,)`` integration time of the step.
        anchor: ``(B, D, *H)`` the prediction for the original image, which is subtracted; None: nothing is.

    Returns:
        ``(B, D, *H)`` voxels of the half grid.
    """
    smooth = gaussian_smooth(ddf, _SMOOTHING * max(ddf.shape[2:]))
    ddf = ddf + warp(unseen, ddf) * (smooth - ddf)
    warped = warp(image, resize_ddf(ddf, image.shape[2:]))
    velocity = predict(warped, level)
    if anchor is not None:
        velocity = velocity - warp(anchor, ddf)
    step = time.view(-1, *(1,) * (ddf.ndim - 1)) * velocity
    return compose(ddf, exp_svf(step, at_most=_SQUARINGS))


def flatness(image: Tensor, shape: Sequence[int]) -> Tensor:
    """Where an image has no structure from which a deformation could be recognised: 1 in flat regions, near 0 at edges.

    Args:
        image: ``(B, C, *S)`` in [0, 1].
        shape: spatial shape of the result.

    Returns:
        ``(B, 1, *shape)`` in (0, 1].
    """
    smooth = gaussian_smooth(image, _EDGE_SIGMA_VOX)
    slope = torch.zeros_like(image[:, :1])
    for axis in range(2, image.ndim):
        if image.shape[axis] > 1:
            after = [0] * (2 * (image.ndim - axis - 1)) + [0, 1]  # F.pad counts axes from the last
            slope = slope + F.pad(smooth.diff(dim=axis).square().sum(dim=1, keepdim=True), after)
    slope = gaussian_smooth(resize_image(slope, shape), _REACH_SIGMA_VOX)
    return 1 / (1 + slope / _FLAT**2)
