"""One pair of images registered: affine map, network and refinement, in one field."""

from __future__ import annotations

import torch
from torch import nn, Tensor

from monai_drdm.fields import compose, gaussian_smooth, identity_grid, sample
from monai_drdm.registration.affine import apply_affine, find_affine, ordinary
from monai_drdm.registration.refinement import Look, refine_field

_RANGE_TOLERANCE = 0.01


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
        ValueError: ``rounds`` is below 1 or ``refine`` below 0; no network, and neither ``affine`` nor ``refine``;
            images of other shapes, not in [0, 1], or not on one grid without ``to_moving``.
    """
    check_stages(network is not None, rounds, affine, refine)
    _check(moving, fixed, to_moving)
    with torch.inference_mode(False), torch.no_grad():
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

    def pose(points: Tensor) -> Tensor:
        return points if matrix is None else apply_affine(matrix, points)

    def smoothed(sigma: float) -> Look:
        image = gaussian_smooth(moving, sigma)

        def look(ddf: Tensor) -> Tensor:
            sizes = zip(fixed.shape[2:], ddf.shape[2:])
            apart = ddf.new_tensor([(n - 1) / (m - 1) if m > 1 else n for n, m in sizes])
            points = ddf + identity_grid(ddf.shape[2:], device=ddf.device)
            where = pose(points * apart.view(1, -1, *(1,) * (ddf.ndim - 2)))
            return sample(image, where if to_moving is None else apply_affine(to_moving, where))

        return look

    ddf = fixed.new_zeros(len(fixed), *grid.shape[1:])
    if network is not None:
        untouched = moving if matrix is None and to_moving is None else smoothed(0.0)(ddf)
        ddf = _by_network(network, untouched, fixed, rounds, smoothed(0.0))
    ddf = refine_field(smoothed, fixed, ddf, refine) if refine else ddf
    return ddf if matrix is None else pose(grid + ddf) - grid


def _by_network(network: nn.Module, moving: Tensor, fixed: Tensor, rounds: int, look: Look) -> Tensor:
    training = network.training
    network.eval()
    try:
        ddf: Tensor = network(torch.cat([moving, fixed], dim=1))
        for _ in range(rounds - 1):
            ddf = compose(ddf, network(torch.cat([look(ddf), fixed], dim=1)))
        return ddf
    finally:
        network.train(training)


def check_stages(network: bool, rounds: int, affine: bool, refine: int) -> None:
    """Raise ``ValueError`` unless there is something to register with, in numbers that make sense."""
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}.")
    if refine < 0:
        raise ValueError(f"refine must be 0 or more steps, got {refine}.")
    if not (network or affine or refine):
        raise ValueError("nothing would be registered: give a network, affine, refine, or several of them.")


def _check(moving: Tensor, fixed: Tensor, to_moving: Tensor | None) -> None:
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
    dims = fixed.ndim - 2
    if to_moving is not None and to_moving.shape != (1, dims, dims + 1):
        raise ValueError(f"to_moving must have shape (1, {dims}, {dims + 1}), got {tuple(to_moving.shape)}.")
