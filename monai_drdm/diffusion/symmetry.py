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
import torch.nn.functional as F
from torch import Tensor

from monai_drdm.fields import gaussian_smooth, identity_grid, resize_image, sample

_SIZE = 25
"""Longest side of the grid on which planes are sought; it spans the object, so that air around it does not count."""
_OBJECT_SIZE = 33
"""Longest side of the grid on which the object is told from the air around it."""
_AIR = 0.08
"""Intensities that differ by less from the usual one at the border, and are connected to it, are air."""
_FINE_SIGMA, _COARSE_SIGMA = 1.0, 4.0
"""Structures between these sizes, in voxels of the grid, must agree."""
_INSIDE = (0.85, 0.91)
_WHOLE = (0.9, 0.95)
"""Correlations with the mirror image, inside the object and with its outline, from which an image counts as symmetric
in part, and wholly. The smaller of both counts.

Inside, brains and their slices reach 0.9 to 0.99, chest X-rays 0.85 to 0.95, halves of brains up to 0.9, hearts, nuclei
and hippocampi 0.3 to 0.9; with the outline, brains 0.94 to 0.99, half of them 0.9 at most, and the others 0.8.
"""
_OVERLAP = 0.6
"""Share of the object that must have a mirror image inside the object."""
_THINNEST = 0.25
"""Share of the longest side that an image must have across the plane: a few slices resemble each other anyway."""
_BETTER = 1e-4
"""By how much a plane must be better than one that was tried before it, so that rounding does not decide."""
_FAINT = 1e-3
"""Root mean square of the structures, in intensity ranges, below which nothing can be said."""
_STARTS = (0.0, -0.15, -0.075, 0.075, 0.15)
"""Where across the axes of the grid planes are first tried, in shares of its sides, from its middle."""
_CLIMBS = 3
"""From how many of the first planes the best is looked for."""
_FIRST_TILT_DEG, _LAST_TILT_DEG = 8.0, 1.0
_FADE = 0.05
"""Over which distance the part of an image that has no mirror image begins, as a share of the longest side."""


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

    Images are compared with their mirror images on a coarse grid about the object, by the correlation of structures of
    middle size: inside the object, and with its outline. Planes across the axes of the grid and across the principal
    axes of the intensities are tried; the best is tilted and shifted while that helps. No symmetry is found in constant
    images.

    Args:
        images: ``(B, C, *S)`` in [0, 1], 2D or 3D.

    Returns:
        The planes, in voxels of the images, on their device. They are computed on the CPU.
    """
    found = [_find_in_object(one[None]) for one in images.float().mean(dim=1, keepdim=True).cpu()]
    return Mirror(*(torch.stack(one).to(images.device) for one in zip(*found)))


def keep_symmetry(ddf: Tensor, mirror: Mirror, share: float) -> Tensor:
    """Take off a share of that part of a field which differs from the field's own mirror image, but for a rigid motion.

    Args:
        ddf: ``(B, D, *H)`` in voxels.
        mirror: planes in voxels of the same grid.
        share: in [0, 1]; it is multiplied by the symmetry of each image.

    Returns:
        ``(B, D, *H)``. With a share and a symmetry of 1, it is the sum of a field that is its own mirror image, apart
        from interpolation, and of a shift and a turn to first order. What has no mirror image in the grid stays.
    """
    form = (1,) * (ddf.ndim - 2)
    where = _reflect(identity_grid(ddf.shape[2:], device=ddf.device, dtype=ddf.dtype)[None], mirror)
    partnered = _inside(where, ddf.shape[2:], _FADE * max(ddf.shape[2:]))
    normal = mirror.normal.to(ddf.dtype).view(*mirror.normal.shape, *form)
    across = sample(ddf, where)
    mirrored = across - 2 * (across * normal).sum(dim=1, keepdim=True) * normal
    odd = (ddf - mirrored) / 2
    wrong = partnered * (odd - _rigid_part(odd, partnered))
    return ddf - share * mirror.weight.to(ddf.dtype).view(-1, 1, *form) * wrong


def _rigid_part(ddf: Tensor, weight: Tensor) -> Tensor:
    """The shift and, to first order, the turn ``(B, D, *H)`` that are closest to a field, by weighted least squares."""
    grid = identity_grid(ddf.shape[2:], device=ddf.device, dtype=ddf.dtype).flatten(1)[None]
    values, weight = ddf.flatten(2), weight.flatten(2)
    weight = weight / weight.sum(dim=2, keepdim=True).clamp(min=1e-6)
    shift, centre = ((weight * one).sum(dim=2, keepdim=True) for one in (values, grid))
    away = grid - centre
    moments, axes = torch.linalg.eigh((weight * away) @ away.mT)
    moved = (weight * (values - shift)) @ away.mT
    turn = axes.mT @ (moved - moved.mT) @ axes  # in the principal axes every turn is a quotient
    turn = axes @ (turn / (moments[:, :, None] + moments[:, None]).clamp(min=1e-6)) @ axes.mT
    part: Tensor = shift + turn @ away
    return part.view_as(ddf)


def _inside(position: Tensor, shape: Sequence[int], fade: float = 0.0) -> Tensor:
    """``(B, 1, *S)``: 1 where positions ``(B, D, *S)`` are on a grid of this shape, 0 from ``fade`` voxels outside."""
    last = position.new_tensor([n - 1.0 for n in shape]).view(1, -1, *(1,) * (position.ndim - 2))
    beyond = torch.maximum(-position, position - last).amax(dim=1, keepdim=True) - 0.5
    return (1 - beyond / fade).clamp(0, 1) if fade else (beyond <= 0).to(position.dtype)


def _reflect(position: Tensor, mirror: Mirror) -> Tensor:
    """The mirror images ``(B, D, *S)`` of positions ``(1 or B, D, *S)``."""
    form = (1,) * (position.ndim - 2)
    normal, point = (one.to(position.dtype).view(*one.shape, *form) for one in mirror[:2])
    return position - 2 * ((position - point) * normal).sum(dim=1, keepdim=True) * normal


def _find_in_object(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normal, point and weight of the best plane of one image ``(1, 1, *S)``, in voxels."""
    low, high = _object_box(image)
    part = image[_crop(low, high)]
    small = _coarse(part, _SIZE)
    normal, point, weight = _find(small)
    scale = image.new_tensor([(n - 1) / (m - 1) if m > 1 else 1.0 for n, m in zip(part.shape[2:], small.shape[2:])])
    normal = normal / scale  # a plane's normal goes with the inverse
    return normal / normal.norm(), point * scale + image.new_tensor(low), image.new_tensor(weight)


