"""Reading the samples of MONAI pipelines, and returning results in the same form.

Inputs are arrays, plain tensors and ``MetaTensor``. Values are read as plain tensors of exactly the same type. Shape,
spacing and affine are checked where they are read. Results are returned as MONAI's own transforms return them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor
from monai.data.meta_obj import get_track_meta
from monai.transforms.lazy import functional as lazy
from monai.utils import convert_to_tensor, TraceKeys
from numpy.typing import NDArray
from torch import Tensor

_AFFINE_TOLERANCE = 1e-3
_WIDEST_BYTES = 8  # of a number that torch knows


def as_tensor(data: NdarrayOrTensor, name: str) -> Tensor:
    """A tensor of the data without its metadata, checked to be ``(C, *S)`` of two or three spatial axes.

    Raises:
        TypeError: neither array nor tensor, or not of a real numeric type.
        ValueError: another number of axes, or an empty one.
    """
    tensor = numeric_tensor(data, name)
    if isinstance(data, MetaTensor) and data.is_batch:
        raise ValueError(f"{name} must be one sample, got a batch {tuple(data.shape)}. Use decollate_batch first.")
    if tensor.ndim not in (3, 4) or 0 in tensor.shape:
        raise ValueError(
            f"{name} must have shape (C, *S) with 2 or 3 non-empty spatial axes, got {tuple(tensor.shape)}. "
            "Use EnsureChannelFirst to add the channel axis; BatchRandDRDMDeformd deforms batches."
        )
    return tensor


def numeric_tensor(data: NdarrayOrTensor, name: str) -> Tensor:
    """A tensor of the data, of exactly their type and without metadata.

    Raises:
        TypeError: neither array nor tensor, or not of a real numeric type.
    """
    if not isinstance(data, (np.ndarray, Tensor)):
        raise TypeError(f"{name} must be a numpy array or tensor, got {type(data).__name__}.")
    if isinstance(data, np.ndarray):
        real = data.dtype.kind in "biuf" and data.dtype.itemsize <= _WIDEST_BYTES
    else:
        real = not data.is_complex()
    if not real:
        raise TypeError(f"{name} must be of a real numeric type of at most 64 bits, got {data.dtype}.")
    tensor: Tensor = convert_to_tensor(_native(data), track_meta=False)
    return tensor


def spacing_of(data: NdarrayOrTensor, pixdim: Sequence[float] | None, name: str) -> tuple[float, ...]:
    """Millimetres per voxel along each spatial axis: from the affine, else ``pixdim``, else 1.

    MONAI gives an identity affine to data that never had one, and flips and rotates it with the data. ``pixdim`` is
    used for such an affine too, along the axes that the data had originally.

    Raises:
        ValueError: an affine or ``pixdim`` that gives no positive spacing.
    """
    dims = data.ndim - 1
    columns = data.affine.detach().cpu().double()[:-1, :-1] if isinstance(data, MetaTensor) else None
    axes = list(range(dims)) if columns is None else _turned_axes(columns)
    if columns is not None and (pixdim is None or axes is None):
        spacing = [float(columns[:, d].norm()) for d in range(dims)] if columns.shape[1] >= dims else []
    elif pixdim is None or axes is None or len(pixdim) != len(axes):
        spacing = [1.0] * dims if pixdim is None else [float(s) for s in pixdim]
    else:
        spacing = [float(pixdim[axis]) for axis in axes]
    if len(spacing) != dims or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"{name}: need {dims} positive spacings in mm, got {spacing}. Check the affine or pixdim.")
    return tuple(spacing)


def directions_of(data: NdarrayOrTensor) -> NDArray[np.float64]:
    """Where each spatial axis of ``(C, *S)`` points: ``(3, D)`` to the right, the front and the head.

    The columns of the affine, or the identity if the data have none.
    """
    dims = data.ndim - 1
    if not isinstance(data, MetaTensor):
        return np.eye(3)[:, :dims]
    columns = data.affine.detach().cpu().double().numpy()[:-1, :dims]
    directions = np.zeros((3, dims))
    directions[: len(columns)] = columns
    return directions


def _turned_axes(columns: Tensor) -> list[int] | None:
    """The original axis of each axis, if the affine is an identity that was flipped or turned; else None."""
    steps = columns.round().abs()
    once = all(bool((steps.sum(d) == 1).all()) for d in (0, 1))
    return steps.argmax(0).tolist() if once and torch.allclose(columns.abs(), steps, rtol=0, atol=1e-6) else None


def checked_pixdim(pixdim: Sequence[float] | None) -> tuple[float, ...] | None:
    """Return ``pixdim`` as a tuple.

    Raises:
        TypeError: not several numbers.
        ValueError: not 2 or 3 positive numbers.
    """
    if pixdim is None:
        return None
    try:
        numbers = tuple(float(s) for s in pixdim)
    except OverflowError:  # of an integer
        numbers = (np.inf,)
    except TypeError:
        raise TypeError(f"pixdim must be 2 or 3 numbers in mm, one for each spatial axis, got {pixdim!r}.") from None
    if len(numbers) not in (2, 3) or not all(0 < s < np.inf for s in numbers):
        raise ValueError(f"pixdim must be 2 or 3 positive numbers in mm, got {tuple(pixdim)}.")
    return numbers


def split_batch(data: Any, name: str) -> tuple[Tensor, list[Any]]:
    """The values of a batch, and for each sample the data that know its affine.

    Raises:
        TypeError: not an array or tensor of a real numeric type.
        ValueError: not ``(B, C, *S)``.
    """
    values = numeric_tensor(data, name)
    if values.ndim not in (4, 5) or 0 in values.shape:
        raise ValueError(
            f"{name} must be a batch (B, C, *S) with 2 or 3 non-empty spatial axes, got {tuple(values.shape)}."
        )
    if not isinstance(data, MetaTensor):
        return values, list(values)
    affines = data.affine if data.affine.ndim == 3 else data.affine.expand(len(values), -1, -1)
    return values, [MetaTensor(one, affine=affine) for one, affine in zip(values, affines)]


def check_same_spaces(first: Sequence[Any], other: Sequence[Any], first_name: str, other_name: str) -> None:
    """Check that two batches have as many samples, and that these share their spaces one by one.

    Raises:
        ValueError: naming the two and what differs.
    """
    if len(other) != len(first):
        raise ValueError(f"{first_name} and {other_name} must have one batch size, got {len(first)} and {len(other)}.")
    for one, its_other in zip(first, other):
        check_same_space(one, its_other, first_name, other_name)


def check_same_space(first: NdarrayOrTensor, other: NdarrayOrTensor, first_name: str, other_name: str) -> None:
    """Check that two ``(C, *S)`` share their spatial shape and, where both have one, their affine.

    Raises:
        ValueError: naming the two and what differs.
    """
    if other is first:
        return
    advice = "Resample them to one grid first (ResampleToMatchd)."
    if tuple(other.shape[1:]) != tuple(first.shape[1:]):
        raise ValueError(
            f"{first_name} and {other_name} must have one spatial shape, got {tuple(first.shape[1:])} and "
            f"{tuple(other.shape[1:])}. {advice}"
        )
    if isinstance(first, MetaTensor) and isinstance(other, MetaTensor):
        a, b = first.affine.detach().cpu().double(), other.affine.detach().cpu().double()
        small = min(1.0, float(a[..., :-1, :-1].norm(dim=-2).min()))  # voxels of microscopes are smaller than 1e-3 mm
        if a.shape != b.shape or not torch.allclose(a, b, atol=_AFFINE_TOLERANCE * small):
            raise ValueError(
                f"{first_name} and {other_name} must have one affine, got {a.tolist()} and {b.tolist()}. {advice}"
            )


def world_affine(data: NdarrayOrTensor, name: str) -> Tensor:
    """Voxel to world (RAS mm) of the spatial axes of ``(C, *S)`` data, ``(D + 1, D + 1)`` float64.

    Raises:
        ValueError: data without an affine, or one that cannot be inverted.
    """
    if not isinstance(data, MetaTensor):
        raise ValueError(
            f"point_space='world' needs the affine of {name}, got a {type(data).__name__} without one. Load it as a "
            "MetaTensor, or give points in voxels (point_space='voxel')."
        )
    dims = data.ndim - 1
    full = data.affine.detach().cpu().double()
    affine = torch.eye(dims + 1, dtype=torch.float64)
    affine[:dims, :dims], affine[:dims, -1] = full[:dims, :dims], full[:dims, -1]
    if dims == 2 and len(full) == 4 and bool((full[2, :2].abs() > _AFFINE_TOLERANCE).any()):
        raise ValueError(
            f"point_space='world' of 2D images needs a slice parallel to the world's x and y, got the affine "
            f"{full.tolist()} of {name}. Give points in voxels."
        )
    if int(torch.linalg.matrix_rank(affine[:dims, :dims])) < dims:
        raise ValueError(f"point_space='world': the affine of {name} cannot be inverted: {full.tolist()}.")
    return affine


def wrap_like(data: NdarrayOrTensor, values: Tensor) -> Tensor:
    """The result as MONAI returns it: if metadata is tracked, a MetaTensor with a copy of the metadata of ``data``."""
    ordinary = values.clone() if values.is_inference() and not torch.is_inference_mode_enabled() else values
    if not get_track_meta():
        return ordinary
    return with_metadata_of(data, ordinary) if isinstance(data, MetaTensor) else MetaTensor(ordinary)


def check_field(field: object) -> None:
    """Check that a given field is a finite floating tensor.

    Raises:
        TypeError: not a floating tensor.
        ValueError: not finite.
    """
    if not isinstance(field, Tensor) or not field.is_floating_point():
        raise TypeError(
            f"field must be a floating tensor (D, *S) in voxels, got {getattr(field, 'dtype', type(field))}."
        )
    if not bool(torch.isfinite(field).all()):
        raise ValueError("field must be finite, got NaN or infinity.")


def check_field_fits(field: Tensor, image: Tensor) -> None:
    """Check that a field is ``(D, *S)`` for an image ``(C, *S)``.

    Raises:
        ValueError: another shape.
    """
    expected = (image.ndim - 1, *image.shape[1:])
    if tuple(field.shape) != expected:
        raise ValueError(f"field must have shape {expected}, got {tuple(field.shape)}.")


def apply_pending(data: NdarrayOrTensor) -> NdarrayOrTensor:
    """Apply the pending lazy operations of the data, because a field belongs to the voxels of the resampled image."""
    if isinstance(data, MetaTensor) and data.has_pending_operations:
        own = with_metadata_of(data, data.as_tensor())  # a copy, because MONAI empties the list of its argument
        return lazy.apply_pending(own, overrides=_pending_mode(own))[0]  # type: ignore[no-any-return]  # it has no types
    return data


def _pending_mode(data: MetaTensor) -> dict[str, Any]:
    """The interpolation that all pending operations recorded. MONAI 1.6.1 records it, but does not use it later."""
    modes = {mode for mode in map(_interpolation, data.pending_operations) if mode is not None}
    return {"mode": modes.pop()} if len(modes) == 1 else {}


def _interpolation(operation: Any) -> str | int | None:
    """The mode in the record of an operation, or in the record of the operation that it wraps."""
    while isinstance(operation, dict) and TraceKeys.EXTRA_INFO in operation:
        operation = operation[TraceKeys.EXTRA_INFO]
    mode = operation.get("mode") if isinstance(operation, dict) else None
    return mode if mode in ("bilinear", "nearest", 0, 1) else None


def _native(data: NdarrayOrTensor) -> Tensor:
    """A tensor of exactly the type of the array. MONAI's own conversion would widen unsigned integers."""
    if isinstance(data, Tensor):
        return data
    native = np.ascontiguousarray(data, dtype=data.dtype.newbyteorder("="))
    # numpy ignores the strides of axes of length 1, torch does not: np.flip leaves negative ones there
    torch_reads_it = native.flags.writeable and all(step > 0 for step in native.strides)
    return torch.from_numpy(native if torch_reads_it else native.copy())


def with_metadata_of(data: MetaTensor, tensor: torch.Tensor) -> MetaTensor:
    """A MetaTensor of the values with a copy of the metadata, so that later changes do not reach the input."""
    carrier = MetaTensor(tensor)
    lists = [name for name in data.__dict__ if name != "_meta"]
    carrier.copy_meta_from(data, keys=lists)  # type: ignore[no-untyped-call]  # MONAI leaves it without types
    carrier.meta = _copied(data.meta)
    return carrier


def _copied(meta: dict[Any, Any]) -> dict[Any, Any]:
    try:
        return copy.deepcopy(meta)
    except Exception:  # locks, generators and the like cannot be copied; they are shared, the rest is not
        return {key: _copied_value(value) for key, value in meta.items()}


def _copied_value(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:
        return value
