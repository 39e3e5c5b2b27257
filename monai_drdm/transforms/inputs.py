"""Reading shapes, spacing and affines off what MONAI pipelines hand over, and handing back the like."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor
from monai.data.meta_obj import get_track_meta
from monai.utils import convert_to_tensor
from torch import Tensor

from monai_drdm.fields import warp
from monai_drdm.fields.warp import Mode, PaddingMode

_AFFINE_TOLERANCE = 1e-3


def as_tensor(data: NdarrayOrTensor, name: str) -> Tensor:
    """A tensor of the data without its metadata, checked to be ``(C, *S)`` of two or three spatial axes.

    Raises:
        TypeError: neither array nor tensor, or not of a real numeric type.
        ValueError: another number of axes, or an empty one.
    """
    if not isinstance(data, (np.ndarray, Tensor)):
        raise TypeError(f"{name} must be a numpy array or tensor (C, *S), got {type(data).__name__}.")
    if isinstance(data, np.ndarray) and data.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be of a real numeric type, got {data.dtype}.")
    tensor: Tensor = convert_to_tensor(_native(data), track_meta=False)
    if tensor.is_complex():
        raise TypeError(f"{name} must be of a real numeric type, got {tensor.dtype}.")
    if tensor.ndim not in (3, 4) or 0 in tensor.shape:
        raise ValueError(
            f"{name} must have shape (C, *S) with 2 or 3 non-empty spatial axes, got {tuple(tensor.shape)}. "
            "Use EnsureChannelFirst to add the channel axis."
        )
    return tensor


def spacing_of(data: NdarrayOrTensor, pixdim: Sequence[float] | None, name: str) -> tuple[float, ...]:
    """Millimetres per voxel along each spatial axis: from the affine, else ``pixdim``, else 1.

    Raises:
        ValueError: an affine or ``pixdim`` that gives no positive spacing.
    """
    dims = data.ndim - 1
    if isinstance(data, MetaTensor):
        columns = data.affine.detach().cpu().double()[:-1, :-1]
        spacing = [float(columns[:, d].norm()) for d in range(dims)] if columns.shape[1] >= dims else []
    else:
        spacing = [1.0] * dims if pixdim is None else [float(s) for s in pixdim]
    if len(spacing) != dims or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"{name}: need {dims} positive spacings in mm, got {spacing}. Check the affine or pixdim.")
    return tuple(spacing)


def check_keys_agree(data: Mapping[Hashable, NdarrayOrTensor], reference: Hashable, keys: Sequence[Hashable]) -> None:
    """Check that all keys share the reference key's spatial shape and, where both have one, its affine.

    Raises:
        ValueError: naming the keys and what differs.
    """
    first = data[reference]
    for key in keys:
        other = data[key]
        if tuple(other.shape[1:]) != tuple(first.shape[1:]):
            raise ValueError(
                f"keys {reference!r} and {key!r} must have one spatial shape, got {tuple(first.shape[1:])} and "
                f"{tuple(other.shape[1:])}. Resample them to one grid first (ResampleToMatchd)."
            )
        if isinstance(first, MetaTensor) and isinstance(other, MetaTensor):
            a, b = first.affine.detach().cpu().double(), other.affine.detach().cpu().double()
            if a.shape != b.shape or not torch.allclose(a, b, atol=_AFFINE_TOLERANCE):
                raise ValueError(
                    f"keys {reference!r} and {key!r} must have one affine, got {a.tolist()} and {b.tolist()}. Resample "
                    "them to one grid first (ResampleToMatchd)."
                )


def warp_like(data: NdarrayOrTensor, ddf: Tensor, mode: Mode, padding_mode: PaddingMode, name: str) -> Tensor:
    """Warp ``(C, *S)`` data by a field ``(D, *S)`` on the data's own device; metadata and ``requires_grad`` survive."""
    tensor = as_tensor(data, name)
    warped = warp(tensor[None], ddf[None].to(tensor.device), mode, padding_mode)[0]
    if isinstance(data, MetaTensor) and get_track_meta():
        carrier = MetaTensor(warped)
        carrier.copy_meta_from(data)  # type: ignore[no-untyped-call]  # MONAI leaves it without types
        return carrier
    return untouched(warped)


def untouched(data: NdarrayOrTensor) -> Tensor:
    """The data as MONAI hands on what a transform left alone: a tensor, MetaTensor where metadata is tracked."""
    tensor: Tensor = convert_to_tensor(_native(data), track_meta=get_track_meta())
    return tensor


def _native(data: NdarrayOrTensor) -> Tensor:
    """A tensor of exactly the array's type; MONAI's own conversion would widen unsigned integers."""
    if isinstance(data, Tensor):
        return data
    return torch.from_numpy(np.ascontiguousarray(data, dtype=data.dtype.newbyteorder("=")))
