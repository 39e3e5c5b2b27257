"""The fields of one image: in memory, or in a file that is mapped into memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open, SafetensorError
from safetensors.torch import save as to_safetensors
from torch import Tensor

from monai_drdm.deformation.stored_field import StoredField
from monai_drdm.documents import Document
from monai_drdm.fields.intensity import spread_voxels
from monai_drdm.io.files import atomically

_ENTRY = Document(
    "a whole file of a deformation bank", "Build the bank again: only what is damaged or missing is drawn."
)
_META, _DIGEST = "monai_drdm_bank", "sha256"
_FORMAT = 3
_VALUES, _PRINT = "values", "fingerprint"
_PRINT_SAMPLES = 4096
_PRINT_TOLERANCE = 1e-4
"""Tolerance, as a fraction of the range of values. Sums differ by less with other numbers of threads or machines."""


@dataclass(frozen=True, eq=False)
class BankEntry:
    """All fields of one image."""

    identity: str
    fingerprint: Tensor
    """Fingerprint of the image that the fields were drawn on; see ``fingerprint_of``."""
    shape: tuple[int, ...]
    """Spatial shape of the image."""
    spacing: tuple[float, ...]
    slice_axis: int | None
    steps: tuple[float, ...]
    """For each field, voxels per unit of ``values``."""
    params: tuple[str, ...]
    """For each field, the record that replays it, as JSON."""
    settings: str
    """Digest of the bank's settings."""
    values: Tensor
    """``(K, D, *C)`` int16."""

    @classmethod
    def of(
        cls,
        identity: str,
        image: Tensor,
        spacing: tuple[float, ...],
        fields: list[StoredField],
        params: list[str],
        settings: str,
    ) -> BankEntry:
        """Make an entry from the fields of one image ``(C, *S)``."""
        return cls(
            identity,
            fingerprint_of(image),
            tuple(image.shape[1:]),
            spacing,
            fields[0].slice_axis,
            tuple(field.step for field in fields),
            tuple(params),
            settings,
            torch.stack([field.values for field in fields]),
        )

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def nbytes(self) -> int:
        """Bytes of the fields and of the fingerprint."""
        return sum(one.numel() * one.element_size() for one in (self.values, self.fingerprint))

    def field(self, index: int) -> StoredField:
        """One field."""
        return StoredField(self.values[index], self.steps[index], self.shape, self.slice_axis)

    def save(self, path: Path) -> None:
        """Write to a file, whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        meta = {
            "format": _FORMAT,
            "identity": self.identity,
            "shape": self.shape,
            "spacing": self.spacing,
            "slice_axis": self.slice_axis,
            "steps": self.steps,
            "params": self.params,
            "settings": self.settings,
            "grid": self.values.shape[2:],
            "crc32": [_checksum(one) for one in self.values],
            "fingerprint_crc32": _checksum(self.fingerprint),
        }
        tensors = {_VALUES: self.values.contiguous(), _PRINT: self.fingerprint.contiguous()}
        text = json.dumps(meta | {_DIGEST: _digest(meta)}, sort_keys=True)
        data = to_safetensors(
            tensors, {_META: text}
        )  # one key only: the order of several keys would differ between processes
        atomically(path, lambda part: Path(part).write_bytes(data))


class EntryFile:
    """A file of fields that is mapped into memory, so that only the fields that are used are read from disk.

    Everything that decides a field is checked: the header when the file is opened, and the values of a field when it is
    read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with _ENTRY.reading(path, RuntimeError, SafetensorError):
                self._file = safe_open(path, framework="pt")
                self._values = self._file.get_slice(_VALUES)  # type: ignore[no-untyped-call]
                self.fingerprint: Tensor = self._file.get_tensor(_PRINT)  # type: ignore[no-untyped-call]
                self._take(_header(self._file.metadata() or {}, path))  # type: ignore[no-untyped-call]
        except FileNotFoundError as error:  # it also raises this for a file without permission to read
            if path.exists():
                raise PermissionError(f"{path} cannot be read: {error}. Ask its owner for permission.") from error
            raise
        except OSError as error:
            raise ValueError(_damaged(path, error)) from error

    def _take(self, meta: dict[str, Any]) -> None:
        """Check the header against the values in the file, and keep it.

        Raises:
            KeyError: an entry is missing.
            TypeError: an entry is of another type.
            ValueError: an entry is out of range, or does not fit the others.
        """
        self.identity, self.settings = str(meta["identity"]), str(meta["settings"])
        self.shape, self.spacing = tuple(meta["shape"]), tuple(meta["spacing"])
        self.slice_axis: int | None = meta["slice_axis"]
        self.steps, self.params, self._crc32 = (tuple(meta[key]) for key in ("steps", "params", "crc32"))
        planar = [n for d, n in enumerate(self.shape) if d != self.slice_axis]
        kind, size = self._values.get_dtype(), tuple(self._values.get_shape())
        expected = (len(self.steps), len(planar), *meta["grid"])
        if kind != "I16" or size != expected or not len(self.steps) == len(self.params) == len(self._crc32) > 0:
            raise ValueError(f"{kind} {size}, expected I16 {expected} and as many records")
        if self.slice_axis not in (None, 0, 1, 2) or len(planar) != len(self.shape) - (self.slice_axis is not None):
            raise ValueError(f"slice_axis {self.slice_axis!r} of a grid {self.shape}")
        if len(planar) not in (2, 3) or not all(type(n) is int and n > 0 for n in self.shape):
            raise ValueError(f"shape {self.shape}")
        if len(self.spacing) != len(self.shape) or not all(0 < one < math.inf for one in (*self.spacing, *self.steps)):
            raise ValueError(f"spacing {self.spacing} or steps {self.steps} are not positive numbers")
        if self.fingerprint.dtype != torch.float32 or _checksum(self.fingerprint) != meta["fingerprint_crc32"]:
            raise ValueError("wrong checksum of the fingerprint")

    def __len__(self) -> int:
        return len(self.steps)

    def field(self, index: int) -> StoredField:
        """One field, its checksum checked.

        Raises:
            ValueError: the file is damaged.
        """
        values = self._values[index : index + 1][0]
        if _checksum(values) != self._crc32[index]:
            with _ENTRY.reading(self.path):
                raise ValueError(f"wrong checksum of field {index}")
        return StoredField(values, self.steps[index], self.shape, self.slice_axis)


