"""Jacobian determinants and folding."""

from __future__ import annotations

from itertools import product
from typing import Literal

import torch
from torch import Tensor

from monai_drdm.fields.grid import check_ddf, field_dtype

Scheme = Literal["corners", "central"]


def jacobian_determinant(ddf: Tensor, scheme: Scheme = "corners") -> Tensor:
    """Determinant of the Jacobian of ``x + ddf(x)``.

    ``corners``: for each cell of the grid, the minimum over its 2^D corners of the determinant of the edges that meet
    there. This covers every combination of forward and backward differences, so it detects fields that alternate from
    voxel to voxel. ``central``: central differences, one-sided at the border, as reported in the literature; they do
    not detect such fields.

    Args:
        ddf: ``(B, D, *S)`` voxels.
        scheme: ``corners`` or ``central``.

    Returns:
        ``corners``: ``(B, *(S - 1))``, an axis of length 1 keeping its length; ``central``: ``(B, *S)``.

    Raises:
        TypeError: not a floating tensor.
        ValueError: wrong shape or unknown scheme.
    """
    dims = check_ddf(ddf, "jacobian_determinant")
    field = ddf.to(field_dtype(ddf))
    if scheme == "central":
        rows = [_central_difference(field, d) for d in range(dims)]
        return _determinant(rows)
    if scheme != "corners":
        raise ValueError(f"jacobian_determinant: scheme must be 'corners' or 'central', got {scheme!r}.")
    edges = [_edges(field, d) for d in range(dims)]
    minimum: Tensor | None = None
    for corner in product((0, 1), repeat=dims):
        determinant = _determinant([_at_corner(edges[d], d, corner) for d in range(dims)])
        minimum = determinant if minimum is None else torch.minimum(minimum, determinant)
    assert minimum is not None
    return minimum


def fold_fraction(ddf: Tensor, scheme: Scheme = "corners") -> Tensor:
    """Fraction of cells (``corners``) or voxels (``central``) whose Jacobian determinant is not positive.

    Args:
        ddf: ``(B, D, *S)`` voxels.
        scheme: as in ``jacobian_determinant``.

    Returns:
        ``(B,)`` in [0, 1].
    """
    unfolded = jacobian_determinant(ddf, scheme) > 0  # so NaN counts as folded
    return (~unfolded).flatten(1).float().mean(dim=1)


def _edges(field: Tensor, axis: int) -> Tensor:
    """Forward differences of ``x + ddf`` along one axis; along an axis of length 1 they are those of the identity."""
    if field.shape[axis + 2] == 1:
        edge = torch.zeros_like(field)
    else:
        edge = field.diff(dim=axis + 2)
    edge[:, axis] += 1
    return edge


def _at_corner(edges: Tensor, axis: int, corner: tuple[int, ...]) -> Tensor:
    """The edges along ``axis`` that touch the given corner of each cell."""
    for other, offset in enumerate(corner):
        length = edges.shape[other + 2]
        if other != axis and length > 1:
            edges = edges.narrow(other + 2, offset, length - 1)
    return edges


def _central_difference(field: Tensor, axis: int) -> Tensor:
    if field.shape[axis + 2] == 1:
        slope = torch.zeros_like(field)
    else:
        (slope,) = torch.gradient(field, dim=axis + 2)
    slope[:, axis] += 1
    return slope


def _determinant(rows: list[Tensor]) -> Tensor:
    """Determinant of the matrix whose row ``d`` is the derivative along axis ``d``; each row is ``(B, D, *S)``."""
    if len(rows) == 2:
        a, b = rows
        return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
    a, b, c = rows
    return (
        a[:, 0] * (b[:, 1] * c[:, 2] - b[:, 2] * c[:, 1])
        - a[:, 1] * (b[:, 0] * c[:, 2] - b[:, 2] * c[:, 0])
        + a[:, 2] * (b[:, 0] * c[:, 1] - b[:, 1] * c[:, 0])
    )
