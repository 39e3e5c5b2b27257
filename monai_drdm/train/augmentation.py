"""Random poses, deformations and appearances of training images (paper, Algorithm 1), on the training device.

All random numbers come from one generator, so a batch is a function of the generator's seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from monai_drdm.diffusion.schedule import integration_time
from monai_drdm.fields import exp_svf, gaussian_smooth, identity_grid, isotropic_velocity, resize_ddf, sample
from monai_drdm.networks.velocity_unet import half_shape
from monai_drdm.train.variation import Appearance, Pose


@dataclass(frozen=True)
class Deformed:
    """A batch of deformed images, and the velocity that the network should predict."""

    image: Tensor
    """``(B, C, *S)`` the posed and deformed images, their appearance changed."""
    level: Tensor
    """``(B,)`` deformation levels."""
    velocity: Tensor
    """``(B, D, *H)`` voxels of the half grid: the velocity that undoes the deformation in unit integration time."""
    ddf: Tensor
    """``(B, D, *H)`` voxels of the half grid: the deformation."""
    posed: Tensor
    """``(B, C, *S)`` the posed images, neither deformed nor changed in appearance."""


@torch.no_grad()
def deform_images(
    images: Tensor,
    generator: torch.Generator,
    *,
    levels: tuple[float, float] = (0.02, 1.0),
    pose: Pose | None = None,
    appearance: Appearance | None = None,
) -> Deformed:
    """Pose and deform a batch of images at random, and change their appearance.

    Args:
        images: ``(B, C, *S)`` in [0, 1], sizes odd (or 1), on the training device.
        generator: on the same device.
        levels: range of deformation levels, drawn uniformly.
        pose: how much images are posed; None: not at all.
        appearance: how much their appearance is changed; None: not at all.

    Returns:
        The batch, without gradients.

    Raises:
        ValueError: a size is even.
    """
    if any(n % 2 == 0 for n in images.shape[2:]):
        raise ValueError(f"deform_images: images must have odd sizes, got {tuple(images.shape)}.")
    batch, dims = images.shape[0], images.ndim - 2
    level = uniform(generator, (batch,), *levels)
    times = torch.tensor([integration_time(one, dims) for one in level.tolist()], device=images.device)
    shape = half_shape(images.shape[2:])
    velocity = isotropic_velocity([generator] * batch, shape)
    ddf = exp_svf(velocity * times.view(-1, *(1,) * (dims + 1)))
    matrix, shift = random_pose(generator, batch, images.shape[2:], pose or _NO_POSE)
    full = resize_ddf(ddf, images.shape[2:])
    deformed = sample_posed(images, full, matrix, shift)
    posed = sample_posed(images, torch.zeros_like(full), matrix, shift)
    if appearance is not None:
        deformed = change_appearance(deformed, generator, appearance)
    return Deformed(deformed, level, -velocity, ddf, posed)


def sample_posed(images: Tensor, ddf: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    """Images resampled once by a field followed by a pose: ``image(c + M (x + ddf(x) - c) + shift)``.

    Args:
        images: ``(B, C, *S)``.
        ddf: ``(B, D, *S)`` voxels.
        matrix: ``(B, D, D)``.
        shift: ``(B, D)`` voxels.
    """
    form = (-1, *(1,) * (images.ndim - 2))
    grid = identity_grid(images.shape[2:], device=images.device, dtype=ddf.dtype)
    centre = torch.tensor([(n - 1) / 2 for n in images.shape[2:]], device=images.device, dtype=ddf.dtype)
    position = grid + ddf - centre.view(form)
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 would round coordinates to whole voxels
        turned = torch.einsum("bij,bj...->bi...", matrix, position)
        return sample(images, turned + (centre + shift).view(*shift.shape, *form[1:]), "bilinear", "border")


def random_pose(generator: torch.Generator, batch: int, shape: tuple[int, ...], pose: Pose) -> tuple[Tensor, Tensor]:
    """Random matrices ``(B, D, D)`` of flip, order of axes, scale and rotation, and shifts ``(B, D)`` in voxels."""
    dims, device = len(shape), generator.device
    scale = torch.exp(uniform(generator, (batch, dims), -pose.scale, pose.scale))
    flips = torch.where(torch.rand((batch, dims), generator=generator, device=device) < pose.flip, -1.0, 1.0)
    matrix = torch.diag_embed(scale * flips)
    if len(set(shape)) == 1:
        order = torch.rand((batch, dims), generator=generator, device=device).argsort(dim=1)
        permuted = torch.rand(batch, generator=generator, device=device) < pose.permute
        matrix = torch.where(permuted.view(-1, 1, 1), matrix.gather(1, order[:, :, None].expand_as(matrix)), matrix)
    for i in range(dims):
        for j in range(i + 1, dims):
            angle = uniform(generator, (batch,), -pose.rotation_deg, pose.rotation_deg) * (math.pi / 180)
            turn = torch.eye(dims, device=device).repeat(batch, 1, 1)
            turn[:, i, i] = turn[:, j, j] = angle.cos()
            turn[:, i, j], turn[:, j, i] = -angle.sin(), angle.sin()
            matrix = turn @ matrix
    sizes = torch.tensor(shape, device=device)
    return matrix, uniform(generator, (batch, dims), -pose.shift_frac, pose.shift_frac) * sizes


def change_appearance(images: Tensor, generator: torch.Generator, appearance: Appearance) -> Tensor:
    """Gamma, contrast, bias field, blur and noise; the result is in [0, 1]. All images get the same blur."""
    batch, form = images.shape[0], (-1, *(1,) * (images.ndim - 1))
    gamma = torch.exp(uniform(generator, (batch,), -appearance.gamma, appearance.gamma)).view(form)
    images = images.clamp(0, 1) ** gamma
    mean = images.flatten(1).mean(dim=1).view(form)
    images = mean + (images - mean) * uniform(
        generator, (batch,), 1 - appearance.contrast, 1 + appearance.contrast
    ).view(form)
    images = images * (1 + appearance.bias * smooth_noise(generator, batch, 1, images.shape[2:], 4).clamp(-1, 1))
    images = gaussian_smooth(images, float(uniform(generator, (1,), 0.0, appearance.blur_vox)))
    strength = uniform(generator, (batch,), 0.0, appearance.noise).view(form)
    return (images + strength * _normal(generator, tuple(images.shape))).clamp(0, 1)


def smooth_noise(
    generator: torch.Generator, batch: int, channels: int, shape: tuple[int, ...] | torch.Size, nodes: int
) -> Tensor:
    """Smooth random fields ``(B, C, *S)``: noise of unit variance at about ``nodes`` per side, cubic in between."""
    return interpolate_nodes(noise_at_nodes(generator, batch, channels, shape, nodes), shape)


def noise_at_nodes(
    generator: torch.Generator, batch: int, channels: int, shape: tuple[int, ...] | torch.Size, nodes: int
) -> Tensor:
    """The values of ``smooth_noise`` at its nodes, ``(B, C, *N)``."""
    longest = max(shape)
    lattice = [max(2, round(nodes * n / longest)) if n > 1 else 1 for n in shape]
    return _normal(generator, (batch, channels, *lattice))


def interpolate_nodes(values: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """Cubic interpolation of values at nodes ``(B, C, *N)`` to ``(B, C, *S)``, over the same extent."""
    with torch.autocast(values.device.type, enabled=False):
        for axis in reversed(range(len(shape))):  # one axis at a time needs small matrices only
            weights = _cubic_weights(values.shape[axis + 2], shape[axis], values.device, values.dtype)
            before, done = values.shape[: axis + 2], values.shape[axis + 3 :]
            values = (weights @ values.reshape(*before, values.shape[axis + 2], -1)).reshape(*before, -1, *done)
    return values


@lru_cache(maxsize=64)
def _cubic_weights(nodes: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``(size, nodes)``: cubic interpolation from nodes to voxels over the same extent."""
    with torch.inference_mode(False):  # kept for calls outside it too
        unit = torch.eye(nodes, device=device, dtype=dtype)[None, None]
        return F.interpolate(unit, (nodes, size), mode="bicubic", align_corners=True)[0, 0].T


def uniform(generator: torch.Generator, shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """Uniform numbers in [low, high) on the generator's device."""
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def _normal(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


_NO_POSE = Pose(flip=0.0, rotation_deg=0.0, scale=0.0, shift_frac=0.0)
