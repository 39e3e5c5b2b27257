"""The affine map between two images, found before a network sees them: it takes out pose and size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from monai_drdm.fields import gaussian_smooth, identity_grid, sample

_LEVELS = ((4, 3.0), (2, 1.0))
"""Every how manieth voxel is compared, and the smoothing before, coarse to fine."""
_STEPS = 60
_RATE = 0.01
_FLAT = 1e-6
"""Smallest variance that counts as structure, of images in [0, 1]."""
_ALIKE = 1e-4
"""Correlations that differ by no more than this are the same: what is left of rounding in images without structure."""


def apply_affine(matrix: Tensor, points: Tensor) -> Tensor:
    """Map points ``(B, D, *S)`` by matrices ``(B, D, D + 1)``; either batch may be 1."""
    linear, shift = matrix[:, :, :-1], matrix[:, :, -1]
    moved = torch.einsum("bij,bj...->bi...", linear, points)
    return moved + shift.view(*shift.shape, *(1,) * (points.ndim - 2))


def identity_affine(count: int, dims: int, device: torch.device) -> Tensor:
    """``(count, D, D + 1)``: the map that moves nothing."""
    return torch.eye(dims, dims + 1, device=device, dtype=torch.float32).repeat(count, 1, 1)


def inside(where: Tensor, shape: Sequence[int]) -> Tensor:
    """Which voxel coordinates ``(B, D, *T)`` lie within a grid, ``(B, 1, *T)``; voxels reach to half their size."""
    ends = where.new_tensor([n - 0.5 for n in shape]).view(1, -1, *(1,) * (where.ndim - 2))
    return ((where >= -0.5) & (where <= ends)).all(dim=1, keepdim=True)


def chain_affine(first: Tensor, second: Tensor) -> Tensor:
    """The map that applies one after the other, of matrices ``(B, D, D + 1)``; either batch may be 1."""
    linear = second[:, :, :-1]
    return torch.cat([linear @ first[:, :, :-1], linear @ first[:, :, -1:] + second[:, :, -1:]], dim=2)


def invert_affine(matrix: Tensor) -> Tensor:
    """The matrices ``(B, D, D + 1)`` of the inverse maps."""
    back = torch.linalg.inv(matrix[:, :, :-1])
    return torch.cat([back, -back @ matrix[:, :, -1:]], dim=2)


def ordinary(values: Tensor) -> Tensor:
    """The same numbers in float32, in a tensor that gradients may be computed through."""
    return values.float().clone() if values.is_inference() else values.float()


def find_affine(moving: Tensor, fixed: Tensor, start: Tensor | None = None) -> Tensor:
    """The affine map with which a moving image correlates best with a fixed one.

    The search begins at the best of three maps: none, one that puts the middles of both grids onto each other, and one
    that puts the centres of brightness onto each other. It follows the gradient of the correlation, coarse to fine.

    Args:
        moving: ``(B, 1, *S)`` in [0, 1].
        fixed: ``(B, 1, *T)`` in [0, 1].
        start: ``(1, D, D + 1)``: voxels of the moving image from those of the fixed image, as their headers say; None:
            they are the same.

    Returns:
        ``(B, D, D + 1)``, in voxels of the fixed image: ``fixed(x)`` resembles ``moving(start(found(x)))``.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(fixed.device.type, enabled=False):
        return _find(ordinary(moving), ordinary(fixed), None if start is None else ordinary(start))


def _find(moving: Tensor, fixed: Tensor, start: Tensor | None) -> Tensor:
    frame = _Frame(fixed.shape[2:], fixed.device)
    nothing = identity_affine(len(fixed), fixed.ndim - 2, fixed.device)
    first = nothing if start is None else start.to(fixed).expand(len(fixed), -1, -1)
    back = torch.linalg.inv(first[:, :, :-1])

    def shifted(there: Tensor, here: Tensor) -> Tensor:
        """The shift that takes points of the fixed image to points of the moving one."""
        found = nothing.clone()
        found[:, :, -1] = torch.einsum("bij,bj->bi", back, there - first[:, :, -1]) - here
        return found

    middle = fixed.new_tensor([(n - 1) / 2 for n in moving.shape[2:]])
    starts = (
        nothing,
        shifted(middle, frame.middle),
        shifted(_centre_of_brightness(moving), _centre_of_brightness(fixed)),
    )
    return _Search(moving, fixed, first, frame).best_from(torch.stack(starts))


