"""What the fields of a bank depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any

from monai_drdm.documents import Document, Origin

FORMAT = 2

_BANK = Document("the settings of a deformation bank", "Build the bank again, in a new folder.")


@dataclass(frozen=True)
class BankSettings:
    """Everything that, with an image and its identity, fixes the fields of a bank."""

    network: str
    """Name of the network."""
    network_sha256: str
    fields_per_image: int
    deformation_level: tuple[float, float]
    sampler: str
    steps: int
    recovery: float
    image_channel: int | None
    max_displacement_mm: float | None
    on_fold: str
    max_fold_fraction: float
    slice_axis: int | None
    pixdim: tuple[float, ...] | None
    seed: int
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """Names these settings."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """As a line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str, origin: Origin = "BankSettings") -> BankSettings:
        """Read what ``to_json`` wrote.

        Args:
            text: the JSON.
            origin: the file that it is from, for error messages.

        Raises:
            ValueError: something else, or a format that this version does not know.
        """
        with _BANK.reading(origin):
            values: dict[str, Any] = _BANK.parse_json(text, origin)
            if set(values) != {field.name for field in fields(cls)}:
                raise ValueError("other entries than a bank has")
            if values["format"] != FORMAT:
                raise ValueError(f"format {values['format']!r}, this version reads {FORMAT}")
            values["deformation_level"] = tuple(values["deformation_level"])
            values["pixdim"] = None if values["pixdim"] is None else tuple(values["pixdim"])
            return cls(**values)

    @classmethod
    def read(cls, path: Path) -> BankSettings:
        """Those in a file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it holds something else, or a format that this version does not know.
        """
        return cls.from_json(_BANK.read_text(path), path)

    def differences(self, other: BankSettings) -> list[str]:
        """Where two settings differ, in words."""
        mine, others = asdict(self), asdict(other)
        return [f"{name} {mine[name]!r} against {others[name]!r}" for name in mine if mine[name] != others[name]]


def field_seed(seed: int, identity: str, index: int) -> int:
    """Seed of one field: it depends on nothing but these, so any split of the work gives the same bank."""
    digest = hashlib.sha256(json.dumps([seed, identity, index]).encode()).digest()
    return int.from_bytes(digest[:4], "big")


def check_count(value: int, name: str) -> int:
    """A whole number of 1 or more.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}.")
    return int(value)
