"""How a ``VelocityUNet`` is trained: on deformed images whose velocity is known, some of them recovered in part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from monai_drdm.diffusion.recover_velocity import flatness, OVER_RELAXATION, recovery_step, timetable
from monai_drdm.diffusion.schedule import integration_times
from monai_drdm.fields import compose, exp_svf, resize_ddf, warp
from monai_drdm.networks import RecoveryNetwork, VelocityUNet
from monai_drdm.train.augmentation import change_appearance, deform_images, Deformed, uniform
from monai_drdm.train.recovery import draw_images, RecoveryTask
from monai_drdm.training.folding import folding_loss
from monai_drdm.training.task import Batch, Predict

_MAX_STEPS = 8
_MAX_ROLL_OUT = 2
_SQUARINGS = 6
_EPSILON = 1e-7


@dataclass(frozen=True)
class Target:
    """What the loss compares a prediction with."""

    level: Tensor
    """``(B,)`` the deformation level that the network is given."""
    velocity: Tensor
    """``(B, D, *H)`` the velocity that undoes the first deformation."""
    ddf: Tensor
    """``(B, D, *H)`` voxels of the half grid: the deformation that is left."""
    start: Tensor
    """``(B, D, *H)`` voxels of the half grid: the first deformation, by whose size the loss is divided."""
    rolled_out: bool
    """Whether the network has recovered a part already, so that the velocity no longer undoes what is left."""


class VelocityTask(RecoveryTask):
    """The training of a ``VelocityUNet``."""

    def new_network(self) -> RecoveryNetwork:
        """An untrained network."""
        return VelocityUNet(self.config.spatial_dims, 1, self.config.channels)

    def batch(self, network: Predict, generator: torch.Generator, *, validate: bool = False) -> Batch:
        """Deformed images with their levels.

        In a share of the steps, the network first recovers the images in part (a roll-out), so that it learns to
        continue from its own results. Their appearance is changed after that, for the roll-out needs both images in
        one appearance.
        """
        config, images = self.config, draw_images(self.config, self.scans(validate), generator)
        roll_out = float(uniform(generator, (1,), 0.0, 1.0)) < (0.0 if validate else config.roll_out)
        batch = deform_images(
            images,
            generator,
            levels=(config.level_low, config.level_high),
            pose=config.pose,
            appearance=None if roll_out else config.appearance,
        )
        image, level, ddf = batch.image, batch.level, batch.ddf
        if roll_out:
            image, level, ddf = _roll_out(batch, network, generator)
            image = change_appearance(image, generator, config.appearance)
        return Batch(image, Target(level, batch.velocity, ddf, batch.ddf, roll_out), (level,))

    def loss(self, predicted: Tensor, target: Target) -> Tensor:
        """The error and the penalty on folding."""
        loss = self.error(predicted, target)
        if self.config.folding_weight > 0:
            left = compose(target.ddf, flow(predicted, target.level))
            loss = loss + self.config.folding_weight * folding_loss(left)
        return loss

    def error(self, predicted: Tensor, target: Target) -> Tensor:
        """The relative error of the field and of its differences between neighbours."""
        return recovery_loss(predicted, target, self.config.gradient_share)


def recovery_loss(predicted: Tensor, target: Target, gradient_share: float = 0.0) -> Tensor:
    """The error of the velocity or, after a roll-out, what its flow leaves of the deformation; 1 for doing nothing.

    Args:
        predicted: ``(B, D, *H)`` the predicted velocity.
        target: what it is compared with.
        gradient_share: as in ``relative_energy``.
    """
    if not target.rolled_out:
        return velocity_loss(predicted, target.velocity, gradient_share)
    return relative_energy(compose(target.ddf, flow(predicted, target.level)), target.start, gradient_share)


def velocity_loss(predicted: Tensor, velocity: Tensor, gradient_share: float = 0.0) -> Tensor:
    """The error of a velocity, relative to the size of the true one.

    Args:
        predicted: ``(B, D, *S)``.
        velocity: ``(B, D, *S)``.
        gradient_share: as in ``relative_energy``.

    Returns:
        A number; 1 for a prediction of zero.
    """
    return relative_energy(predicted - velocity, velocity, gradient_share, _EPSILON)


def relative_energy(left: Tensor, start: Tensor, gradient_share: float = 0.0, epsilon: float = 1e-3) -> Tensor:
    """The mean square of what is left of a field, and of its differences between neighbours, relative to the start.

    The mean square of a multi-scale field is dominated by its coarsest scale. All scales contribute to the differences
    between neighbours, which are what makes outlines rough.

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


def flow(velocity: Tensor, level: Tensor) -> Tensor:
    """The field that undoes a deformation of a level: ``exp(τ(level) v)``, differentiable.

    Args:
        velocity: ``(B, D, *H)``.
        level: ``(B,)``.
    """
    times = torch.tensor(integration_times(level.tolist(), velocity.shape[1]), device=velocity.device)
    return exp_svf(times.view(-1, *(1,) * (velocity.ndim - 1)) * velocity, squarings=_SQUARINGS)


@torch.no_grad()
def _roll_out(batch: Deformed, network: Predict, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """One or two recovery steps of two to eight: the image, the level and the deformation that are left."""
    device = batch.image.device
    steps = int(torch.randint(2, _MAX_STEPS + 1, (1,), generator=generator, device=device))
    done = min(int(torch.randint(1, _MAX_ROLL_OUT + 1, (1,), generator=generator, device=device)), steps - 1)
    ddf, flat = batch.ddf, flatness(batch.posed, batch.ddf.shape[2:])
    left, share = timetable(batch.level.tolist(), steps, ddf)
    for k in range(done):
        ddf = recovery_step(network, batch.posed, flat, ddf, left[k], OVER_RELAXATION * share[k])
    image = warp(batch.posed, resize_ddf(ddf, batch.image.shape[2:]))
    return image, batch.level * (1 - done / steps), ddf


def _roughness(field: Tensor) -> Tensor:
    """Mean square of differences between neighbours, summed over axes: ``(B,)``."""
    total = field.new_zeros(field.shape[0])
    for d in range(2, field.ndim):
        if field.shape[d] > 1:
            total = total + field.diff(dim=d).square().flatten(1).mean(dim=1)
    return total