class _Frame:
    """Coordinates of a grid in which its middle is 0 and its ends are -1 and 1."""

    def __init__(self, shape: Sequence[int], device: torch.device) -> None:
        self.middle = torch.tensor([(n - 1) / 2 for n in shape], device=device, dtype=torch.float32)
        self.half = self.middle.clamp(min=0.5)
        self.eye = torch.eye(len(shape), device=device, dtype=torch.float32)

    def in_voxels(self, change: Tensor) -> Tensor:
        """The map of voxels that adds a change of these coordinates, ``(B, D, D + 1)``, to the identity."""
        linear = self.eye + self.half[:, None] * change[:, :, :-1] / self.half
        shift = self.half * change[:, :, -1] + self.middle - torch.einsum("bij,j->bi", linear, self.middle)
        return torch.cat([linear, shift[:, :, None]], dim=2)

    def from_voxels(self, matrix: Tensor) -> Tensor:
        """The reverse of ``in_voxels``."""
        linear, shift = matrix[:, :, :-1], matrix[:, :, -1]
        moved = shift - self.middle + torch.einsum("bij,j->bi", linear, self.middle)
        change = (linear - self.eye) * self.half / self.half[:, None]
        return torch.cat([change, (moved / self.half)[:, :, None]], dim=2)


def _centre_of_brightness(image: Tensor) -> Tensor:
    """``(B, D)`` voxels."""
    weight = image.float().clamp(min=0).flatten(1) + _FLAT
    at = identity_grid(image.shape[2:], device=image.device, dtype=torch.float32).flatten(1)
    return weight @ at.T / weight.sum(dim=1, keepdim=True)


class _Search:
    """Looks for the map of highest correlation by gradient steps, coarse to fine."""

    def __init__(self, moving: Tensor, fixed: Tensor, start: Tensor, frame: _Frame) -> None:
        self.start, self.frame = start, frame
        self.levels: list[tuple[Tensor, Tensor, Tensor]] = []
        for stride, sigma in _LEVELS:
            at = _every(identity_grid(fixed.shape[2:], device=fixed.device, dtype=torch.float32)[None], stride)
            smooth = [gaussian_smooth(one.float(), sigma) for one in (moving, fixed)]
            self.levels.append((smooth[0], _every(smooth[1], stride), at))

    def best_from(self, starts: Tensor) -> Tensor:
        """The map found from the best of the starts ``(N, B, D, D + 1)``; never one that correlates less than it."""
        best = self._better(starts)
        change = self.frame.from_voxels(best)
        for level in range(len(self.levels)):
            change = self._follow(change, level)
        return self._better(torch.stack([best, self.frame.in_voxels(change)]))

    def _better(self, maps: Tensor) -> Tensor:
        """For each pair the map that correlates best; of equals, the first."""
        scores = torch.stack([self._correlation(one, len(self.levels) - 1) for one in maps])
        good = (scores >= scores.amax(dim=0) - _ALIKE).to(torch.uint8)
        return maps[good.argmax(dim=0), torch.arange(maps.shape[1], device=maps.device)]

    def _follow(self, change: Tensor, level: int) -> Tensor:
        change = change.clone().requires_grad_()
        optimizer = torch.optim.Adam([change], lr=_RATE / 2**level)
        for _ in range(_STEPS):
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = -self._correlation(self.frame.in_voxels(change), level).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return change.detach()

    def _correlation(self, matrix: Tensor, level: int) -> Tensor:
        """``(B,)``, over the part of the fixed image that lies within the moving one."""
        moving, fixed, at = self.levels[level]
        where = apply_affine(chain_affine(matrix, self.start), at.expand(len(matrix), *at.shape[1:]))
        seen = inside(where, moving.shape[2:]).float()
        a, b, weight = (one.flatten(1) for one in (fixed, sample(moving, where), seen))
        total = weight.sum(dim=1, keepdim=True)
        a, b = (weight * (one - (weight * one).sum(dim=1, keepdim=True) / total.clamp(min=1)) for one in (a, b))
        total = total[:, 0]
        least = _FLAT * total.clamp(min=1)
        spread, other = (one.square().sum(dim=1).maximum(least).sqrt() for one in (a, b))
        share = total / weight.shape[1]
        return (a * b).sum(dim=1) / (spread * other) * share.clamp(max=0.5) * 2


def _every(values: Tensor, stride: int) -> Tensor:
    """Every ``stride``-th voxel along each axis of ``(B, C, *S)``; the only one of an axis of length 1."""
    for axis, size in enumerate(values.shape[2:], 2):
        step = min(stride, size)
        values = values.index_select(axis, torch.arange(step // 2, size, step, device=values.device))
    return values
