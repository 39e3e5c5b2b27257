"""Pairs of images in which two parts touch and slide past each other, so that the true field jumps where they meet.

``blocks`` are two halves of texture that slide along a straight line. ``organs`` are an organ and the wall around it,
each filled with an anatomy of ``monai_drdm.train.synthetic``, that slide along an ellipse, as lungs do along the chest
wall and livers along that of the belly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from monai_drdm.fields import gaussian_smooth, identity_grid, warp
from monai_drdm.train.synthetic import synthetic_images

SIZE = 48
COMMON, APART = 2.0, (1.5, 4.0)
"""Voxels: both parts move by up to the first together, and by this much each in opposite directions where they meet."""
SEMIAXES, OFF_CENTRE = (0.26, 0.38), 0.08
"""Of the ellipse, and how far its middle lies from that of the image, as shares of the image's size."""


class Pairs(NamedTuple):
    """Pairs of images of two parts."""

    images: Tensor
    """``(B, 2, H, W)``: moving and fixed."""
    ddf: Tensor
    """``(B, 2, H, W)`` voxels: in each part the motion of that part."""
    regions: Tensor
    """``(B, 1, H, W)``: 1 and 2, the parts in the fixed image."""
    first: Tensor
    """``(B, 2, H, W)`` voxels: the motion of part 1, continued everywhere."""
    second: Tensor
    """``(B, 2, H, W)`` voxels: the motion of part 2, continued everywhere."""


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator).view(-1, 1, 1, 1)


def _texture(count: int, width: float, generator: torch.Generator) -> Tensor:
    values = gaussian_smooth(torch.randn(count, 1, SIZE, SIZE, generator=generator), width)
    return values / values.flatten(1).std(dim=1).view(-1, 1, 1, 1)


def blocks(count: int, generator: torch.Generator, turn: bool = False) -> Pairs:
    """Blocks with texture of their own, which slide along the line between them; ``turn``: half the time turned."""
    at = _uniform(count, 0.35 * SIZE, 0.65 * SIZE, generator).round()
    right = (torch.arange(SIZE).view(1, 1, 1, -1) >= at).expand(-1, -1, SIZE, -1)
    together = _uniform(count, -COMMON, COMMON, generator)
    apart = _uniform(count, *APART, generator) * _uniform(count, -1, 1, generator).sign()
    along = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(count, -1, SIZE, SIZE)
    first, second = (together + apart) * along, (together - apart) * along
    ddf = torch.where(right, second, first)
    parts = [
        _uniform(count, 0.25, 0.75, generator)
        + 0.1 * _texture(count, 1.5, generator)
        + 0.05 * _texture(count, 4.0, generator)
        for _ in range(2)
    ]
    moving, fixed = (torch.where(right, *sides) for sides in (parts, [warp(one, ddf) for one in parts]))
    pairs = Pairs(torch.cat([moving, fixed], dim=1).clamp(0, 1), ddf, 1 + right.to(torch.uint8), first, second)
    if turn and torch.rand(1, generator=generator) < 0.5:
        ddf, first, second = (one.flip(1).mT for one in (ddf, first, second))
        return Pairs(pairs.images.mT, ddf, pairs.regions.mT, first, second)
    return pairs


class Slide(NamedTuple):
    """How an organ and the wall around it move: each point along the ellipse through it that has the organ's shape."""

    centre: Tensor
    """``(B, 2, 1, 1)`` voxels of the moving image."""
    semiaxes: Tensor
    """``(B, 2, 1, 1)`` voxels."""
    shift: Tensor
    """``(B, 2, 1, 1)`` voxels, of both together."""
    angle: Tensor
    """``(B, 1, 1, 1)`` radians: the organ turns by it, and the wall by as much in the other direction."""

    def inside(self, points: Tensor) -> Tensor:
        """``(B, 1, H, W)``: whether points ``(B, 2, H, W)`` of the moving image lie in the organ."""
        return self._round(points).norm(dim=1, keepdim=True) < 1

    def organ(self, points: Tensor) -> Tensor:
        """Where points of the fixed image come from if they belong to the organ."""
        return self._turned(self._round(points + self.shift), self.angle)

    def wall(self, points: Tensor) -> Tensor:
        """The same for the wall, which moves less the farther it is from the organ."""
        at = self._round(points + self.shift)
        return self._turned(at, -self.angle / at.square().sum(dim=1, keepdim=True).clamp(min=1))

    def _round(self, points: Tensor) -> Tensor:
        """Coordinates in which the ellipse is the unit circle."""
        return (points - self.centre) / self.semiaxes

    def _turned(self, at: Tensor, angle: Tensor) -> Tensor:
        cos, sin = angle.cos(), angle.sin()
        turned = torch.cat([cos * at[:, :1] - sin * at[:, 1:], sin * at[:, :1] + cos * at[:, 1:]], dim=1)
        return self.centre + self.semiaxes * turned


def slide(count: int, generator: torch.Generator) -> Slide:
    """A random ellipse, and how far organ and wall move along it."""
    semiaxes, shift = (
        torch.cat([_uniform(count, low, high, generator) for _ in range(2)], dim=1)
        for low, high in ((SEMIAXES[0] * SIZE, SEMIAXES[1] * SIZE), (-COMMON, COMMON))
    )
    off = torch.cat([_uniform(count, -OFF_CENTRE, OFF_CENTRE, generator) for _ in range(2)], dim=1)
    apart = _uniform(count, *APART, generator) * _uniform(count, -1, 1, generator).sign()
    return Slide((SIZE - 1) / 2 + off * SIZE, semiaxes, shift, apart / semiaxes.prod(dim=1, keepdim=True).sqrt())


def organs(count: int, generator: torch.Generator, turn: bool = False) -> Pairs:
    """An organ and the wall around it, which slide along the ellipse between them; ``turn`` changes nothing here."""
    how, points = slide(count, generator), identity_grid((SIZE, SIZE))[None].float().expand(count, -1, -1, -1)
    first, second = how.organ(points) - points, how.wall(points) - points
    before, after = how.inside(points), how.inside(points + how.shift)
    parts = [
        (synthetic_images(generator, count, (SIZE, SIZE)) + 0.06 * _texture(count, 1.5, generator)).clamp(0, 1)
        for _ in range(2)
    ]
    moving = torch.where(before, *parts)
    fixed = torch.where(after, *(warp(one, ddf) for one, ddf in zip(parts, (first, second))))
    regions = 2 - after.to(torch.uint8)
    return Pairs(torch.cat([moving, fixed], dim=1), torch.where(after, first, second), regions, first, second)


PHANTOMS: dict[str, Callable[..., Pairs]] = {"blocks": blocks, "organs": organs}
