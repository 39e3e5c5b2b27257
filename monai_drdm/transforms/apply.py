"""``ApplyDDFd``: a displacement field that is given or was saved, applied to every key."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.utils import TransformBackends
from torch import Tensor

from monai_drdm.deformation.record import Deformation
from monai_drdm.deformation.stored_field import StoredField
from monai_drdm.fields.warp import Mode, PaddingMode
from monai_drdm.io import load_ddf
from monai_drdm.samples import (
    as_tensor,
    check_field,
    check_field_fits,
    check_same_space,
    flushed,
    numeric_tensor,
    spacing_of,
)
from monai_drdm.transforms.base import KeyedDeformation
from monai_drdm.transforms.points import PointSpace
from monai_drdm.transforms.tracing import in_plain_mode

Field = NdarrayOrTensor | str | os.PathLike[str]


class ApplyDDFd(KeyedDeformation):
    """Apply one displacement field to images, labels, landmarks and boxes of a sample.

    Args:
        keys: images and labels ``(C, *S)`` to deform. They must agree in spatial shape and affine.
        ddf: the field for every sample: ``(D, *S)`` in voxels, or the path of a field file.
        ddf_key: instead, the key under which each sample brings its own, as either.
        mode: one, or one per key: ``bilinear``, ``nearest``, ``bicubic`` (2D) or ``label``.
        padding_mode: one, or one per key: ``border``, ``zeros`` or ``reflection``.
        point_keys: as in ``RandDRDMDeformd``.
        point_space: as in ``RandDRDMDeformd``.
        box_keys: as in ``RandDRDMDeformd``.
        box_mode: as in ``RandDRDMDeformd``.
        invertible: record what ``inverse`` needs.
        allow_missing_keys: leave keys alone that the data lack; at least one of ``keys`` must be there.

    ``.last`` holds the latest deformation. A field with an affine (from a file, or a MetaTensor whose affine is not the
    identity) must lie on the grid of the images: it is never resampled.

    Raises:
        TypeError: a field of a wrong type.
        ValueError: both or neither of ``ddf`` and ``ddf_key``, or modes that do not fit.
    """

    backend = [TransformBackends.TORCH]  # noqa: RUF012  # MONAI declares it so

    def __init__(
        self,
        keys: KeysCollection,
        ddf: Field | None = None,
        *,
        ddf_key: Hashable | None = None,
        mode: Mode | Sequence[Mode] = "bilinear",
        padding_mode: PaddingMode | Sequence[PaddingMode] = "border",
        point_keys: KeysCollection = (),
        point_space: PointSpace = "voxel",
        box_keys: KeysCollection = (),
        box_mode: str = "standard",
        invertible: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(
            keys,
            mode,
            padding_mode,
            point_keys,
            point_space,
            box_keys,
            box_mode,
            invertible,
            allow_missing_keys,
        )
        if (ddf is None) == (ddf_key is None):
            raise ValueError(
                "ApplyDDFd: give either ddf= (one field for all) or ddf_key= (each sample brings its own)."
            )
        self.field = None if ddf is None else _Field.of(ddf, "ddf")
        self.ddf_key = ddf_key
        self.last: Deformation | None = None

    @in_plain_mode
    def __call__(self, data: Mapping[Any, NdarrayOrTensor]) -> dict[Any, NdarrayOrTensor]:
        """Deform all keys of a sample by the field.

        Args:
            data: a dictionary with ``(C, *S)`` values at the keys, and points and boxes at theirs.

        Returns:
            A new dictionary; the input and its tensors are left as they are.

        Raises:
            KeyError: a key or the field is missing.
            TypeError: a value or the field is of a wrong type.
            ValueError: anything that does not fit, or a field file that cannot be read as one.
        """
        result = dict(data)
        names = [key for key, *_ in self.present(result)]
        if not names:
            raise KeyError(f"ApplyDDFd: none of the keys {self.keys} is in the data: {sorted(map(str, result))}.")
        if self.ddf_key is not None and self.ddf_key not in result:
            raise KeyError(f"ApplyDDFd: ddf_key {self.ddf_key!r} is missing from the data: {sorted(map(str, result))}.")
        for key in names:
            result[key] = flushed(result[key])
        image, name = result[names[0]], repr(names[0])
        tensors = [as_tensor(result[key], repr(key)) for key in names]
        for key in names[1:]:
            check_same_space(image, result[key], name, repr(key))
        field = self.field or _Field.of(result[self.ddf_key], repr(self.ddf_key))
        if field.on_grid is not None:
            check_same_space(image, field.on_grid, name, "the field")
        check_field_fits(field.stored.values, tensors[0])
        self.check_geometry(result, image.ndim - 1)
        ddf, spacing = field.stored.ddf(tensors[0].device), spacing_of(image, None, name)
        self.last = deformation = Deformation(ddf, spacing, stored=field.stored)
        self.move(result, image, name, deformation)  # threads may share this transform, and with it ``last``
        return result

    def __getstate__(self) -> dict[str, object]:
        """Everything but the last field."""
        state: dict[str, object] = super().__getstate__()  # type: ignore[no-untyped-call]  # MONAI leaves it without types
        return {**state, "last": None}


ApplyDDFD = ApplyDDFDict = ApplyDDFd


class _Field(NamedTuple):
    """A given field, in the form that all records of it share, and its grid if it has one."""

    stored: StoredField
    on_grid: MetaTensor | None
    """Its values with their affine."""

    @classmethod
    def of(cls, given: Field, name: str) -> _Field:
        """Copy a field, or read it from its file."""
        from_file = isinstance(given, (str, os.PathLike))
        values = load_ddf(given) if isinstance(given, (str, os.PathLike)) else given
        if not isinstance(values, (np.ndarray, Tensor)):
            kind = type(given).__name__
            raise TypeError(f"ApplyDDFd: {name} must be a tensor (D, *S), an array or a path, got {kind}.")
        tensor = values if isinstance(values, Tensor) else numeric_tensor(values, name)
        check_field(tensor)
        stored = StoredField.exact(tensor.as_subclass(Tensor))
        if isinstance(values, MetaTensor) and (from_file or not _is_identity(values.affine)):
            return cls(stored, MetaTensor(stored.values, affine=values.affine.clone()))
        return cls(stored, None)


def _is_identity(affine: Tensor) -> bool:
    """MONAI gives the identity to data that never had an affine."""
    return bool(torch.equal(affine.cpu().double(), torch.eye(len(affine), dtype=torch.float64)))
