"""Reading the values of an image at voxel coordinates, interpolated or nearest.

``fields.warp`` chooses among the methods here and the label vote of ``fields.labels``.
"""

from __future__ import annotations

from typing import get_args, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Mode = Literal["bilinear", "nearest", "bicubic", "label"]
PaddingMode = Literal["border", "zeros", "reflection"]

# torch.gather does not take unsigned integers of more than 8 bits; a signed view of the same bits is moved instead
SIGNED_VIEW = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
# float32 represents every value of these types exactly
_FLOAT32_HOLDS = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.float32,
)


def check_modes(mode: str, padding_mode: str, spatial_dims: int, function: str) -> None:
    """Raise ``ValueError`` unless both modes are known and fit the number of spatial dimensions."""
    if mode not in get_args(Mode):
        raise ValueError(f"{function}: mode must be one of {get_args(Mode)}, got {mode!r}.")
    if padding_mode not in get_args(PaddingMode):
        raise ValueError(f"{function}: padding_mode must be one of {get_args(PaddingMode)}, got {padding_mode!r}.")
    if mode == "bicubic" and spatial_dims != 2:
        raise ValueError(f"{function}: mode 'bicubic' exists in 2D only, got {spatial_dims}D data. Use 'bilinear'.")


def samples_on_grid(image: Tensor, mode: Mode) -> bool:
    """Whether ``sample_on_grid`` can sample this image in this mode.

    It cannot for ``label``, which is a vote, nor for ``nearest`` on integers that float32 cannot represent exactly.
    """
    return mode in ("bilinear", "bicubic") or (mode == "nearest" and image.dtype in _FLOAT32_HOLDS)


def sample_on_grid(image: Tensor, grid: Tensor, mode: Mode, padding_mode: PaddingMode) -> Tensor:
    """Sample with ``torch.nn.functional.grid_sample``; only for images and modes that ``samples_on_grid`` accepts.

    Args:
        image: ``(B, C, *S)``, real.
        grid: ``(B, *T, D)`` in [-1, 1], last array axis first, as ``fields.grid.sampling_grid`` returns it. Values are
            computed in its dtype. Either batch size may be 1.
        mode: ``bilinear``, ``bicubic`` or ``nearest``.
        padding_mode: as in ``warp``.

    Returns:
        ``(B, C, *T)``, dtype as in ``warp``.
    """
    batch = max(len(image), len(grid))
    image, grid = image.expand(batch, *image.shape[1:]), grid.expand(batch, *grid.shape[1:])
    out = F.grid_sample(image.to(grid.dtype), grid, mode=mode, padding_mode=padding_mode, align_corners=True)
    return out.to(image.dtype) if image.is_floating_point() or mode == "nearest" else out


def sample_nearest(image: Tensor, coordinates: Tensor, padding_mode: PaddingMode) -> Tensor:
    """The nearest voxel of an image ``(B, C, *S)`` of any dtype at voxel coordinates ``(B, D, *T)``."""
    axes = [reachable_coordinates(coordinates[:, d], size, padding_mode) for d, size in enumerate(image.shape[2:])]
    index = torch.stack(axes, dim=1).round().long().flatten(2)
    return gather_voxels(image, index, padding_mode).reshape(*image.shape[:2], *coordinates.shape[2:])


def reachable_coordinates(coordinates: Tensor, size: int, padding_mode: PaddingMode) -> Tensor:
    """Clamp or reflect the coordinates along one axis into ``[0, size - 1]``; ``zeros`` leaves them unchanged."""
    if padding_mode == "zeros":
        return coordinates
    if padding_mode == "reflection" and size > 1:
        period = 2.0 * (size - 1)
        wrapped = torch.remainder(coordinates, period)
        return torch.minimum(wrapped, period - wrapped)
    return coordinates.clamp(0, size - 1)


def gather_voxels(image: Tensor, index: Tensor, padding_mode: PaddingMode) -> Tensor:
    """Values of an image of any dtype at integer coordinates.

    Args:
        image: ``(B, C, *S)``.
        index: ``(B, D, N)`` int64 coordinates. Those outside the image give 0 under ``zeros`` and the value at the
            edge otherwise.
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
    bits = bits.view(SIGNED_VIEW[image.dtype]) if image.dtype in SIGNED_VIEW else bits
    out = torch.gather(bits, 2, flat[:, None].expand(-1, image.shape[1], -1))
    if padding_mode == "zeros":
        out = out.masked_fill(~inside[:, None], 0)
    return out.view(image.dtype)