def _object_box(image: Tensor) -> tuple[list[int], list[int]]:
    """First and last voxel along each axis of what is not air in an image ``(1, 1, *S)``, with a little air around."""
    small = _coarse(image, _OBJECT_SIZE)
    there = ~_air(small)[0, 0]
    low, high = [0] * there.ndim, [n - 1 for n in image.shape[2:]]
    for axis, (n, m) in enumerate(zip(image.shape[2:], small.shape[2:])):
        along = there.movedim(axis, 0).flatten(1).any(dim=1).nonzero().flatten().tolist()
        if along and m > 1:
            scale = (n - 1) / (m - 1)
            low[axis] = max(low[axis], math.floor((along[0] - 1) * scale))
            high[axis] = min(high[axis], math.ceil((along[-1] + 1) * scale))
    return low, high


def _crop(first: Sequence[int], last: Sequence[int]) -> tuple[slice, ...]:
    """An index of ``(B, C, *S)`` from the first to the last voxel along every axis."""
    return (slice(None), slice(None), *(slice(a, b + 1) for a, b in zip(first, last)))


def _coarse(image: Tensor, size: int) -> Tensor:
    """An image on a grid of this longest side, unless it is smaller."""
    longest = max(image.shape[2:])
    if longest <= size:
        return image
    shape = [min(n, max(2, round((n - 1) * (size - 1) / (longest - 1)) + 1)) for n in image.shape[2:]]
    return resize_image(image, shape)


def _air(image: Tensor) -> Tensor:
    """Where an image ``(1, 1, *S)`` is as it usually is at its border, and connected to that: ``(1, 1, *S)`` bool."""
    border = torch.ones_like(image, dtype=torch.bool)
    border[_crop([1] * (image.ndim - 2), [n - 2 for n in image.shape[2:]])] = False
    like = (image - image[border].median()).abs() < _AIR
    air, grow = border & like, (F.max_pool2d, F.max_pool3d)[image.ndim - 4]
    while True:
        more = (grow(air.float(), 3, 1, 1) > 0) & like
        if torch.equal(more, air):
            return air
        air = more


