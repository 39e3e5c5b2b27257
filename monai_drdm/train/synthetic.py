"""Synthetic anatomy: random smooth label maps with random intensities, generated on the training device.

It has touching organs, shells around organs, vessels and membranes, bilateral symmetry, and a body on a background. A
network learns from it what all anatomies have in common, such as smooth boundaries, even walls and regular texture, and
does not depend on the contrast of one modality (Hoffmann et al., IEEE TMI 2022, train registration in this way).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monai_drdm.fields import gaussian_smooth
from monai_drdm.train.augmentation import interpolate_nodes, noise_at_nodes, smooth_noise, uniform

_ORGANS = (6, 16)
_ELLIPSES = 6
_SYMMETRIC = 0.5
_MAX_BLUR_VOX = 0.7


def synthetic_images(generator: torch.Generator, batch: int, shape: Sequence[int]) -> Tensor:
    """Random anatomies.

    Args:
        generator: on the device where the images are generated.
        batch: number of images.
        shape: spatial shape ``S``, 2D or 3D.

    Returns:
        ``(B, 1, *S)`` in [0, 1].
    """
    size = tuple(int(n) for n in shape)
    labels = synthetic_labels(generator, batch, size)
    count = int(labels.max()) + 1
    form = (batch, count, *(1,) * len(size))
    means = uniform(generator, (batch, count), 0.05, 1.0)
    dark = torch.rand(batch, generator=generator, device=generator.device) < 0.8
    means[:, 0] = torch.where(dark, means[:, 0] * 0.1, means[:, 0])
    texture = uniform(generator, (batch, count), 0.0, 0.12)
    texture[:, 0] = torch.where(dark, texture[:, 0] * 0.1, texture[:, 0])
    means, texture = means.view(form), texture.view(form)
    fine = smooth_noise(generator, batch, 1, size, 40) + 0.5 * smooth_noise(generator, batch, 1, size, 80)
    image = _look_up(means, labels)
    image = image + _look_up(texture, labels) * fine
    image = gaussian_smooth(image, float(uniform(generator, (1,), 0.3, _MAX_BLUR_VOX)))
    return image.clamp(0, 1)


def synthetic_labels(generator: torch.Generator, batch: int, shape: Sequence[int]) -> Tensor:
    """Random label maps: 0 background, then organs, shells around some, ellipsoids with walls, and tubes.

    Args:
        generator: as in ``synthetic_images``.
        batch: as in ``synthetic_images``.
        shape: as in ``synthetic_images``.

    Returns:
        ``(B, 1, *S)`` int64.
    """
    size = tuple(int(n) for n in shape)
    labels, edge, used = _organs(generator, batch, size)
    labels, used = _shells(generator, labels, edge, used)
    labels, used = _ellipsoids(generator, labels, used)
    labels, used = _tubes(generator, labels, used)
    return labels.masked_fill_(~_body(generator, batch, size), 0).long()


def _organs(generator: torch.Generator, batch: int, size: tuple[int, ...]) -> tuple[Tensor, Tensor, int]:
    """Which of several smooth fields is the largest, ``(B, 1, *S)`` uint8 from 1; by how much; and the next label.

    The fields are made one at a time: all of them would not fit into the cache.
    """
    device = generator.device
    count = int(torch.randint(*_ORGANS, (1,), generator=generator, device=device))
    nodes = int(torch.randint(3, 8, (1,), generator=generator, device=device))
    coarse, fine = (noise_at_nodes(generator, batch, count, size, n) for n in (nodes, 9))
    symmetric = (torch.rand(batch, generator=generator, device=device) < _SYMMETRIC).view(-1, *(1,) * (len(size) + 1))
    best = torch.full((batch, 1, *size), -torch.inf, device=device)
    second = best.clone()
    labels = torch.zeros_like(best, dtype=torch.uint8)
    for k in range(count):
        field = interpolate_nodes(coarse[:, k : k + 1], size) + 0.4 * interpolate_nodes(fine[:, k : k + 1], size)
        field = torch.where(symmetric, field + field.flip(2), field)
        torch.maximum(second, torch.minimum(best, field), out=second)
        labels.masked_fill_(field > best, k + 1)
        torch.maximum(best, field, out=best)
    return labels, best - second, count + 1


def _shells(generator: torch.Generator, labels: Tensor, edge: Tensor, used: int) -> tuple[Tensor, int]:
    """A wall with a label of its own, drawn into ``labels`` inside the border of every second organ.

    ``edge`` is 0 at the borders and grows inwards.
    """
    width = uniform(generator, (labels.shape[0],), 0.05, 0.4).view(-1, *(1,) * (labels.ndim - 1))
    return labels.masked_fill_((labels % 2 == 0) & (edge < width), used), used + 1


def _ellipsoids(generator: torch.Generator, labels: Tensor, used: int) -> tuple[Tensor, int]:
    """Bumpy ellipsoids, each with a wall, drawn into ``labels``: like chambers, cut vessels, bones or eyes."""
    batch, size, dims = labels.shape[0], labels.shape[2:], labels.ndim - 2
    scale = torch.tensor([(n - 1) / 2 for n in size], device=labels.device)
    for _ in range(_ELLIPSES):
        centre = scale * (1 + uniform(generator, (batch, dims), -0.7, 0.7))
        radius = max(size) * uniform(generator, (batch, dims), 0.03, 0.2)
        bumps = 0.15 * smooth_noise(generator, batch, 1, size, 6)
        distance = _elliptic_distance(size, centre, radius) + bumps
        wall = 1 - uniform(generator, (batch,), 0.0, 0.5).view(-1, *(1,) * (dims + 1))
        labels.masked_fill_(distance < 1, used).masked_fill_(distance < wall, used + 1)
        used += 2
    return labels, used


def _tubes(generator: torch.Generator, labels: Tensor, used: int) -> tuple[Tensor, int]:
    """Winding bands in 2D, where one smooth field is near zero; vessels in 3D, where two are; drawn into ``labels``."""
    batch, size, dims = labels.shape[0], labels.shape[2:], labels.ndim - 2
    width = uniform(generator, (batch,), 0.02, 0.12).view(-1, *(1,) * (dims + 1)) * (dims - 1)
    fields = smooth_noise(generator, batch, dims - 1, size, 4)
    inside = (fields.abs() < width).all(dim=1, keepdim=True)
    return labels.masked_fill_(inside, used), used + 1


def _body(generator: torch.Generator, batch: int, size: tuple[int, ...]) -> Tensor:
    """A bumpy ellipsoid that fills most or all of the image: ``(B, 1, *S)`` bool."""
    centre = torch.tensor([(n - 1) / 2 for n in size], device=generator.device).expand(batch, -1)
    radius = centre.clamp(min=0.5) * uniform(generator, (batch, len(size)), 0.6, 1.6)
    return _elliptic_distance(size, centre, radius) + 0.08 * smooth_noise(generator, batch, 1, size, 8) < 1


def _elliptic_distance(size: Sequence[int], centre: Tensor, radius: Tensor) -> Tensor:
    """Distance ``(B, 1, *S)`` from a centre ``(B, D)`` in units of the radii ``(B, D)``: 1 on the ellipsoid."""
    squared = torch.zeros(1, device=centre.device)
    for d, n in enumerate(size):
        along = (torch.arange(n, device=centre.device) - centre[:, d : d + 1]) / radius[:, d : d + 1]
        squared = squared + along.square().view(-1, 1, *(n if axis == d else 1 for axis in range(len(size))))
    return squared.sqrt()


def _look_up(values: Tensor, labels: Tensor) -> Tensor:
    """The value of every voxel's label, ``(B, 1, *S)``, from a table ``(B, K, 1, …)``."""
    flat = values.flatten(1).gather(1, labels.flatten(1))
    return flat.view(labels.shape)
