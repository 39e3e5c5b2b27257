"""Reading voxels at integer coordinates, and what lies outside a grid."""

from __future__ import annotations

from typing import get_args, Literal

import torch
from torch import Tensor

Mode = Literal["bilinear", "nearest", "bicubic", "label"]
PaddingMode = Literal["border", "zeros", "reflection"]

# torch implements gather for signed integers only; the bit pattern is what is moved, so a signed view is exact
_SIGNED_VIEW = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def check_modes(mode: str, padding_mode: str, spatial_dims: int, function: str) -> None:
    """Raise ``ValueError`` unless both modes are known and fit the number of spatial dimensions."""
    if mode not in get_args(Mode):
        raise ValueError(f"{function}: mode must be one of {get_args(Mode)}, got {mode!r}.")
    if padding_mode not in get_args(PaddingMode):
        raise ValueError(f"{function}: padding_mode must be one of {get_args(PaddingMode)}, got {padding_mode!r}.")
    if mode == "bicubic" and spatial_dims != 2:
        raise ValueError(f"{function}: mode 'bicubic' exists in 2D only, got {spatial_dims}D data. Use 'bilinear'.")


def fold_coordinates(coordinates: Tensor, size: int, padding_mode: PaddingMode) -> Tensor:
    """Bring one axis of coordinates into ``[0, size - 1]`` (``zeros`` leaves them as they are)."""
    if padding_mode == "zeros":
        return coordinates
    if padding_mode == "reflection" and size > 1:
        period = 2.0 * (size - 1)
        wrapped = torch.remainder(coordinates, period)
        return torch.minimum(wrapped, period - wrapped)
    return coordinates.clamp(0, size - 1)


def gather_voxels(image: Tensor, index: Tensor, padding_mode: PaddingMode) -> Tensor:
    """Values of an image at integer coordinates, whatever its dtype.

    Args:
        image: ``(B, C, *S)``.
        index: ``(B, D, N)`` int64 coordinates; those outside read 0 under ``zeros`` and the edge otherwise.
        padding_mode: as in ``warp``.

    Returns:
        ``(B, C, N)`` of the image's dtype.
    """
    flat = torch.zeros_like(index[:, 0])
    inside = torch.ones_like(flat, dtype=torch.bool)
    for d, size in enumerate(image.shape[2:]):
        clamped = index[:, d].clamp(0, size - 1)
        if padding_mode == "zeros" and size > 1:
            inside &= clamped == index[:, d]
        flat = flat * size + clamped
    bits = image.flatten(2)
    bits = bits.view(_SIGNED_VIEW[image.dtype]) if image.dtype in _SIGNED_VIEW else bits
    out = torch.gather(bits, 2, flat[:, None].expand(-1, image.shape[1], -1))
    if padding_mode == "zeros":
        out = out.masked_fill(~inside[:, None], 0)
    return out.view(image.dtype)
