"""One pair of images registered: affine map, network and refinement, in one field."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import nn, Tensor

from monai_drdm.fields import compose, gaussian_smooth, identity_grid, resize_image, sample
from monai_drdm.registration.affine import (
    apply_affine,
    chain_affine,
    find_affine,
    identity_affine,
    inside,
    ordinary,
)
from monai_drdm.registration.refinement import Look, refine_field

_RANGE_TOLERANCE = 0.01
_FLAT = 1e-6
"""Share of a box that a map may leave of its volume, for the lengths of its sides, and still have an inverse."""


def register(
    network: nn.Module | None,
    moving: Tensor,
    fixed: Tensor,
    *,
    rounds: int = 1,
    affine: bool = False,
    refine: int = 0,
    to_moving: Tensor | None = None,
) -> Tensor:
    """The field that warps moving onto fixed images.

    However many stages there are, the result is one field, by which an image is resampled once.

    Args:
        network: from ``load_registration``, or another that takes both images as channels. None: the affine map and the
            refinement do all.
        moving: ``(B, 1, *S)`` in [0, 1], such as ``unit_range`` makes of an image.
        fixed: ``(B, 1, *S)`` in [0, 1].
        rounds: number of registrations; every one after the first starts from the moving images warped so far.
        affine: first look for the affine map with which both images correlate best. Different people differ in pose
            and size, which networks are not trained to find.
        refine: number of steps by which the field is at last adapted to this pair, by local correlation. The result
            does not fold. Some dozens are enough.
        to_moving: ``(1, D, D + 1)``: voxels of the moving image from those of the fixed image, where moving images lie
            on another grid ``(B, 1, *T)``. Then ``warp`` does not apply the field; use
            ``sample(moving, apply_affine(to_moving, identity_grid(S) + ddf))``.

    Returns:
        ``(B, D, *S)`` voxels of the fixed image: ``fixed(x)`` is to look like ``moving(x + ddf(x))``, or with
        ``to_moving`` like ``moving(to_moving(x + ddf(x)))``.

    Raises:
        TypeError: images that are not real tensors, or stages of other types.
        ValueError: ``rounds`` is below 1, or above 1 without a network, or ``refine`` below 0; no network, and neither
            ``affine`` nor ``refine``; no images, or images of other shapes, not in [0, 1], or not on one grid without
            ``to_moving``.
    """
    check_stages(network is not None, rounds, affine, refine)
    _check(moving, fixed, to_moving)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(fixed.device.type, enabled=False):
        to_moving = None if to_moving is None else ordinary(to_moving).to(fixed.device)
        moving, fixed = ordinary(moving), ordinary(fixed)
        size = 1 if refine else len(fixed)
        parts = zip(torch.split(moving, size), torch.split(fixed, size))
        return torch.cat([_register(network, a, b, rounds, affine, refine, to_moving) for a, b in parts])


def _register(
    network: nn.Module | None,
    moving: Tensor,
    fixed: Tensor,
    rounds: int,
    affine: bool,
    refine: int,
    to_moving: Tensor | None,
) -> Tensor:
    grid = identity_grid(fixed.shape[2:], device=fixed.device)[None]
    matrix = find_affine(moving, fixed, to_moving) if affine else None
    maps = [one for one in (matrix, to_moving) if one is not None]

    def smoothed(sigma: float) -> Look:
        matrix = identity_affine(len(fixed), fixed.ndim - 2, fixed.device)
        return _View(gaussian_smooth(moving, sigma), reduce(chain_affine, maps, matrix), fixed.shape[2:])

    ddf = fixed.new_zeros(len(fixed), *grid.shape[1:])
    if network is not None:
        untouched = smoothed(0.0)(ddf, fixed.shape[2:])[0] if maps else moving
        ddf = _by_network(network, untouched, fixed, rounds, smoothed(0.0))
    ddf = refine_field(smoothed, fixed, ddf, refine) if refine else ddf
    return ddf if matrix is None else apply_affine(matrix, grid + ddf) - grid


class _View:
    """The moving images as they are seen through fields, a :data:`Look`.

    Args:
        image: ``(B, 1, *M)``.
        matrix: ``(B, D, D + 1)``: voxels of the moving image from those of the fixed image.
        shape: of the fixed image.
    """

    def __init__(self, image: Tensor, matrix: Tensor, shape: Sequence[int]) -> None:
        self.image, self.matrix, self.shape = image, matrix, shape
        self.turn = torch.cat([matrix[:, :, :-1], torch.zeros_like(matrix[:, :, -1:])], dim=2)
        self.unmoved: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, ddf: Tensor, seen: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Values ``(B, 1, *T)`` on a grid of shape ``seen``, and whether they lie within the moving images."""
        if tuple(seen) not in self.unmoved:
            points = identity_grid(seen, device=ddf.device)[None] * self._apart(seen)
            self.unmoved[tuple(seen)] = apply_affine(self.matrix, points)
        moved = apply_affine(self.turn, ddf * self._apart(ddf.shape[2:]))
        where = self.unmoved[tuple(seen)] + resize_image(moved, seen)
        return sample(self.image, where), inside(where.detach(), self.image.shape[2:])

    def _apart(self, shape: Sequence[int]) -> Tensor:
        """How many voxels of the fixed image the voxels of a grid are apart, ``(1, D, 1, ...)``."""
        apart = [(n - 1) / (m - 1) if m > 1 else n / m for n, m in zip(self.shape, shape)]
        return self.image.new_tensor(apart).view(1, -1, *(1,) * len(apart))


