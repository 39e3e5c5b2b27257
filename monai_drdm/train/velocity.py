"""One step of training: what the network is shown, and what it should have said."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monai_drdm.diffusion.recover_velocity import flatness, OVER_RELAXATION, Predict, recovery_step, timetable
from monai_drdm.diffusion.schedule import integration_times
from monai_drdm.fields import compose, exp_svf, resize_ddf, warp
from monai_drdm.train.augmentation import change_appearance, deform_images, Deformed, uniform
from monai_drdm.train.config import TrainConfig
from monai_drdm.train.data import ScanBank
from monai_drdm.train.losses import folding_loss, relative_energy, velocity_loss
from monai_drdm.train.synthetic import synthetic_images

_MAX_STEPS = 8
_MAX_ROLL_OUT = 2
_SQUARINGS = 6


@dataclass(frozen=True)
class Target:
    """What the loss compares a prediction with."""

    level: Tensor
    """``(B,)`` the level that the network was told."""
    velocity: Tensor
    """``(B, D, *H)`` the velocity that undoes the first deformation."""
    ddf: Tensor
    """``(B, D, *H)`` voxels of the half grid: the deformation that is left."""
    start: Tensor
    """``(B, D, *H)`` voxels of the half grid: the first deformation, in which what is left is measured."""
    rolled_out: bool
    """The network has recovered a part already: what is left is no longer the flow of the velocity."""


def draw_batch(
    config: TrainConfig,
    bank: ScanBank | None,
    network: Predict,
    generator: torch.Generator,
) -> tuple[Tensor, Target]:
    """A batch that depends on the generator, and where it is rolled out on the network, only.

    Args:
        config: the run's settings.
        bank: real scans; None: random anatomy alone.
        network: makes the steps of a roll-out, without gradients.
        generator: on the training device.

    Returns:
        Images ``(B, 1, *S)`` and the target.
    """
    images = draw_images(config, bank, generator)
    rolled = float(uniform(generator, (1,), 0.0, 1.0)) < config.roll_out
    batch = deform_images(
        images,
        generator,
        levels=(config.level_low, config.level_high),
        pose=config.pose,
        appearance=None if rolled else config.appearance,
    )
    if not rolled:
        return batch.image, Target(batch.level, batch.velocity, batch.ddf, batch.ddf, False)
    image, level, ddf = _roll_out(batch, network, generator)
    image = change_appearance(image, generator, config.appearance)
    return image, Target(level, batch.velocity, ddf, batch.ddf, True)


def draw_images(config: TrainConfig, bank: ScanBank | None, generator: torch.Generator) -> Tensor:
    """Undeformed images ``(B, 1, *S)``: real scans, random anatomy, or some of both."""
    shape = (config.working_size,) * config.spatial_dims
    made = config.batch_size if bank is None else round(config.synthetic_share * config.batch_size)
    parts = [synthetic_images(generator, made, shape)] if made else []
    if bank is not None and made < config.batch_size:
        parts.append(bank.draw(config.batch_size - made, generator))
    return torch.cat(parts)


def recovery_loss(predicted: Tensor, target: Target, gradient_share: float = 0.0) -> Tensor:
    """Error of the velocity; after a roll-out, what its flow would leave of the deformation. 1 for doing nothing."""
    if not target.rolled_out:
        return velocity_loss(predicted, target.velocity, gradient_share)
    return relative_energy(compose(target.ddf, flow(predicted, target.level)), target.start, gradient_share)


def flow(velocity: Tensor, level: Tensor) -> Tensor:
    """The whole way back that a velocity says: ``exp(τ(level) v)``, differentiable."""
    times = torch.tensor(integration_times(level.tolist(), velocity.shape[1]), device=velocity.device)
    return exp_svf(times.view(-1, *(1,) * (velocity.ndim - 1)) * velocity, squarings=_SQUARINGS)


def folding_of(predicted: Tensor, target: Target) -> Tensor:
    """The folding penalty of the deformation after the predicted way back."""
    return folding_loss(compose(target.ddf, flow(predicted, target.level)))


@torch.no_grad()
def _roll_out(batch: Deformed, network: Predict, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """One or two recovery steps of two to eight: the image, the level left, and the deformation left."""
    device = batch.image.device
    steps = int(torch.randint(2, _MAX_STEPS + 1, (1,), generator=generator, device=device))
    taken = min(int(torch.randint(1, _MAX_ROLL_OUT + 1, (1,), generator=generator, device=device)), steps - 1)
    ddf, unseen = batch.ddf, flatness(batch.posed, batch.ddf.shape[2:])
    left, share = timetable(batch.level.tolist(), steps, ddf)
    for k in range(taken):
        ddf = recovery_step(network, batch.posed, unseen, ddf, left[k], OVER_RELAXATION * share[k])
    image = warp(batch.posed, resize_ddf(ddf, batch.image.shape[2:]))
    return image, batch.level * (1 - taken / steps), ddf
