"""The fields of one image, in memory and as a file that is read where it lies."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open, SafetensorError
from safetensors.torch import save as to_safetensors
from torch import Tensor

from monai_drdm.deformation.stored_field import StoredField
from monai_drdm.documents import Document
from monai_drdm.io.files import atomically

_ENTRY = Document(
    "a whole file of a deformation bank", "Build the bank again: only what is damaged or missing is drawn."
)
_META = "monai_drdm_bank"
_VALUES, _PRINT = "values", "fingerprint"
_PRINT_SAMPLES = 4096
_PRINT_TOLERANCE = 1e-4
"""Of the range of values; sums taken by another number of threads or another machine differ by less."""


@dataclass(frozen=True, eq=False)
class BankEntry:
    """All fields of one image."""

    identity: str
    fingerprint: Tensor
    """Of the image they were drawn on, see ``fingerprint_of``."""
    shape: tuple[int, ...]
    """Spatial shape of the image."""
    spacing: tuple[float, ...]
    slice_axis: int | None
    steps: tuple[float, ...]
    """Of each field: voxels per unit of ``values``."""
    params: tuple[str, ...]
    """Of each field: the record that replays it, as JSON."""
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
        """From fields of one image ``(C, *S)``."""
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
        """Of the fields, and of what tells their image."""
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
            "identity": self.identity,
            "shape": self.shape,
            "spacing": self.spacing,
            "slice_axis": self.slice_axis,
            "steps": self.steps,
            "params": self.params,
            "settings": self.settings,
            "crc32": [_checksum(one) for one in self.values],
        }
        tensors = {_VALUES: self.values.contiguous(), _PRINT: self.fingerprint.contiguous()}
        data = to_safetensors(tensors, {_META: json.dumps(meta, sort_keys=True)})
        atomically(path, lambda part: Path(part).write_bytes(data))


class EntryFile:
    """A file of fields, opened once and mapped into memory: a field that is read is all that is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with _ENTRY.reading(path, SafetensorError):
                self._file = safe_open(path, framework="pt")
                meta = _ENTRY.parse_json((self._file.metadata() or {})[_META], path)  # type: ignore[no-untyped-call]
                self._values = self._file.get_slice(_VALUES)  # type: ignore[no-untyped-call]
                self.fingerprint: Tensor = self._file.get_tensor(_PRINT)  # type: ignore[no-untyped-call]
                self.identity, self.settings = str(meta["identity"]), str(meta["settings"])
                self.shape, self.spacing = tuple(meta["shape"]), tuple(meta["spacing"])
                self.slice_axis: int | None = meta["slice_axis"]
                self.steps, self.params, self._crc32 = (tuple(meta[key]) for key in ("steps", "params", "crc32"))
                kind, size = self._values.get_dtype(), self._values.get_shape()
                if kind != "I16" or not size[0] == len(self.steps) == len(self.params) == len(self._crc32) > 0:
                    raise ValueError(f"{kind} {size} for {len(self.steps)} fields")
        except FileNotFoundError as error:  # also its word for a file that may not be read
            if path.exists():
                raise PermissionError(f"{path} cannot be read: {error}. Ask its owner for permission.") from error
            raise
        except OSError as error:
            raise ValueError(_damaged(path, error)) from error

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
    """File of an image's fields: readable, and one for each identity."""
    readable = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in identity)[-60:].lstrip(".")
    return f"{readable}-{hashlib.sha256(identity.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}.safetensors"


def fingerprint_of(image: Tensor) -> Tensor:
    """Tells images ``(C, *S)`` of one shape apart: at most some 4,096 values spread over them, float32."""
    flat = image.detach().reshape(-1)
    stride = max(1, flat.numel() // _PRINT_SAMPLES)
    while stride > 1 and any(n % stride == 0 for n in image.shape[1:] if n > 1):  # else it sees some columns only
        stride += 1
    return flat[::stride].to(torch.float32).cpu().clone()


def same_fingerprint(first: Tensor, other: Tensor) -> bool:
    """Whether two fingerprints are of one image, but for rounding errors."""
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


def _checksum(values: Tensor) -> int:
    return zlib.crc32(values.contiguous().numpy().tobytes())


def _damaged(path: Path, why: object) -> str:
    return (
        f"{path} is not a whole file of a deformation bank ({why}). Build the bank again: only what is damaged or "
        "missing is drawn."
    )
