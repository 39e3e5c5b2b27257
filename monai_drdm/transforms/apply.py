"""``ApplyDDFd``: a displacement field that is given or was saved, applied to every key."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.utils import TransformBackends
from torch import Tensor
from typing_extensions import Unpack

from monai_drdm.deformation import Deformation, StoredField
from monai_drdm.deformation.options import choose, with_options
from monai_drdm.io import load_ddf
from monai_drdm.samples import (
    check_field,
    check_field_fits,
    check_same_space,
    numeric_tensor,
)
from monai_drdm.transforms.base import KeyedDeformation
from monai_drdm.transforms.options import ApplyOptions
from monai_drdm.transforms.tracing import in_plain_mode

Field = NdarrayOrTensor | str | os.PathLike[str]


@with_options(ApplyOptions)
class ApplyDDFd(KeyedDeformation):
    """Apply one displacement field to images, labels, landmarks and boxes of a sample.

    Args:
        keys: images and labels ``(C, *S)`` to deform. They must agree in spatial shape and affine.
        ddf: the field for every sample: ``(D, *S)`` in voxels, or the path of a field file.
        ddf_key: instead of ``ddf``, the key under which each sample holds its own field or path.
        options: those of ``ApplyOptions``.

    ``.last`` holds the latest deformation. A field with an affine (from a file, or a MetaTensor whose affine is not the
    identity) must lie on the grid of the images: it is never resampled.

    Raises:
        TypeError: a field of a wrong type.
        ValueError: both or neither of ``ddf`` and ``ddf_key``, or modes that do not fit.
    """

    backend = [TransformBackends.TORCH]  # noqa: RUF012  # MONAI declares it so
    for_tensors = "monai_drdm.fields.warp applies a field to plain tensors"

    def __init__(
        self,
        keys: KeysCollection,
        ddf: Field | None = None,
        *,
        ddf_key: Hashable | None = None,
        **options: Unpack[ApplyOptions],
    ) -> None:
        super().__init__(keys, choose(ApplyOptions, options))
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
        names = [key for key, *_ in self._present(self.entries(data))]
        if not names:
            raise KeyError(f"ApplyDDFd: none of the keys {self.keys} is in the data: {sorted(map(str, data))}.")
        if self.ddf_key is not None and self.ddf_key not in data:
            raise KeyError(f"ApplyDDFd: ddf_key {self.ddf_key!r} is missing from the data: {sorted(map(str, data))}.")
        valid = self.validate(data, names[0])
        field = self.field or _Field.of(data[self.ddf_key], repr(self.ddf_key))
        if field.on_grid is not None:
            check_same_space(valid.spaces[0], field.on_grid, valid.name, "the field")
        check_field_fits(field.stored.values, valid.images[0])
        deformation = Deformation(field.stored.ddf(valid.images.device), valid.spacings[0], stored=field.stored)
        self.last = deformation
        return self.apply(valid, [deformation])

    def __getstate__(self) -> dict[str, object]:
        """Everything but the last field."""
        state: dict[str, object] = super().__getstate__()  # type: ignore[no-untyped-call]  # MONAI leaves it without types
        return {**state, "last": None}


ApplyDDFD = ApplyDDFDict = ApplyDDFd


class _Field(NamedTuple):
    """A given field, in the form that records keep, with its grid if it has an affine."""

    stored: StoredField
    on_grid: MetaTensor | None
    """The values with their affine; None without one."""

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
