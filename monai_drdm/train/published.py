"""Training as published (paper, Algorithm 1): what a ``RecResACNet`` sees, and what it should say.

The released random process and loss, made for batches on the training device. Fields are in the published units at the
network's boundary, fractions of the image size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monai_drdm.diffusion.diffuse import EXTRA_NOISE
from monai_drdm.diffusion.recover import image_mode
from monai_drdm.diffusion.schedule import composition_counts
from monai_drdm.fields import compose, control_grid_velocity, crop, fractions_to_voxels, power, warp
from monai_drdm.fields.random import CONTROL_SIZE, NODE_STD
from monai_drdm.networks.recresacnet import TIME_STEPS
from monai_drdm.train.augmentation import change_appearance, random_pose, sample_posed
from monai_drdm.train.config import TrainConfig
from monai_drdm.train.data import ScanBank
from monai_drdm.train.losses import angle_loss, distance_loss, folding_loss, sample_at, smoothness_loss
from monai_drdm.train.velocity import draw_images

_SEEN = CONTROL_SIZE // 2 + 2
"""Nodes per axis of the control grid that an image lies between: it covers the central half."""
_STRIDE = 8


@dataclass(frozen=True)
class PublishedTarget:
    """What the published loss compares a prediction with."""

    total: Tensor
    """``(B, D, *S)`` voxels: the whole deformation."""
    last: Tensor
    """``(B, D, *S)`` fractions of the image size: the small field to undo, ψ_t."""


@torch.no_grad()
def draw_published_batch(
    config: TrainConfig, bank: ScanBank | None, generator: torch.Generator
) -> tuple[Tensor, Tensor, PublishedTarget]:
    """A batch that depends on the generator only.

    Images are posed first and deformed then, so that black lies outside the posed image, as it does in recovery.

    Args:
        config: the run's settings.
        bank: real scans; None: random anatomy alone.
        generator: on the training device.

    Returns:
        Images ``(B, 1, *S)``, time steps ``(B,)`` of 1 or more, and the target.
    """
    images = draw_images(config, bank, generator)
    batch, shape = images.shape[0], images.shape[2:]
    low = max(1, int(config.level_low * TIME_STEPS))
    high = max(low, min(TIME_STEPS - 1, int(config.level_high * TIME_STEPS)))
    t = torch.randint(low, high + 1, (batch,), generator=generator, device=generator.device)
    total, last = published_fields(generator, t, shape[0], len(shape))
    total = fractions_to_voxels(total)
    matrix, shift = random_pose(generator, batch, tuple(shape), config.pose)
    posed = sample_posed(images, torch.zeros_like(total), matrix, shift)
    deformed = warp(posed, total, image_mode(images), "zeros")
    return change_appearance(deformed, generator, config.appearance), t, PublishedTarget(total, last)


@torch.no_grad()
def published_fields(generator: torch.Generator, t: Tensor, size: int, spatial_dims: int) -> tuple[Tensor, Tensor]:
    """``diffusion.diffuse_published`` for a batch of time steps, in up to 6 times fewer compositions.

    Total fields are within 1.5 % of their mean displacement of the released ones and fold as often.

    Args:
        generator: makes the fields of all samples, on its device.
        t: ``(B,)`` time steps, 1 to 79.
        size: image size; images are square or cubic.
        spatial_dims: 2 or 3.

    Returns:
        The total displacement and the training target, each ``(B, D, size, …)`` in fractions of the image size.

    Raises:
        ValueError: a time step outside 1 to 79.
    """
    steps = [int(one) for one in t.tolist()]
    if not all(1 <= one < TIME_STEPS for one in steps):
        raise ValueError(f"published_fields: t must be in [1, {TIME_STEPS}), got {steps}.")
    generators = [generator] * len(steps)
    velocity = control_grid_velocity(generators, spatial_dims) * CONTROL_SIZE
    extra = control_grid_velocity(generators, spatial_dims, NODE_STD * EXTRA_NOISE) * CONTROL_SIZE
    total, last = torch.tensor([composition_counts(one) for one in steps]).unbind(1)
    return _to_image(_repeated(compose(extra, velocity), total), size), _to_image(_repeated(velocity, last), size)


def published_loss(config: TrainConfig, predicted: Tensor, target: PublishedTarget) -> Tensor:
    """Distance, angle and smoothness; all but the last where the small field points.

    Args:
        config: the run's settings, for the weights.
        predicted: ``(B, D, *S)`` fractions of the image size.
        target: what was drawn.
    """
    there = sample_at(predicted, fractions_to_voxels(target.last))
    return (
        config.distance_weight * distance_loss(there, target.last)
        + config.angle_weight * angle_loss(there, target.last)
        + config.smoothness_weight * smoothness_loss(predicted)
    )


def published_folding(predicted: Tensor, target: PublishedTarget) -> Tensor:
    """The folding penalty of the deformation after the predicted step back."""
    return folding_loss(compose(target.total, fractions_to_voxels(predicted)))


def _repeated(step: Tensor, counts: Tensor) -> Tensor:
    """``step`` composed with itself ``counts`` times, eight at a time.

    Every composition smooths a field by the interpolation it costs. Binary powers leave that out: at t = 79 their
    fields differ by 8 % and fold three times as often, so networks would be shown others than the published ones were.
    """
    ddf, stride = power(step, counts % _STRIDE), power(step, _STRIDE)
    for done in range(int(counts.max()) // _STRIDE):
        left = (counts // _STRIDE > done).nonzero()[:, 0].to(step.device)
        ddf[left] = compose(ddf[left], stride[left])
    return ddf


def _to_image(ddf: Tensor, size: int) -> Tensor:
    """From voxels of the control grid to fractions of the image that covers its central half, linearly.

    The factor is the released one, ``size / 64`` on fractions of the control grid.
    """
    # node b of the control grid is at voxel (b + 1/2) · size / 32 - 1/2 of an image of twice the size
    position = (torch.arange(size, dtype=torch.float64) + size // 2 + 0.5) * (CONTROL_SIZE / 2 / size) - 0.5
    nodes = torch.arange(_SEEN, dtype=torch.float64) + (CONTROL_SIZE - _SEEN) // 2
    weights = (1 - (position[:, None] - nodes).abs()).clamp(min=0).to(ddf)
    ddf = crop(ddf, (_SEEN,) * (ddf.ndim - 2), centre=True)
    with torch.autocast(ddf.device.type, enabled=False):
        for axis in range(2, ddf.ndim):
            ddf = torch.movedim(torch.movedim(ddf, axis, -1) @ weights.T, -1, axis)
    return ddf.contiguous() * (size / CONTROL_SIZE**2)