def _by_network(network: nn.Module, moving: Tensor, fixed: Tensor, rounds: int, look: Look) -> Tensor:
    training = network.training
    network.eval()
    try:
        ddf: Tensor = network(torch.cat([moving, fixed], dim=1))
        for _ in range(rounds - 1):
            ddf = compose(ddf, network(torch.cat([look(ddf, fixed.shape[2:])[0], fixed], dim=1)))
        return ddf
    finally:
        network.train(training)


def check_numbers(rounds: int, affine: bool, refine: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` for stages that make no sense, with a network or without."""
    for name, value, least, what in (("rounds", rounds, 1, ""), ("refine", refine, 0, " steps")):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be a whole number, got {value!r}.")
        if value < least:
            raise ValueError(f"{name} must be {least} or more{what}, got {value}.")
    if not isinstance(affine, bool):
        raise TypeError(f"affine must be True or False, got {affine!r}.")


def check_stages(network: bool, rounds: int, affine: bool, refine: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless there is something to register with, in numbers that make sense."""
    check_numbers(rounds, affine, refine)
    if not (network or affine or refine):
        raise ValueError("nothing would be registered: give a network, affine, refine, or several of them.")
    if rounds > 1 and not network:
        raise ValueError(f"rounds is for networks and must be 1 without one, got {rounds}. For more steps use refine.")


def _check(moving: Tensor, fixed: Tensor, to_moving: Tensor | None) -> None:
    for name, image in (("moving", moving), ("fixed", fixed)):
        if not isinstance(image, Tensor) or image.is_complex():
            got = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"{name} must be a tensor of real numbers (B, 1, *S), got {got}.")
        if 0 in image.shape:
            raise ValueError(
                f"{name} must hold an image or more, (B, 1, *S), got the empty shape {tuple(image.shape)}."
            )
    for name, image in (("moving", moving), ("fixed", fixed)):
        if image.ndim not in (4, 5) or image.shape[1] != 1 or len(image) != len(fixed):
            raise ValueError(
                f"{name} must be as many images of one channel as fixed, (B, 1, *S) with 2 or 3 spatial axes, got "
                f"{tuple(image.shape)} beside {tuple(fixed.shape)}."
            )
        low, high = float(image.min()), float(image.max())
        if not (low >= -_RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE):
            raise ValueError(
                f"{name} must be in [0, 1], as networks were trained, got {low:g} to {high:g}. Use unit_range(image)."
            )
    if to_moving is None and moving.shape != fixed.shape:
        raise ValueError(
            f"moving must have the shape of fixed, got {tuple(moving.shape)} and {tuple(fixed.shape)}. Give to_moving "
            "for images on different grids."
        )
    if to_moving is not None:
        _check_matrix(to_moving, fixed.ndim - 2)


def _check_matrix(to_moving: Tensor, dims: int) -> None:
    if not isinstance(to_moving, Tensor) or not to_moving.is_floating_point():
        got = to_moving.dtype if isinstance(to_moving, Tensor) else type(to_moving).__name__
        raise TypeError(f"to_moving must be a floating tensor (1, {dims}, {dims + 1}), got {got}.")
    if to_moving.shape != (1, dims, dims + 1):
        raise ValueError(f"to_moving must have shape (1, {dims}, {dims + 1}), got {tuple(to_moving.shape)}.")
    linear = to_moving[0, :, :dims].double()
    flat = linear.det().abs() <= _FLAT * linear.norm(dim=0).prod()
    if bool(flat) or not bool(torch.isfinite(to_moving).all()):
        raise ValueError(f"to_moving must be finite and have an inverse, got {to_moving.tolist()}.")