def file_name(identity: str) -> str:
    """The file name for an identity. It is readable, and different for every identity."""
    readable = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in identity)[-60:].lstrip(".")
    return f"{readable}-{hashlib.sha256(identity.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}.safetensors"


def fingerprint_of(image: Tensor) -> Tensor:
    """About 4,096 values spread over an image ``(C, *S)``, float32, by which it is recognised."""
    return spread_voxels(image.detach()[None], _PRINT_SAMPLES)[0].to(torch.float32).cpu().clone()


def same_fingerprint(first: Tensor, other: Tensor) -> bool:
    """Whether two fingerprints belong to the same image, up to rounding errors."""
    if first.shape != other.shape:
        return False
    tolerance = _PRINT_TOLERANCE * (first.max() - first.min())
    return bool(((first - other).abs() <= tolerance).all())


def identity_of(value: object) -> str:
    """The name by which a bank knows an image.

    Raises:
        TypeError: not a string, path or whole number.
    """
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (str, os.PathLike, Integral)):
        raise TypeError(f"the identity of an image must be a string, a path or a whole number, got {value!r}.")
    return str(os.fspath(value) if isinstance(value, os.PathLike) else value)


def _header(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The header of the file, which describes its fields.

    Raises:
        KeyError: there is no header.
        ValueError: it was changed, or another version of this package wrote it.
    """
    meta = _ENTRY.parse_json(metadata[_META], path)
    number, digest = meta.get("format", 2), meta.pop(_DIGEST, None)
    if number != _FORMAT:
        raise ValueError(f"format {number!r}, this version reads {_FORMAT}")
    if _digest(meta) != digest:
        raise ValueError("wrong checksum of its header")
    return meta


def _digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _checksum(values: Tensor) -> int:
    return zlib.crc32(values.contiguous().numpy().tobytes())


def _damaged(path: Path, why: object) -> str:
    return (
        f"{path} is not a whole file of a deformation bank ({why}). Build the bank again: only what is damaged or "
        "missing is drawn."
    )
