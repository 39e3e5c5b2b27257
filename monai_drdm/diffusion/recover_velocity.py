"""Recovery with a network that predicts velocities: few cheap steps, each a small diffeomorphism."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from monai_drdm.diffusion.recover import Callback, RecoveryStep
from monai_drdm.diffusion.schedule import integration_time, levels_of_batch
from monai_drdm.fields import compose, exp_svf, mend_folds, resize_ddf, warp
from monai_drdm.networks import VelocityUNet

OVER_RELAXATION = 1.5
"""Every step goes this much farther than its share of the way: later steps correct what it overshoots."""


@torch.no_grad()
def recover_velocity(
    network: VelocityUNet,
    image: Tensor,
    ddf: Tensor,
    levels: Sequence[float],
    *,
    steps: int = 8,
    over_relaxation: float = OVER_RELAXATION,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Remove a random field of known level in few steps (Algorithm 2 with velocities).

    At step ``k`` of ``K`` the level left is ``s_k = s (1 - k / K)``; the network says which velocity undoes a
    deformation of that level, and the field is composed with the flow of its share of it.

    Args:
        network: a ``VelocityUNet``.
        image: ``(B, C, *S)`` original images in the network's input range, sizes odd.
        ddf: ``(B, D, *H)`` voxels of the half grid, the diffused field.
        levels: deformation level of each image.
        steps: number of steps, 1 or more; each costs one prediction.
        over_relaxation: factor on every step.
        callback: called after each step; its ``time`` is the number of steps left.
        progress: show a progress bar.

    Returns:
        ``(B, D, *H)`` voxels of the half grid.

    Raises:
        ValueError: ``steps`` below 1, or a level outside (0, 1].
    """
    if steps < 1:
        raise ValueError(f"sampler 'velocity': steps must be 1 or more, got {steps}.")
    levels = levels_of_batch(levels, ddf.shape[0], "recover_velocity")
    form = (-1, *(1,) * (ddf.ndim - 1))
    for k in tqdm(range(steps), desc="recover", unit="step", disable=not progress):
        left = [level * (1 - k / steps) for level in levels]
        after = [level * (1 - (k + 1) / steps) for level in levels]
        share = [_time(a, ddf) - _time(b, ddf) for a, b in zip(left, after)]
        warped = warp(image, resize_ddf(ddf, image.shape[2:]), "bilinear", "border")
        velocity = network(warped, torch.tensor(left, device=image.device))
        step = torch.tensor(share, device=ddf.device).view(form) * over_relaxation * velocity
        ddf = compose(ddf, exp_svf(step))
        if callback is not None:
            callback(RecoveryStep(k, steps - 1 - k, ddf))
    return mend_folds(ddf)


def _time(level: float, ddf: Tensor) -> float:
    return integration_time(level, ddf.shape[1]) if level > 0 else 0.0
