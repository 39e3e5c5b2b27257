"""Recovery with a network that predicts velocities: few cheap steps, each a small diffeomorphism.

Two things keep it honest.

*What nobody can see may as well be smooth.* A network can only see a deformation where the image shows something.
Elsewhere its best guess is nothing, and the random field would stay as rough as it was drawn. Before each step the
field is blended into its own smoothing where the deformed image is flat.

*The original is realistic by definition.* A network finds something to mend in every anatomy that it was not trained
on, and would turn all draws in the same direction. What it says of the original image is therefore taken off what it
says of the deformed one, carried along by the field. It changes little with the level and is asked every fourth step.
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
from monai_drdm.fields import compose, exp_svf, gaussian_smooth, mend_folds, resize_ddf, resize_image, warp
from monai_drdm.networks import VelocityUNet

Predict = Callable[[Tensor, Tensor], Tensor]
"""A network as a function of images and levels."""

OVER_RELAXATION = 1.25
"""Every step goes this much farther than its share of the way: later steps correct what it overshoots."""

_FLAT = 0.07  # an edge of this slope, in units of the intensity range per voxel, counts as half seen
_SMOOTHING = 3 / 80  # standard deviation of the smoothing, as a fraction of the longest side: about one finest node
_EDGE_SIGMA_VOX, _REACH_SIGMA_VOX = 1.0, 2.0
_ANCHOR_EVERY = 4
_SQUARINGS = 6  # steps of up to 8 voxels of the half grid start within 1/8 voxel, larger ones less finely


@torch.no_grad()
def recover_velocity(
    network: VelocityUNet,
    image: Tensor,
    ddf: Tensor,
    levels: Sequence[float],
    *,
    steps: int = 12,
    over_relaxation: float = OVER_RELAXATION,
    predict: Predict | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Remove a random field of known level in few steps (Algorithm 2 with velocities).

    At step ``k`` of ``K`` the level left is ``s_k = s (1 - k / K)``; the network says which velocity undoes a
    deformation of that level, in the deformed image and in the original, and the field is composed with the flow of a
    share of the difference.

    Args:
        network: a ``VelocityUNet``.
        image: ``(B, C, *S)`` original images in the network's input range, sizes odd.
        ddf: ``(B, D, *H)`` voxels of the half grid, the diffused field.
        levels: deformation level of each image.
        steps: number of steps, 1 or more; each costs a prediction, every fourth one two.
        over_relaxation: factor on every step; more of it stays closer to the original, less leaves more of the random
            field.
        predict: takes the place of ``network`` where velocities are predicted: the same in lower precision or
            compiled.
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
    for k in tqdm(range(steps), desc="recover", unit="step", disable=not progress):
        if k % _ANCHOR_EVERY == 0:
            anchor = predict(image, left[k])
        ddf = recovery_step(predict, image, unseen, ddf, left[k], over_relaxation * share[k], anchor)
        if callback is not None:
            callback(RecoveryStep(k, steps - 1 - k, ddf))
    if not bool(torch.isfinite(ddf).all()):
        raise ValueError(
            f"network {network.card.name!r} predicts velocities that are NaN or infinite. Check its weights."
        )
    return mend_folds(ddf)


def timetable(levels: Sequence[float], steps: int, ddf: Tensor) -> tuple[Tensor, Tensor]:
    """Level left before each step and time that it takes away, ``(K, B)`` each; on the device before the loop."""
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
    """Smooth what the image does not show, then go a part of the way that the network says. The host waits for nothing.

    Args:
        predict: velocities ``(B, D, *H)`` from images and levels.
        image: as in ``recover_velocity``.
        unseen: ``flatness`` of the image.
        ddf: ``(B, D, *H)`` voxels of the half grid.
        level: ``(B,)`` level of each field.
        time: ``(B,)`` integration time of the step.
        anchor: ``(B, D, *H)`` what the network says of the original image, to be taken off; None: nothing.

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
    """Where an image shows nothing that a deformation could be seen by: 1 in flat regions, near 0 at edges.

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
