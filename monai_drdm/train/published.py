"""How a ``RecResACNet`` is trained, as published (paper, Algorithm 1).

The random process and the loss of the authors' release, for batches on the training device. What the network predicts,
and the field that it is compared with, are in the published units: fractions of the image size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn, Tensor

from monai_drdm.diffusion.diffuse import EXTRA_NOISE
from monai_drdm.diffusion.recover import image_mode
from monai_drdm.diffusion.schedule import composition_counts
from monai_drdm.fields import compose, control_grid_velocity, crop, fractions_to_voxels, power, warp
from monai_drdm.fields.random_velocity import CONTROL_SIZE, NODE_STD
from monai_drdm.networks import RecoveryNetwork, RecResACNet
from monai_drdm.networks.recresacnet import TIME_STEPS
from monai_drdm.train.augmentation import change_appearance, random_pose, sample_posed
from monai_drdm.train.config import TrainConfig
from monai_drdm.train.data import ScanBank
from monai_drdm.train.recovery import draw_images, RecoveryTask
from monai_drdm.training.folding import folding_loss
from monai_drdm.training.task import Batch, Predict

_INITIAL_SCALE = 1e-2
_VISIBLE_NODES = CONTROL_SIZE // 2 + 2
"""Nodes per axis of the control grid around the image, which covers the central half of it."""
_STRIDE = 8
_EPSILON = 1e-7


@dataclass(frozen=True)
class PublishedTarget:
    """What the published loss compares a prediction with."""

    total: Tensor
    """``(B, D, *S)`` voxels: the whole deformation."""
    last: Tensor
    """``(B, D, *S)`` fractions of the image size: the small field to undo, ψ_t."""


class PublishedTask(RecoveryTask):
    """The training of a ``RecResACNet`` as published."""

    def new_network(self) -> RecoveryNetwork:
        """An untrained network with small predictions: random weights would displace by more than the image size."""
        network = RecResACNet(self.config.spatial_dims)
        with torch.no_grad():
            network.conv_out.weight *= _INITIAL_SCALE
            assert network.conv_out.bias is not None
            nn.init.zeros_(network.conv_out.bias)
        return network

    def build_network(self) -> RecoveryNetwork:
        """The network to train; its table of time embeddings stays as it is."""
        network = super().build_network()
        assert isinstance(network, RecResACNet)
        network.time_embed.requires_grad_(False)
        return network

    def batch(self, network: Predict, generator: torch.Generator, *, validate: bool = False) -> Batch:
        """Deformed images with their time steps."""
        deformed, t, target = draw_published_batch(self.config, self.scans(validate), generator)
        return Batch(deformed, target, (t,))

    def loss(self, predicted: Tensor, target: PublishedTarget) -> Tensor:
        """The error and the penalty on folding."""
        loss = self.error(predicted, target)
        if self.config.folding_weight > 0:
            loss = loss + self.config.folding_weight * published_folding(predicted, target)
        return loss

    def error(self, predicted: Tensor, target: PublishedTarget) -> Tensor:
        """Distance, angle and smoothness."""
        return published_loss(self.config, predicted, target)


@torch.no_grad()
def draw_published_batch(
    config: TrainConfig, bank: ScanBank | None, generator: torch.Generator
) -> tuple[Tensor, Tensor, PublishedTarget]:
    """Draw a batch, which depends on the generator only.

    Images are posed first and deformed then, so that voxels outside the posed image are black, as in recovery.

    Args:
        config: the run's settings.
        bank: real scans; None: random anatomy only.
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
    """``diffusion.diffuse_published`` for a batch of time steps, with up to 6 times fewer compositions.

    Total fields differ from the released ones by at most 1.5 % of their mean displacement, and fold as often.

    Args:
        generator: makes the fields of all samples, on its device.
        t: ``(B,)`` time steps, 1 to 79.
        size: image size; images are square or cubic.
        spatial_dims: 2 or 3.

    Returns:
        The total displacement and the training target, each ``(B, D, size, …)`` in fractions of the image size.

    Raises:
        ValueError: a time step is outside 1 to 79.
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
    """The weighted sum of distance, angle and smoothness.

    Distance and angle compare the small field at ``x`` with the prediction at the point where the small field leads.

    Args:
        config: gives the weights.
        predicted: ``(B, D, *S)`` fractions of the image size.
        target: what it is compared with.
    """
    there = sample_at(predicted, fractions_to_voxels(target.last))
    return (
        config.distance_weight * distance_loss(there, target.last)
        + config.angle_weight * angle_loss(there, target.last)
        + config.smoothness_weight * smoothness_loss(predicted)
    )


def published_folding(predicted: Tensor, target: PublishedTarget) -> Tensor:
    """The folding penalty of the whole deformation, composed with the predicted step back."""
    return folding_loss(compose(target.total, fractions_to_voxels(predicted)))


def distance_loss(predicted: Tensor, ddf: Tensor) -> Tensor:
    """The distance of the prediction from the inverse displacement: ``mean |p + ψ|² / (|ψ|² + ε)`` (published).

    Args:
        predicted: ``(B, D, *S)``, the prediction sampled where ``ψ`` points (``sample_at``).
        ddf: ``(B, D, *S)`` displacements ``ψ`` to undo, in the same units.

    Returns:
        A number; 1 for a prediction of zero.
    """
    missed = (predicted + ddf).square().sum(dim=1)
    return (missed / (ddf.square().sum(dim=1) + _EPSILON)).mean()


def angle_loss(predicted: Tensor, ddf: Tensor) -> Tensor:
    """Mean cosine between prediction and displacement; -1 if they are opposite everywhere (published).

    Args:
        predicted: as in ``distance_loss``.
        ddf: as in ``distance_loss``.
    """
    return F.cosine_similarity(predicted, ddf, dim=1).mean()


def smoothness_loss(ddf: Tensor, free: float = 1e-4) -> Tensor:
    """Mean excess of differences between neighbours over a threshold: ``mean relu(|Δ| - free)`` (published).

    Args:
        ddf: ``(B, D, *S)``.
        free: differences up to this cost nothing, in the units of ``ddf``; published in fractions of the image size.
    """
    axes = [d for d in range(2, ddf.ndim) if ddf.shape[d] > 1]
    if not axes:
        return ddf.sum() * 0.0
    return torch.stack([F.relu(ddf.diff(dim=d).abs() - free).mean() for d in axes]).mean()


def sample_at(predicted: Tensor, ddf: Tensor) -> Tensor:
    """The prediction at ``x + ψ(x)``, extended by its border values: the first argument of ``distance_loss``.

    Args:
        predicted: ``(B, D, *S)``.
        ddf: ``(B, D, *S)`` voxels.
    """
    return warp(predicted, ddf, "bilinear", "border")


def _repeated(step: Tensor, counts: Tensor) -> Tensor:
    """``step`` composed with itself ``counts`` times, eight at a time.

    Every composition interpolates, and so smooths the field a little. Binary powers need fewer compositions and smooth
    less: at t = 79 their fields differ by 8 % from the released ones and fold three times as often.
    """
    ddf, stride = power(step, counts % _STRIDE), power(step, _STRIDE)
    for done in range(int(counts.max()) // _STRIDE):
        left = (counts // _STRIDE > done).nonzero()[:, 0].to(step.device)
        ddf[left] = compose(ddf[left], stride[left])
    return ddf


def _to_image(ddf: Tensor, size: int) -> Tensor:
    """Resample a field of the control grid to the image in its central half, linearly.

    Displacements in voxels of the control grid become fractions of the image size, by the factor of the authors'
    release: ``size / 64`` on fractions of the control grid.
    """
    # node b of the control grid is at voxel (b + 1/2) · size / 32 - 1/2 of an image of twice the size
    position = (torch.arange(size, dtype=torch.float64) + size // 2 + 0.5) * (CONTROL_SIZE / 2 / size) - 0.5
    nodes = torch.arange(_VISIBLE_NODES, dtype=torch.float64) + (CONTROL_SIZE - _VISIBLE_NODES) // 2
    weights = (1 - (position[:, None] - nodes).abs()).clamp(min=0).to(ddf)
    ddf = crop(ddf, (_VISIBLE_NODES,) * (ddf.ndim - 2), centre=True)
    with torch.autocast(ddf.device.type, enabled=False):
        for axis in range(2, ddf.ndim):
            ddf = torch.movedim(torch.movedim(ddf, axis, -1) @ weights.T, -1, axis)
    return ddf.contiguous() * (size / CONTROL_SIZE**2)