def _find(image: Tensor) -> tuple[Tensor, Tensor, float]:
    """Normal, point and weight of the best plane of one coarse image ``(1, 1, *S)``."""
    dims, middle = image.ndim - 2, image.new_tensor([(n - 1) / 2 for n in image.shape[2:]])
    there = (~_air(image)).float()
    inside = _structure(image, there)
    if float(inside.square().mean().sqrt()) < _FAINT:
        return torch.eye(dims).to(image)[0], middle, 0.0
    found = [_climb(inside, there, normal, point) for normal, point in _first_planes(inside, there, image)]
    normal, point, score = found[_first_of_the_best(torch.stack([one[2] for one in found]))]
    everywhere = torch.ones_like(image)
    whole = _correlations(_structure(image, everywhere), everywhere, normal[None], point[None])
    weight = min(_ramp(float(score), *_INSIDE), _ramp(float(whole), *_WHOLE))
    return normal, point, weight


def _ramp(value: float, low: float, high: float) -> float:
    """0 below one value and 1 above another, linear in between."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _structure(image: Tensor, where: Tensor) -> Tensor:
    """Structures of middle size of an image ``(1, 1, *S)`` where ``where`` is 1; what is elsewhere has no influence."""
    fine, coarse = (
        gaussian_smooth(image * where, sigma) / gaussian_smooth(where, sigma).clamp(min=0.05)
        for sigma in (_FINE_SIGMA, _COARSE_SIGMA)
    )
    return (fine - coarse) * where


def _first_planes(inside: Tensor, there: Tensor, image: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The best of the planes across the axes of the grid, at the best of several places, and of the object."""
    axes = torch.eye(image.ndim - 2).to(image)
    sides = image.new_tensor(image.shape[2:])
    centre, principal = _principal_axes(image[0, 0])
    found = []
    for axis in axes:
        points = torch.stack([(sides - 1) / 2 + share * sides * axis for share in _STARTS])
        scores = _correlations(inside, there, axis.expand(len(points), -1), points)
        found.append((axis, points[_first_of_the_best(scores)]))
    found += [(axis, centre) for axis in principal]
    scores = _correlations(inside, there, *(torch.stack(one) for one in zip(*found)))
    order = (scores / _BETTER).round().argsort(descending=True, stable=True)
    return [found[i] for i in sorted(order[:_CLIMBS].tolist())]


def _climb(inside: Tensor, there: Tensor, normal: Tensor, point: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normal, point and correlation of the plane to which tilts and shifts lead while they help."""
    (score,), tilt = _correlations(inside, there, normal[None], point[None]), _FIRST_TILT_DEG
    while tilt >= _LAST_TILT_DEG:
        normals, points = _neighbours(normal, point, tilt)
        scores = _correlations(inside, there, normals, points)
        best = _first_of_the_best(scores)
        if scores[best] > score + _BETTER:
            normal, point, score = normals[best], points[best], scores[best]
        else:
            tilt /= 2
    return normal, point, score


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


def _correlations(structure: Tensor, there: Tensor, normals: Tensor, points: Tensor) -> Tensor:
    """Correlations ``(N,)`` of an image ``(1, 1, *S)`` with its mirror images across planes ``(N, D)``.

    They are taken where the object, ``there``, has a mirror image in the object.
    """
    shape, count = structure.shape[2:], len(normals)
    chosen = there[0, 0] > 0
    line = identity_grid(shape)[:, chosen].view(1, len(shape), -1, *(1,) * (len(shape) - 1))
    where = _reflect(line, Mirror(normals, points, normals.new_ones(count)))
    both = torch.cat((structure, there), dim=1).expand(count, -1, *shape)
    mirrored, weight = sample(both, where).flatten(2).unbind(1)
    weight = weight * _inside(where, shape).flatten(1)
    here, mirrored = (_centred(one, weight) for one in (structure[0][:, chosen], mirrored))
    energy = ((weight * here.square()).sum(dim=1) * (weight * mirrored.square()).sum(dim=1)).sqrt()
    across = normals.abs() @ normals.new_tensor(shape)
    enough = (weight.sum(dim=1) >= _OVERLAP * there.sum()) & (across >= _THINNEST * max(shape))
    return torch.where(
        enough, (weight * here * mirrored).sum(dim=1) / energy.clamp(min=1e-12), -normals.new_ones(count)
    )


def _centred(values: Tensor, weight: Tensor) -> Tensor:
    """Values ``(1 or N, V)`` less their weighted means, by weights ``(N, V)``."""
    return values - (values * weight).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp(min=1e-6)


def half_grid(mirror: Mirror, shape: Sequence[int]) -> Mirror:
    """The same planes in voxels of the half grid of a grid of this shape."""
    halves = mirror.point.new_tensor([0.5 if n > 1 else 1.0 for n in shape])
    normal = mirror.normal / halves
    return Mirror(normal / normal.norm(dim=1, keepdim=True), mirror.point * halves, mirror.weight)
