"""Mirror symmetry: whether an image has it, across which plane, and how much of it a field breaks.

Brains, chests, pelvises and faces have two like halves. A random field makes them unequal, and a network that was
trained on all kinds of anatomies in all poses mends that no better than anything else. The image itself says what is
right: if it agrees with its own mirror image, the part of a field that differs from the field's mirror image is not
plausible, and can be taken off. Shifts and turns are not: they leave the halves as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from monai_drdm.fields import gaussian_smooth, identity_grid, resize_image, sample

_SIZE = 25
"""Longest side of the grid on which planes are sought."""
_FINE_SIGMA, _COARSE_SIGMA = 0.7, 4.0
"""Structures between these sizes, in voxels of that grid, must agree. Any round outline would agree with itself."""
_LEAST, _FULL = 0.9, 0.97
"""Correlations with the mirror image from which an image counts as symmetric in part, and wholly.

Brains reach 0.97 to 1, chest X-rays 0.9 to 0.96. A round or fan-shaped field of view with anything in it reaches 0.9,
hearts and hippocampi 0.8.
"""
_OVERLAP = 0.6
"""Share of the image that must have a mirror image inside the image."""
_THINNEST = 0.25
"""Share of the longest side that an image must have across the plane: a few slices resemble each other anyway."""
_BETTER = 1e-4
"""By how much a plane must be better than one that was tried before it, so that rounding does not decide."""
_FAINT = 1e-3
"""Root mean square of the structures, in intensity ranges, below which nothing can be said."""
_FIRST_TILT_DEG, _LAST_TILT_DEG = 8.0, 1.0


class Mirror(NamedTuple):
    """The plane (in 2D: line) of each image across which it is most symmetric."""

    normal: Tensor
    """``(B, D)`` unit vector across the plane."""
    point: Tensor
    """``(B, D)`` voxels: a point on it."""
    weight: Tensor
    """``(B,)`` how symmetric the image is: 0 not at all, 1 as a brain is."""


def find_mirror(images: Tensor) -> Mirror:
    """Find the plane across which each image is most symmetric.

    Images are compared with their mirror images on a coarse grid, by the correlation of structures of middle size.
    Planes across the principal axes of the intensities and across the axes of the grid are tried; the best is tilted
    and shifted while that helps. No symmetry is found in constant images.

    Args:
        images: ``(B, C, *S)`` in [0, 1], 2D or 3D.

    Returns:
        The planes, in voxels of the images, on their device. They are computed on the CPU.
    """
    dims, full = images.ndim - 2, images.shape[2:]
    longest = max(full)
    shape = [n if longest <= _SIZE else max(2, round((n - 1) * (_SIZE - 1) / (longest - 1)) + 1) for n in full]
    shape = [min(m, n) for m, n in zip(shape, full)]
    small = resize_image(images.float().mean(dim=1, keepdim=True), shape).cpu()
    found = [_find(one[None]) for one in small]
    scale = torch.tensor([(n - 1) / (m - 1) if m > 1 else 1.0 for n, m in zip(full, shape)])
    normals = torch.stack([normal for normal, _, _ in found]) / scale  # a plane's normal goes with the inverse
    normals = normals / normals.norm(dim=1, keepdim=True)
    points = torch.stack([point for _, point, _ in found]) * scale
    scores = torch.tensor([score for _, _, score in found])
    weights = ((scores - _LEAST) / (_FULL - _LEAST)).clamp(0, 1)
    assert normals.shape == (len(images), dims)
    return Mirror(*(one.to(images.device) for one in (normals, points, weights)))


def keep_symmetry(ddf: Tensor, mirror: Mirror, share: float) -> Tensor:
    """Take off a share of that part of a field which differs from the field's own mirror image, but for a rigid motion.

    Args:
        ddf: ``(B, D, *H)`` in voxels.
        mirror: planes in voxels of the same grid.
        share: in [0, 1]; it is multiplied by the symmetry of each image.

    Returns:
        ``(B, D, *H)``. With a share and a symmetry of 1, it is the sum of a field that is its own mirror image, apart
        from interpolation, and of a shift and a turn to first order.
    """
    form = (1,) * (ddf.ndim - 2)
    where = _reflect(identity_grid(ddf.shape[2:], device=ddf.device, dtype=ddf.dtype)[None], mirror)
    normal = mirror.normal.to(ddf.dtype).view(*mirror.normal.shape, *form)
    across = sample(ddf, where)
    mirrored = across - 2 * (across * normal).sum(dim=1, keepdim=True) * normal
    odd = (ddf - mirrored) / 2
    return ddf - share * mirror.weight.to(ddf.dtype).view(-1, 1, *form) * (odd - _rigid_part(odd))


def _rigid_part(ddf: Tensor) -> Tensor:
    """The shift and, to first order, the turn ``(B, D, *H)`` that are closest to a field."""
    grid = identity_grid(ddf.shape[2:], device=ddf.device, dtype=ddf.dtype)
    away = (grid - grid.flatten(1).mean(dim=1).view(-1, *(1,) * (ddf.ndim - 2))).flatten(1)
    shift = ddf.flatten(2).mean(dim=2)
    linear = torch.einsum("bin,jn->bij", ddf.flatten(2), away) / away.square().sum(dim=1).clamp(min=1)
    turn = (linear - linear.mT) / 2
    return (shift[..., None] + turn @ away).view_as(ddf)


def _reflect(position: Tensor, mirror: Mirror) -> Tensor:
    """The mirror images ``(B, D, *S)`` of positions ``(1 or B, D, *S)``."""
    form = (1,) * (position.ndim - 2)
    normal, point = (one.to(position.dtype).view(*one.shape, *form) for one in mirror[:2])
    return position - 2 * ((position - point) * normal).sum(dim=1, keepdim=True) * normal


def _find(image: Tensor) -> tuple[Tensor, Tensor, float]:
    """Normal, point and correlation of the best plane of one coarse image ``(1, 1, *S)``."""
    structure = gaussian_smooth(image, _FINE_SIGMA) - gaussian_smooth(image, _COARSE_SIGMA)
    dims, middle = image.ndim - 2, torch.tensor([(n - 1) / 2 for n in image.shape[2:]])
    if float(structure.square().mean().sqrt()) < _FAINT:
        return torch.eye(dims)[0], middle, 0.0
    centre, axes = _principal_axes(image[0, 0])
    normals = torch.cat((axes, torch.eye(dims)))
    points = torch.cat((centre.expand(dims, -1), middle.expand(dims, -1)))
    scores = _correlations(structure, normals, points)
    best, tilt = _first_of_the_best(scores), _FIRST_TILT_DEG
    normal, point, score = normals[best], points[best], scores[best]
    while tilt >= _LAST_TILT_DEG:
        normals, points = _neighbours(normal, point, tilt)
        scores = _correlations(structure, normals, points)
        best = _first_of_the_best(scores)
        if scores[best] > score + _BETTER:
            normal, point, score = normals[best], points[best], scores[best]
        else:
            tilt /= 2
    return normal, point, float(score)


def _first_of_the_best(scores: Tensor) -> int:
    """The number of the first score that no other is noticeably above."""
    return int((scores >= scores.max() - _BETTER).nonzero()[0])


def _principal_axes(image: Tensor) -> tuple[Tensor, Tensor]:
    """Centre ``(D,)`` and orthonormal axes ``(D, D)``, one in each row, of the intensities of an image."""
    weight = (image - image.min()).flatten()
    weight = weight / weight.sum()
    position = identity_grid(image.shape).flatten(1)
    centre = position @ weight
    away = position - centre[:, None]
    return centre, torch.linalg.eigh((away * weight) @ away.T)[1].T


def _neighbours(normal: Tensor, point: Tensor, tilt_deg: float) -> tuple[Tensor, Tensor]:
    """A plane ``(D,)`` tilted both ways about every direction in it, then shifted both ways."""
    directions = torch.linalg.svd(normal[None])[2][1:]
    tilts = math.tan(math.radians(tilt_deg)) * torch.cat((directions, -directions))
    tilted = normal + tilts
    tilted = tilted / tilted.norm(dim=1, keepdim=True)
    shifts = tilt_deg / 6 * torch.stack((normal, -normal))
    normals = torch.cat((tilted, normal.expand(2, -1)))
    return normals, torch.cat((point.expand(len(tilted), -1), point + shifts))


def _correlations(structure: Tensor, normals: Tensor, points: Tensor) -> Tensor:
    """Correlations ``(N,)`` of an image ``(1, 1, *S)`` with its mirror images across planes ``(N, D)``."""
    where = _reflect(identity_grid(structure.shape[2:])[None], Mirror(normals, points, torch.ones(len(normals))))
    form = (1, -1, *(1,) * (where.ndim - 2))
    last = torch.tensor([n - 1.0 for n in structure.shape[2:]]).view(form)
    inside = ((where >= -0.5) & (where <= last + 0.5)).all(dim=1).flatten(1).float()
    mirrored = sample(structure.expand(len(normals), *structure.shape[1:]), where).flatten(1)
    here, there = (_centred(one, inside) for one in (structure.flatten(1), mirrored))
    energy = (here.square().sum(dim=1) * there.square().sum(dim=1)).sqrt()
    across = normals.abs() @ torch.tensor([float(n) for n in structure.shape[2:]])
    enough = (inside.mean(dim=1) >= _OVERLAP) & (across >= _THINNEST * max(structure.shape[2:]))
    return torch.where(enough, (here * there).sum(dim=1) / energy.clamp(min=1e-12), -torch.ones(len(normals)))


def _centred(values: Tensor, inside: Tensor) -> Tensor:
    """Values ``(1 or N, V)`` less their means over the voxels ``(N, V)`` that count; 0 elsewhere."""
    mean = (values * inside).sum(dim=1, keepdim=True) / inside.sum(dim=1, keepdim=True).clamp(min=1)
    return (values - mean) * inside


def half_grid(mirror: Mirror, shape: Sequence[int]) -> Mirror:
    """The same planes in voxels of the half grid of a grid of this shape."""
    halves = mirror.point.new_tensor([0.5 if n > 1 else 1.0 for n in shape])
    normal = mirror.normal / halves
    return Mirror(normal / normal.norm(dim=1, keepdim=True), mirror.point * halves, mirror.weight)
