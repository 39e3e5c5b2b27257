"""The form in which a record keeps a field: small, immutable, and exactly what was applied."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from monai_drdm.fields import compose, identity_grid, invert, resize_ddf
from monai_drdm.fields.invert import Inverse

_INT16_BITS = 15


@dataclass(frozen=True, eq=False)
class StoredField:
    """A field on the grid it was drawn on, in 16 bits on the CPU.

    The numbers are fixed point, because half precision would be too coarse: at displacements of 32 voxels it has steps
    of 1/32 voxel. Fixed-point steps are 1/1024 voxel there, so a record replays to 1e-3 voxel.

    The object is immutable, and copying it returns the object itself. So records that share a field go on sharing it
    when tensors are cloned.
    """

    values: Tensor
    """``(D, *C)`` int16 multiples of ``step``, or floating voxels of a field that was given."""
    step: float
    """Voxels of the grid ``C`` per unit of ``values``: a power of two where a field was rounded, and any positive
    number where it was scaled afterwards, as ``RandDRDMBankd`` does."""
    shape: tuple[int, ...]
    """Spatial shape that the field was applied to."""
    slice_axis: int | None = None
    """Spatial axis along which an in-plane field is repeated."""
    matrix: tuple[tuple[float, ...], ...] | None = None
    """Homogeneous affine map about the centre of the grid of the data, in voxels, which comes before the field."""

    @classmethod
    def quantised(cls, ddf: Tensor, shape: tuple[int, ...], slice_axis: int | None = None) -> StoredField:
        """Round a field ``(D, *C)`` in voxels of its grid, of a spatial shape ``S`` that may be finer."""
        largest = float(ddf.abs().max())
        step = 2.0 ** (math.frexp(largest)[1] - _INT16_BITS) if largest > 0 else 1.0
        if round(largest / step) == 2**_INT16_BITS:  # slightly below a power of two
            step *= 2
        values = (ddf.detach() / step).round().to(torch.int16).cpu()
        return cls(values, step, tuple(shape), slice_axis)

    @classmethod
    def exact(cls, ddf: Tensor) -> StoredField:
        """A copy of a given field ``(D, *S)`` in voxels."""
        with torch.inference_mode(False):
            return cls(ddf.detach().cpu().clone(), 1.0, tuple(ddf.shape[1:]))

    @classmethod
    def identity(cls, shape: tuple[int, ...]) -> StoredField:
        """The identity: the field of a call that moved nothing."""
        return cls(torch.zeros((len(shape), *(1 for _ in shape)), dtype=torch.int16), 1.0, tuple(shape))

    def ddf(self, device: torch.device | str = "cpu") -> Tensor:
        """The applied field ``(D, *S)`` in voxels; across ``slice_axis`` it is a view that repeats one slice."""
        return self.spread(self.planar(device))

    def inverse(self, device: torch.device | str = "cpu") -> Inverse:
        """The inverse ``(1, D, *S)`` of the applied field."""
        found = invert(self._unposed(device)[None])
        ddf = found.ddf
        if self.matrix is not None:
            back = torch.linalg.inv(torch.tensor(self.matrix, dtype=torch.float64))
            ddf = _affine_ddf(back, ddf) + ddf
        return found._replace(ddf=self.spread(ddf[0])[None])

    def parts(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
        """The field ``(D, *S)`` in voxels without its affine map, and that map ``(D + 1, D + 1)``, if there is one."""
        ddf = self.spread(self._unposed(device))
        if self.matrix is None:
            return ddf, None
        pose = torch.eye(len(ddf) + 1, dtype=torch.float64, device=device)
        axes = [axis for axis in range(len(ddf) + 1) if axis != self.slice_axis]
        pose[torch.tensor(axes)[:, None], torch.tensor(axes)] = torch.tensor(self.matrix).to(pose)
        return ddf, pose

    def planar(self, device: torch.device | str) -> Tensor:
        """The field on the grid of the data, ``(2, *P)`` in-plane or ``(D, *S)``."""
        ddf = self._unposed(device)
        if self.matrix is None:
            return ddf
        matrix = torch.tensor(self.matrix, dtype=torch.float64)
        return compose(ddf[None], _affine_ddf(matrix, torch.zeros_like(ddf)[None]))[0]

    def _unposed(self, device: torch.device | str) -> Tensor:
        """The field without its affine map."""
        values = self.values.to(device)
        if values.is_floating_point():
            return values.clone()  # a copy, because the caller may change it and all records share this one
        shape = [n for d, n in enumerate(self.shape) if d != self.slice_axis]
        return resize_ddf(values[None].to(torch.float32) * self.step, shape)[0]

    def spread(self, ddf: Tensor) -> Tensor:
        """A planar field as the whole ``(D, *S)``."""
        return ddf if self.slice_axis is None else spread_in_plane(ddf, self.slice_axis, self.shape)

    def __copy__(self) -> StoredField:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredField:
        return self


@dataclass(frozen=True, eq=False)
class ComposedField:
    """Two stored fields, one after the other: ``first(x + second(x)) + second(x)``. Shared by copies like its parts."""

    first: StoredField
    second: StoredField

    @property
    def shape(self) -> tuple[int, ...]:
        """Spatial shape that the field was applied to."""
        return self.first.shape

    def ddf(self, device: torch.device | str = "cpu") -> Tensor:
        """The applied field ``(D, *S)`` in voxels."""
        return compose(self.first.ddf(device)[None], self.second.ddf(device)[None])[0]

    def inverse(self, device: torch.device | str = "cpu") -> Inverse:
        """The inverse ``(1, D, *S)`` of the applied field."""
        return invert(self.ddf(device)[None])

    def parts(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor | None]:
        """The applied field ``(D, *S)`` in voxels, and no affine map."""
        return self.ddf(device), None

    def __copy__(self) -> ComposedField:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ComposedField:
        return self


def _affine_ddf(matrix: Tensor, moved: Tensor) -> Tensor:
    """Displacement ``(1, D, *S)`` by an affine map about the centre, of voxels that ``moved`` has displaced already."""
    grid = identity_grid(moved.shape[2:], device=moved.device, dtype=moved.dtype)
    centre = torch.tensor([(n - 1) / 2 for n in moved.shape[2:]], device=moved.device, dtype=moved.dtype)
    matrix = matrix.to(device=moved.device, dtype=moved.dtype)
    form = (1, -1, *(1,) * (moved.ndim - 2))
    at = grid + moved - centre.view(form)
    return torch.einsum("ij,bj...->bi...", matrix[:-1, :-1] - torch.eye(len(centre)).to(matrix), at) + matrix[
        :-1, -1
    ].view(form)


def spread_in_plane(ddf: Tensor, axis: int, shape: tuple[int, ...]) -> Tensor:
    """An in-plane field ``(2, *S)`` as a field ``(3, *shape)`` that moves every slice alike and none across."""
    planes = list(ddf)
    planes.insert(axis, torch.zeros_like(planes[0]))
    return torch.stack(planes).unsqueeze(axis + 1).expand(3, *shape)
