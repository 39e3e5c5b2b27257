"""Deformation diffusion: random fields of a given level (paper §3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_drdm.diffusion.schedule import composition_counts, integration_time, levels_of_batch
from monai_drdm.fields import control_grid_velocity, crop, exp_svf, identity_grid, isotropic_velocity, sample
from monai_drdm.fields.random_velocity import CONTROL_SIZE, NODE_STD

EXTRA_NOISE = 0.08
"""Strength of the second random field that the published process adds to the first, relative to it."""


def diffuse(
    generators: Sequence[torch.Generator],
    shape: Sequence[int],
    level: float | Sequence[float],
    spacing: Sequence[float] | None = None,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """A random diffeomorphic field ``exp(s · v)``, geometrically consistent on any grid.

    The velocity has the published multi-scale spectrum on physically isotropic nodes. The factor ``s`` is calibrated so
    that a level gives the same mean displacement, as a fraction of the longest side, as the released process does at
    256² (2D) and 128³ (3D).

    Args:
        generators: one CPU generator per sample; each sample depends on its own generator only.
        shape: spatial shape ``S``.
        level: deformation level in (0, 1], one or one per sample.
        spacing: mm per voxel along each axis; None is isotropic.
        device: where the field is integrated and returned.

    Returns:
        ``(B, D, *S)`` voxels, float32.

    Raises:
        ValueError: a level outside (0, 1], a wrong number of levels, shape or spacing that do not fit.
    """
    levels = levels_of_batch(level, len(generators), "diffuse")
    times = torch.tensor([integration_time(one, len(shape)) for one in levels], dtype=torch.float32)
    velocity = isotropic_velocity(generators, shape, spacing) * times.view(-1, *(1,) * (len(shape) + 1))
    return exp_svf(velocity.to(device))


def diffuse_published(
    generators: Sequence[torch.Generator], size: int, spatial_dims: int, t: int, *, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """The released forward process, including its amplitude factor ``size / 64``, which doubles displacements at 256.

    It is for networks that were trained on it. Use ``diffuse`` for everything else.

    Args:
        generators: one CPU generator per sample.
        size: image size; images are square or cubic here.
        spatial_dims: 2 or 3.
        t: time step, 0 to 79.
        device: where the field is integrated and returned.

    Returns:
        The total displacement and the training target, each ``(B, D, size, …)`` in fractions of the image size.

    Raises:
        ValueError: ``t`` outside 0 to 79.
    """
    total_count, target_count = composition_counts(t)
    control = float(CONTROL_SIZE)
    velocity = control_grid_velocity(generators, spatial_dims).to(device) * control
    extra = control_grid_velocity(generators, spatial_dims, NODE_STD * EXTRA_NOISE).to(device) * control
    total = _self_compose(_compose(extra, velocity), total_count)
    target = _self_compose(velocity, target_count)
    return _to_image(total / control, size), _to_image(target / control, size)


def _self_compose(step: Tensor, count: int) -> Tensor:
    """Repeat ``u <- step + u(x + step)`` ``count`` times from zero, in the order of operations of the release."""
    ddf = torch.zeros_like(step)
    for _ in range(count):
        ddf = _compose(ddf, step)
    return ddf


def _compose(first: Tensor, second: Tensor) -> Tensor:
    """``compose`` with the arithmetic of the release; 200 compositions of rough fields amplify rounding differences."""
    grid = identity_grid(second.shape[2:], device=second.device, dtype=second.dtype)
    return sample(first, second + grid) + second


def _to_image(ddf: Tensor, size: int) -> Tensor:
    """From the control grid to the image as in the release: scale by ``size / 64``, resize to twice the size, crop."""
    dims = ddf.shape[1]
    large = F.interpolate(
        ddf * (size / CONTROL_SIZE),
        (2 * size,) * dims,
        mode="bilinear" if dims == 2 else "trilinear",
        align_corners=False,
    )
    return crop(large, (size,) * dims, centre=True)
